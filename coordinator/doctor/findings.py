"""What was found, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK

Level = Literal["ok", "warning", "error"]
ORDER: dict[Level, int] = {"error": 0, "warning": 1, "ok": 2}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `remedy` says what to do, `command` is what to type, both '' if there is nothing.

    `where`: the hosts or ranks that it is about; () is the job as a whole.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""
    command: str = ""
    where: tuple[str, ...] = ()


def ok(check: str, found: str, *where: str) -> Finding:
    return Finding(check=check, level="ok", found=found, where=where)


def warning(check: str, found: str, remedy: str, *where: str, command: str = "") -> Finding:
    return Finding(check=check, level="warning", found=found, remedy=remedy, command=command, where=where)


def error(check: str, found: str, remedy: str, *where: str, command: str = "") -> Finding:
    return Finding(check=check, level="error", found=found, remedy=remedy, command=command, where=where)


class Report(msgspec.Struct, frozen=True):
    """Findings by subject, in the order in which they are shown."""

    subjects: dict[str, tuple[Finding, ...]]

    def all(self) -> list[tuple[str, Finding]]:
        return [(subject, finding) for subject, findings in self.subjects.items() for finding in findings]

    def count(self, level: Level) -> int:
        return sum(finding.level == level for _, finding in self.all())

    def level(self) -> Level:
        """The worst of all."""
        return min((finding.level for _, finding in self.all()), key=ORDER.__getitem__, default="ok")

    def exit_code(self) -> int:
        return EXIT_INFRASTRUCTURE if self.level() == "error" else EXIT_OK

    def to_mend(self) -> list[tuple[str, Finding]]:
        """Errors, then warnings, each in the order of the subjects."""
        return sorted(
            ((subject, finding) for subject, finding in self.all() if finding.level != "ok"),
            key=lambda one: ORDER[one[1].level],
        )

    def data(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "level": self.level(),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "subjects": {
                subject: [msgspec.to_builtins(finding) for finding in findings]
                for subject, findings in self.subjects.items()
            },
        }


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """What is the same in several places is said once, with all of them."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(msgspec.structs.replace(finding, where=()), []).extend(finding.where)
    return [msgspec.structs.replace(finding, where=tuple(dict.fromkeys(where))) for finding, where in places.items()]


def listed(names: Iterable[object], most: int = 8) -> str:
    """'a, b, c and 5 more'."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def size_text(size_bytes: float) -> str:
    """In the largest binary unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} TiB"


def time_text(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
