"""Before a time limit: how long a request is expected to take on each worker, and whether that is still in time.

What is measured is the time from a request's start to its end, over the tokens that it was estimated to have: a
worker's pace, in seconds a token of one sequence. Recent requests weigh more. Estimates that are all too high or too
low cancel out, for the same estimates are multiplied by it again. A worker that has ended nothing yet is taken to be
like the others together. While nobody has ended anything, a request is expected to take as long as the first one runs
already: so new ones start until half of the time is over, and no longer.

Pure: times are the caller's, in seconds on one clock. Who has the requests is not known here.
"""

from __future__ import annotations

import math

MEMORY_REQUESTS = 64
"""A pace forgets: what has ended so many requests ago weighs a third."""

_KEPT = 1.0 - 1.0 / MEMORY_REQUESTS


class Pace:
    """Seconds for each estimated token of a request that runs. None before anything was observed."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def observe(self, elapsed_s: float, tokens: float) -> None:
        """A request of that many estimated tokens has run so long."""
        self._seconds = self._seconds * _KEPT + elapsed_s
        self._tokens = self._tokens * _KEPT + tokens

    @property
    def token_s(self) -> float | None:
        return self._seconds / self._tokens if self._tokens else None


class Horizon:
    """See the module's text. `end_at` None: there is no time limit.

    `shortest` and `longest` are the estimated tokens of the shortest and the longest request that has arrived.
    `set_aside_since` counts requests that were set aside since one could be started.
    """

    __slots__ = ("end_at", "shortest", "longest", "set_aside_since", "_first_started", "_paces", "_together")

    def __init__(self) -> None:
        self.end_at: float | None = None
        self.shortest = math.inf
        self.longest = 0.0
        self.set_aside_since = 0
        self._first_started: float | None = None
        self._paces: dict[int, Pace] = {}
        self._together = Pace()

    def arrived(self, tokens: float) -> None:
        self.shortest = min(self.shortest, tokens)
        self.longest = max(self.longest, tokens)

    def started(self, now: float) -> None:
        if self._first_started is None:
            self._first_started = now

    def ended(self, worker: int, elapsed_s: float, tokens: float) -> None:
        """A request of that many estimated tokens has run on the worker for so long."""
        pace = self._paces.get(worker)
        if pace is None:
            pace = self._paces[worker] = Pace()
        pace.observe(elapsed_s, tokens)
        self._together.observe(elapsed_s, tokens)

    def expected_s(self, worker: int, tokens: float, now: float) -> float:
        """How long a request of that many estimated tokens is expected to run on the worker, once it runs."""
        pace = self._paces.get(worker, self._together).token_s
        if pace is not None:
            return pace * tokens
        return 0.0 if self._first_started is None else now - self._first_started

    def in_time(self, worker: int, tokens: float, now: float, wait_s: float = 0.0) -> bool:
        """Whether such a request is expected to end in time if it starts on the worker after `wait_s`."""
        return self.end_at is None or now + wait_s + self.expected_s(worker, tokens, now) <= self.end_at
