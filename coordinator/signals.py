"""Signals that a job understands: the first asks it to drain, the second to stop now.

Rank 0 listens to SIGINT, SIGTERM and SIGUSR2 (what the launchers pass on differs, see docs); workers ignore them, for
they are told by rank 0 what to do. Handlers only note what came; the loop acts on it.
"""

from __future__ import annotations

import signal
from types import FrameType

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """While in force: `count` of signals received, `name` of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in ASKED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            self.name = signal.Signals(number).name


def ignore_stop_signals() -> None:
    """A worker rank leaves stopping to rank 0."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)
