"""Hostfiles: how many ranks they have room for. Open MPI writes `host slots=N`, MPICH and Intel MPI `host:N`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scheduling.errors import ConfigError

_SLOTS = re.compile(r"\bslots\s*=\s*(\d+)")
_COUNT = re.compile(r"(?!\[)[^\s:]+:(\d+)(?:\s|$)")


def count_slots(path: Path) -> int:
    """The ranks that the hosts of a file have room for together.

    Raises ConfigError: it cannot be read, names no host, or does not say of each how many it takes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read the hostfile {path}: {why}") from None
    slots = 0
    for number, line in enumerate(lines, 1):
        host = line.split("#", 1)[0].strip()
        if not host:
            continue
        found = _SLOTS.search(host) or _COUNT.match(host)
        if found is None:
            raise ConfigError(
                f"{path}, line {number}: how many ranks does {host.split()[0]} take? Write `{host.split()[0]} slots=N` "
                f"for Open MPI, `{host.split()[0]}:N` for MPICH: a rank for each GPU"
            )
        slots += int(found[1])
    if slots == 0:
        raise ConfigError(f"the hostfile {path} has room for no rank")
    return slots


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
