"""Signals that a job understands: the first asks it to drain, the second to stop now.

Rank 0 listens to SIGINT, SIGTERM and SIGUSR2 (what the launchers pass on differs, see docs); workers ignore them, for
they are told by rank 0 what to do. Handlers only note what came; the loop acts on it.

A scheduler that ends a job sends SIGTERM to all its processes, and launchers hand on theirs: what comes twice within
REPEAT_S was meant once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

from coordinator.entry import ASKED, take_early

REPEAT_S = 2.0
TURNED = "LLMPI_TURNED_SIGNAL"
"""The variable that names the signal into which our own mpirun's parent turns what a person sends (`ownmpirun`)."""
BY_HAND = "Ctrl-C or SIGTERM"


class StopSignals:
    """While in force: `count` of signals received, `name` of the first, BY_HAND if another was turned into it."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._turned = environ.get(TURNED)
        self.count = 0
        self.name = ""
        self._before: dict[int, object] = {}
        self._terminated_at: float | None = None

    def __enter__(self) -> StopSignals:
        for number in ASKED:
            self._before[number] = signal.signal(number, self._note)
        for early in take_early():
            self._note(early, None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            before, self._terminated_at = self._terminated_at, time.monotonic()
            if before is not None and self._terminated_at - before < REPEAT_S:
                return
        self.count += 1
        if self.count == 1:
            name = signal.Signals(number).name
            self.name = BY_HAND if name == self._turned else name


def ignore_stop_signals() -> None:
    """A worker rank leaves stopping to rank 0."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)
