"""Before a time limit: how long a request is expected to take on each worker, and whether that is still in time.

What is measured is the time from a request's start to its end, over the steps that it was estimated to need: a
worker's pace, in seconds a step of one sequence. An output token is a step; of a prompt's tokens many are read in one.
Recent requests weigh more. Estimates that are all too high or too low cancel out, for the same estimates are multiplied
by it again. A worker that has ended nothing yet is taken to be like the others together. While nobody has ended
anything, a request is expected to take as long as the first one runs already: so new ones start until half of the time
is over, and no longer.

Pure: times are the caller's, in seconds on one clock. Who has the requests is not known here.
"""

from __future__ import annotations

import math

MEMORY_REQUESTS = 64
"""A pace forgets: what has ended so many requests ago weighs a third."""

PROMPT_STEPS = 1 / 16
"""Of a token of a prompt: the least that prompts are read faster than output is made, on processors without a GPU."""

_KEPT = 1.0 - 1.0 / MEMORY_REQUESTS


def steps_of(prompt_tokens: float, output_tokens: float) -> float:
    """How long a request is, in steps."""
    return prompt_tokens * PROMPT_STEPS + output_tokens


class Pace:
    """Seconds for each estimated step of a request that runs. None before anything was observed."""

    __slots__ = ("_seconds", "_steps")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0.0

    def observe(self, elapsed_s: float, steps: float) -> None:
        """A request of that many estimated steps has run so long."""
        self._seconds = self._seconds * _KEPT + elapsed_s
        self._steps = self._steps * _KEPT + steps

    @property
    def step_s(self) -> float | None:
        return self._seconds / self._steps if self._steps else None


class Horizon:
    """See the module's text. `end_at` None: there is no time limit.

    `shortest`: estimated steps of the shortest request that has arrived.
    """

    __slots__ = ("end_at", "shortest", "_first_started", "_paces", "_together")

    def __init__(self) -> None:
        self.end_at: float | None = None
        self.shortest = math.inf
        self._first_started: float | None = None
        self._paces: dict[int, Pace] = {}
        self._together = Pace()

    def arrived(self, steps: float) -> None:
        self.shortest = min(self.shortest, steps)

    def started(self, now: float) -> None:
        if self._first_started is None:
            self._first_started = now

    def ended(self, worker: int, elapsed_s: float, steps: float) -> None:
        """A request of that many estimated steps has run on the worker for so long."""
        pace = self._paces.get(worker)
        if pace is None:
            pace = self._paces[worker] = Pace()
        pace.observe(elapsed_s, steps)
        self._together.observe(elapsed_s, steps)

    def expected_s(self, worker: int, steps: float, now: float) -> float:
        """How long a request of that many estimated steps is expected to run on the worker, once it runs."""
        pace = self._paces.get(worker, self._together).step_s
        if pace is not None:
            return pace * steps
        return 0.0 if self._first_started is None else now - self._first_started

    def in_time(self, worker: int, steps: float, now: float, wait_s: float = 0.0) -> bool:
        """Whether such a request is expected to end in time if it starts on the worker after `wait_s`."""
        return self.end_at is None or now + wait_s + self.expected_s(worker, steps, now) <= self.end_at
