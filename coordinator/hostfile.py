"""Hostfiles: how many ranks they have room for. Open MPI writes `host slots=N`, MPICH and Intel MPI `host:N`.

What the mpirun at hand would not read is refused here, with the line that it would read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scheduling.errors import ConfigError

_SLOTS = re.compile(r"\bslots\s*=\s*(\d+)")
_COUNT = re.compile(r"(?!\[)[^\s:]+:(\d+)(?:\s|$)")


def count_slots(path: Path, flavour: str) -> int:
    """The ranks that the hosts of a file have room for together. `flavour`: of the mpirun that reads it, 'openmpi' or
    'mpich' (`coordinator.ownmpirun.flavour_of`).

    Raises ConfigError: it cannot be read, names no host, does not say of each how many it takes, or is not written as
    that mpirun wants it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read the hostfile {path}: {why}") from None
    slots = 0
    at: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.split("#", 1)[0].strip()):
            continue
        host, count = _read(text, f"{path}, line {number}", flavour)
        if flavour == "mpich" and "#" in line:
            raise ConfigError(f"{path}, line {number}: MPICH's mpirun takes comments on lines of their own alone")
        if flavour == "openmpi" and host in at:
            raise ConfigError(
                f"{path}, line {number}: {host} stands in line {at[host]} already: Open MPI wants one line for a host, "
                "with all its slots"
            )
        at[host] = number
        slots += count
    if slots == 0:
        raise ConfigError(f"the hostfile {path} has room for no rank")
    return slots


def _read(text: str, where: str, flavour: str) -> tuple[str, int]:
    """The host that a line names, and how many ranks it takes."""
    counted, slots = _COUNT.match(text), _SLOTS.search(text)
    host = text.split(":", 1)[0] if counted else text.split()[0]
    found = slots or counted
    if found is None:
        raise ConfigError(
            f"{where}: how many ranks does {host} take? Write `{_written(host, 'N', flavour)}`: a rank for each GPU"
        )
    if (flavour == "openmpi") != bool(slots):
        theirs, other = ("Open MPI", "MPICH") if flavour == "openmpi" else ("MPICH", "Open MPI")
        raise ConfigError(
            f"{where}: `{text}` is written for {other}, and this mpirun is {theirs}'s: write "
            f"`{_written(host, found[1], flavour)}`"
        )
    return host, int(found[1])


def _written(host: str, count: str, flavour: str) -> str:
    return f"{host} slots={count}" if flavour == "openmpi" else f"{host}:{count}"


def without_hostfile(argv: Sequence[str]) -> list[str]:
    """A command line less its `--hostfile`, which is mpirun's affair once that is started."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--hostfile":
            next(words, None)
        elif not word.startswith("--hostfile="):
            kept.append(word)
    return kept
