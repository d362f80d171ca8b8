"""Where a command begins, before anything else is loaded.

A rank is a second old when it has loaded what it needs. A signal that asks it to stop may come before, and would end it
by default: from the first line on it is noted here, and who listens later (`signals.StopSignals`, `ownmpirun`) takes
it.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType

from coordinator.siblings import in_the_way

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")
"""One of these is there where a launcher has started this process."""
USAGE = 2
"""As `scheduling.errors.EXIT_USAGE`, which cannot be loaded where something stands in its way."""
INTERRUPTED = 130
"""The status of a command that Ctrl-C has ended."""

LISTENING = (["batch"], ["study", "scaling"])
"""Commands whose rank 0 drains on a signal, and whose other ranks leave it to do so."""

_early: list[int] = []


def main() -> None:
    """The entry point of `llmpi`: `coordinator.cli` runs the command."""
    _open_standard_streams()
    if problem := in_the_way():
        print(f"llmpi: {problem}", file=sys.stderr)
        sys.exit(USAGE)
    if sys.argv[0] == "-c":
        sys.argv[0] = "llmpi"  # our own mpirun has started this rank
    # At the exit Python looks for cycles in all that was loaded but not in what is frozen: a quarter of a second of
    # processor time in each rank.
    atexit.register(gc.freeze)
    listens = any(sys.argv[1 : 1 + len(words)] == words for words in LISTENING)
    if listens and any(name in os.environ for name in RANK_VARIABLES):
        for number in ASKED:
            signal.signal(number, _note)
    try:
        from coordinator.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Those that are closed lead nowhere: a file of ours would be given their numbers, and what libraries print."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
            os.set_inheritable(number, True)
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - until the end
            setattr(sys, name, stream)


def take_early() -> list[int]:
    """The signals that came before anybody else listened, in order. They are told once."""
    taken = _early[:]
    del _early[: len(taken)]
    return taken


def _note(number: int, frame: FrameType | None) -> None:
    _early.append(number)
