"""The books of `tests.scheduling.oracle`: what can be known of workers and requests from events and instructions alone.

Nothing here judges, and nothing looks into the plane.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from scheduling.control import Limits
from scheduling.estimates import LengthEstimator
from scheduling.events import Stop
from scheduling.horizon import Horizon
from scheduling.ledger import WorkerState


@dataclass(slots=True)
class Known:
    """What rank 0 can know of one worker."""

    state: WorkerState = WorkerState.JOINING
    slots: int = 0
    heard: float = 0.0
    answered: int = 0


class Books:
    """`workers` are the plane's ids."""

    def __init__(self, workers: list[int], schedule: str, limits: Limits) -> None:
        self.limits = limits
        self.steals = schedule == "work-stealing"
        self.workers = {worker: Known() for worker in workers}
        self.live: set[int] = set()
        self.ended: set[int] = set()
        self.owner: dict[int, int] = {}
        self.started: set[int] = set()
        self.attempt: dict[int, int] = {}
        self.highest: dict[int, int] = {}
        self.copy: dict[int, tuple[int, int]] = {}
        self.copy_started: set[int] = set()
        self.copy_started_at: dict[int, float] = {}
        self.promoted: set[int] = set()
        self.died_copied: set[int] = set()
        self.copies = self.copies_won = 0
        self.deaths: dict[int, int] = {}
        self.given_up: set[int] = set()
        self.recalls: dict[int, tuple[int, list[int], float]] = {}
        self.recalls_seen = 0
        self.assigned: list[tuple[int, int]] = []
        self.unacknowledged: deque[bool] = deque()
        self.accepted = self.rejected = self.done = self.failed = self.late = 0
        self.draining = False
        self.queue_recalled = False
        self.give_up_at: float | None = None
        self.horizon = Horizon()
        self.estimator = LengthEstimator()
        self.steps: dict[int, float] = {}
        self.limit_of: dict[int, int | None] = {}
        self.started_at: dict[int, float] = {}
        self.unfinished = self.set_aside = 0
        self.input_ended = False
        self.exhausted = False
        self.stops: list[Stop] = []

    # ------------------------------------------------------------ what they say

    @property
    def _open(self) -> bool:
        return not self.draining and not self.stops

    def owned(self, worker: int) -> int:
        copies = sum(copy == worker for copy, _ in self.copy.values())
        return copies + sum(owner == worker for owner in self.owner.values())

    def _is_owner(self, worker: int, index: int, attempt: int) -> bool:
        return self.owner.get(index) == worker and self.attempt[index] == attempt

    def _waiting(self) -> int:
        """Requests that wait and may have neighbours."""
        return sum(index not in self.owner and not self._suspected(index) for index in self.live)

    def _movable(self) -> int:
        """Unstarted requests that a free slot anywhere could have: nobody has a slot free for them."""
        return self._waiting() + sum(map(self._spare, self.workers))

    def _spare(self, worker: int) -> int:
        """How many of a worker's unstarted requests no slot of its own is free for."""
        unstarted = sum(owner == worker and index not in self.started for index, owner in self.owner.items())
        return max(0, min(unstarted, self.owned(worker) - self.workers[worker].slots))

    def _suspected(self, index: int) -> bool:
        return self.deaths.get(index, 0) >= self.limits.suspect_deaths

    def _trusted(self, worker: int) -> bool:
        """Its engines have answered something, or nobody's have."""
        proven = any(known.answered for known in self.workers.values() if known.state is not WorkerState.GONE)
        return bool(self.workers[worker].answered) or not proven

    def _in_time(self, worker: int, index: int, now: float) -> bool:
        return self.horizon.in_time(worker, self.steps[index], now)

    def _nothing_in_time(self, now: float) -> bool:
        ready = [worker for worker, known in self.workers.items() if known.state is WorkerState.READY]
        if not ready or not self.steps:
            return False
        shortest = min(self.steps.values())
        return not any(self.horizon.in_time(worker, shortest, now) for worker in ready)

    def _all_in_time(self, now: float) -> bool:
        """Whether time keeps nobody from starting anything."""
        ready = [worker for worker, known in self.workers.items() if known.state is WorkerState.READY]
        unstarted = self.live - self.started
        return all(self._in_time(worker, index, now) for worker in ready for index in unstarted)

    # ------------------------------------------------------------ requests change hands

    def _next_attempt(self, index: int, *, of_copy: bool = False) -> None:
        self.highest[index] += 1
        if not of_copy:
            self.attempt[index] = self.highest[index]

    def _promote(self, index: int) -> None:
        self.owner[index], self.attempt[index] = self.copy.pop(index)
        self.started.discard(index)
        self.started_at.pop(index, None)
        if index in self.copy_started_at:
            self.started_at[index] = self.copy_started_at.pop(index)
        if index in self.copy_started:
            self.copy_started.discard(index)
            self.started.add(index)
        elif self.draining:
            self.promoted.add(index)

    def _end(self, index: int) -> None:
        assert index not in self.ended, f"request {index} ended twice"
        self.ended.add(index)
        self.live.discard(index)
        self.owner.pop(index, None)
        self.started.discard(index)

    def _disown(self, worker: int) -> None:
        for index in [index for index, (copy, _) in self.copy.items() if copy == worker]:
            del self.copy[index]
            self.copy_started.discard(index)
            self.copy_started_at.pop(index, None)
        for index in [index for index, owner in self.owner.items() if owner == worker]:
            if index in self.copy:
                self._promote(index)
                continue
            del self.owner[index]
            self.started.discard(index)
            self.started_at.pop(index, None)
        self.recalls = {number: recall for number, recall in self.recalls.items() if recall[0] != worker}
        self._abandon_waiting()

    def _abandon_waiting(self) -> None:
        if self.draining:
            self.accepted -= len(self.live) - len(self.owner)
            self.live &= self.owner.keys()
