"""Before a time limit: what may still start, what is set aside, what is to come back because it would be late.

A worker is given, and keeps, only what it is expected to end in time; how long that takes `scheduling.horizon` knows.
What waits first and could not end in time anywhere is set aside, and the next one is looked at. Without a time limit
everything is in time.

The deadline decides over the ledger's books and the policy's queue. It knows no events, and hands nothing out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scheduling.events import GiveUp, Instruction
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, RequestEntry, WorkerEntry, WorkerState
from scheduling.policies import Policy

SET_ASIDE_MAX = 1024
"""After so many requests in a row that would be too late, no shorter one is looked for."""


class Deadline:
    """See the module's text. When it is, if it is, `horizon.end_at` says."""

    def __init__(self, ledger: Ledger, policy: Policy[RequestEntry], horizon: Horizon) -> None:
        self.horizon = horizon
        self._ledger = ledger
        self._policy = policy
        self._set_aside_since = 0
        """Requests that were set aside since one could be started."""

    def take(self, worker: WorkerEntry, now: float, out: list[Instruction]) -> RequestEntry | None:
        """The next request for the worker; None if it has none that it would end in time."""
        if self.horizon.end_at is None:
            return self._policy.take(worker.id)
        found = None
        aside = []
        while self._policy.available(worker.id):
            request = self._policy.peek(worker.id)
            if self.horizon.in_time(worker.id, request.steps, now, self._wait_s(worker, request, now)):
                found = self._policy.take(worker.id)
                self._set_aside_since = 0
                break
            if self.in_time_somewhere(worker, request, now):
                break
            aside.append(self._policy.take(worker.id))
        if aside:
            self._set_aside_since += len(aside)
            self.set_aside(aside, out)
        return found

    def set_aside(self, requests: list[RequestEntry], out: list[Instruction]) -> None:
        """Waiting requests that nobody would end in time leave."""
        for request in requests:
            self._ledger.abandon(request)
        self._ledger.totals.set_aside += len(requests)
        out.append(GiveUp(None, [(request.index, request.attempt) for request in requests]))

    def in_time(self, worker: WorkerEntry, request: RequestEntry, now: float) -> bool:
        """Whether the request would end in time if the worker started it now."""
        return self.horizon.in_time(worker.id, request.steps, now)

    def in_time_somewhere(self, worker: WorkerEntry, request: RequestEntry, now: float) -> bool:
        """Whether the request would end in time on a free slot of this worker, or of another one that may have it."""
        others = self._ledger.workers.values() if self._policy.steals else (worker,)
        return any(w.state is WorkerState.READY and self.in_time(w, request, now) for w in others)

    def late(self, now: float) -> Iterator[tuple[WorkerEntry, list[int]]]:
        """Workers with what they have queued and would not end in time any more, even if it started now.

        Looks through what a worker has queued only where its longest request is late or has left since the last look.
        """
        for worker in self._ledger.workers.values():
            if self.horizon.in_time(worker.id, worker.longest_queued, now):
                continue
            late = [index for index in worker.unstarted() if not self.in_time(worker, worker.queued[index], now)]
            if late:
                yield worker, late
            worker.longest_queued = max((request.steps for request in worker.queued.values()), default=0.0)

    def nothing_in_time(self, now: float, target: int) -> bool:
        """Whether nothing more can start: not even the shortest that has come, or none of very many in a row.

        `target`: how many requests all workers together are to own.
        """
        if self._set_aside_since >= max(SET_ASIDE_MAX, 4 * target):
            return True
        ready = [w.id for w in self._ledger.workers.values() if w.state is WorkerState.READY]
        if not ready or math.isinf(self.horizon.shortest):
            return False
        return not any(self.horizon.in_time(worker, self.horizon.shortest, now) for worker in ready)

    def _wait_s(self, worker: WorkerEntry, request: RequestEntry, now: float) -> float:
        """How long the request would wait for a slot of the worker. Others are taken to be as much prompt as it is."""
        before = len(worker.queued) + len(worker.recalled)
        if worker.owned < worker.slots or not before:
            return 0.0
        tokens = worker.load_tokens * before / worker.owned / worker.slots
        return self.horizon.expected_s(worker.id, tokens * request.steps / request.cost, now)
