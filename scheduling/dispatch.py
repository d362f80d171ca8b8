"""Who gets what next: requests that wait go to workers with room, and unstarted ones move from full to idle.

The rules:

- A worker is to own its slots plus a backlog (its *target*), so that it never waits for rank 0. The backlog is a
  share of its slots, or what it finishes within a short horizon at its measured rate, whichever is more.
- A worker below its target is *hungry*. Hungry workers are fed from what waits, the emptiest first, in the order
  that the policy says. What waits covers all targets once, so that a report is answered with work at once.
- When nothing waits and slots are free, a policy that steals recalls unstarted requests from the workers with the
  most estimated tokens a slot. Stealing is a transaction: a victim is asked (`recall`), what it confirms not to
  have started waits again and is fed to whoever is hungry, the rest stays with it (`settle`). A victim has one
  recall open at most.
- A request that several engines died with is handed out last, to run alone (`scheduling.suspects`).
- When the input has ended while workers still load, nobody takes more than a fair share of what is left: without
  it the first worker to be ready would take all of a short input.
- Before a time limit only what is expected to end in time is handed out (`scheduling.deadline`).
- When no free slot anywhere could find unstarted work the workers are told (`Exhausted`), and when there is some
  again.

The dispatcher decides over the ledger's books and the policy's queue, and emits instructions. It knows no events:
`scheduling.control` tells it what has changed, one method for each kind of change, and asks `dispatch` what follows.
While input is open and all workers are busy, nothing here grows with the number of workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from scheduling.deadline import Deadline
from scheduling.errors import ProtocolError
from scheduling.events import Assign, Exhausted, Instruction, Recall
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry, WorkerState, must
from scheduling.limits import Limits
from scheduling.policies import Policy
from scheduling.suspects import Suspects

RATE_WINDOW_S = 0.05
"""A worker's rate is measured over windows of at least this long."""

TURNS_AHEAD = 16
"""Round-robin behind a slow worker: how many more turns are read at a time for those through with theirs."""


@dataclass(frozen=True, slots=True)
class _OpenRecall:
    victim: int
    indexes: list[int]
    since: float


class Dispatcher:
    """See the module's text. Every worker of the ledger is expected, and JOINING."""

    def __init__(self, ledger: Ledger, policy: Policy[RequestEntry], limits: Limits, first_recall: int = 0) -> None:
        self._ledger = ledger
        self._policy = policy
        self._limits = limits
        self._hungry: dict[int, None] = {}
        self._loading: set[int] = set()
        self.target = 0
        """How many requests all workers together are to own."""
        self._recalls: dict[int, _OpenRecall] = {}
        self.next_recall = first_recall
        self._said_exhausted = False
        self.horizon = Horizon()
        self.deadline = Deadline(ledger, policy, self.horizon)
        self.suspects = Suspects(ledger, policy, limits, self.deadline, self.note_room)
        for worker in ledger.workers.values():
            self.worker_joined(worker)

    # ------------------------------------------------------------ workers come, load and leave

    def worker_joined(self, worker: WorkerEntry) -> None:
        """A worker belongs to the run, or does again. Its engine is still to load."""
        self._loading.add(worker.id)
        self.target += worker.target
        self._policy.worker_joined(worker.id)

    def worker_ready(self, worker: WorkerEntry) -> None:
        """The engine of a worker that has joined is loaded; its slots are known."""
        self._loading.discard(worker.id)
        self._retarget(worker)
        self.note_room(worker)

    def worker_loading(self, worker: WorkerEntry) -> None:
        """The worker loads an engine again. It owns nothing."""
        self._withdraw(worker)
        self._loading.add(worker.id)

    def worker_left(self, worker: WorkerEntry) -> None:
        """The worker takes no more work. It owns nothing."""
        self._withdraw(worker)
        self._loading.discard(worker.id)
        self.target -= worker.target
        self._policy.worker_left(worker.id)

    def _withdraw(self, worker: WorkerEntry) -> None:
        """Neither feed the worker nor expect an answer to its recalls."""
        worker.apart = False
        self._hungry.pop(worker.id, None)
        for number in [number for number, recall in self._recalls.items() if recall.victim == worker.id]:
            del self._recalls[number]

    # ------------------------------------------------------------ room and rates

    def note_room(self, worker: WorkerEntry) -> None:
        """What the worker owns has changed."""
        worker.apart = worker.apart and worker.owned > 0
        if worker.state is WorkerState.READY and worker.owned < worker.target and not worker.apart:
            self._hungry[worker.id] = None
        else:
            self._hungry.pop(worker.id, None)

    def note_finished(self, worker: WorkerEntry, count: int, now: float) -> None:
        """The worker has finished `count` requests: the last two windows of its rate weigh the same."""
        self.suspects.note_answer()
        worker.rate_count += count
        elapsed_s = now - worker.rate_since
        if elapsed_s >= RATE_WINDOW_S:
            worker.rate = 0.5 * worker.rate + 0.5 * worker.rate_count / elapsed_s
            worker.rate_since = now
            worker.rate_count = 0
            self._retarget(worker)

    def _retarget(self, worker: WorkerEntry) -> None:
        """How many requests a worker should own, after its slots or its rate have changed."""
        least = max(1, worker.slots // 4) if self._limits.prefetch is None else self._limits.prefetch
        ahead = max(least, math.ceil(worker.rate * self._limits.prefetch_horizon_s))
        target = worker.slots + min(self._limits.prefetch_max, ahead)
        self.target += target - worker.target
        worker.target = target

    def wanted(self) -> int:
        """How many more requests should be read so that no worker waits."""
        waiting = self._policy.waiting()
        wanted = self.target - waiting
        if wanted <= 0 and any(self._policy.starving(worker) for worker in self._hungry):
            wanted = TURNS_AHEAD * len(self._ledger.workers)
        return max(0, min(wanted, self._limits.waiting - waiting))

    # ------------------------------------------------------------ what waits

    @property
    def waiting(self) -> int:
        """All waiting requests, suspects too."""
        return self._policy.waiting() + len(self.suspects)

    def put_back(self, requests: Iterable[RequestEntry]) -> None:
        """Requests that had an owner wait again."""
        self._policy.put_back(self.suspects.keep(requests))

    def clear(self) -> list[RequestEntry]:
        """Forget and return all waiting requests."""
        return [*self._policy.clear(), *self.suspects.clear()]

    # ------------------------------------------------------------ what to do next

    def dispatch(self, now: float, input_ended: bool, out: list[Instruction]) -> None:
        """Instruct all that follows from what has changed. `input_ended`: nothing more will arrive."""
        if self._hungry:
            cap = self._fair_cap(input_ended)
            if self.suspects.come_first:
                self._hand_out_suspects(now, out)
            if self._policy.waiting():
                self._feed(cap, now, out)
            if self._policy.steals and self._hungry and not self._policy.waiting():
                self._steal(cap, now, out)
            if self.suspects:
                self._hand_out_suspects(now, out)
        exhausted = input_ended and self._exhausted()
        if exhausted != self._said_exhausted:
            self._said_exhausted = exhausted
            out.append(Exhausted(exhausted))

    @property
    def exhausted(self) -> bool:
        """The workers have been told that no unstarted work is left, and none has come since."""
        return self._said_exhausted

    def _exhausted(self) -> bool:
        """No unstarted work is left that a free slot anywhere could take: all has a slot, or is about to."""
        if self._policy.waiting() or self._recalls:
            return False
        return self._ledger.unstarted == 0 or all(w.stealable <= 0 for w in self._ledger.workers.values())

    def _fair_cap(self, input_ended: bool) -> int:
        """Most requests one worker may own. Bounded only while others still load and the end is in sight."""
        if not input_ended or not self._loading:
            return self._limits.waiting
        workers = sum(worker.state is not WorkerState.GONE for worker in self._ledger.workers.values())
        return max(1, math.ceil(len(self._ledger.live) / workers))

    def _feed(self, cap: int, now: float, out: list[Instruction]) -> None:
        """Give waiting requests to workers with room, the emptiest (by share of its slots) first."""
        workers = self._ledger.workers
        rooms = [w for w in map(workers.__getitem__, self._hungry) if w.owned < cap and self._policy.available(w.id)]
        heap = [(worker.owned / worker.slots, worker.id) for worker in rooms]
        heapq.heapify(heap)
        given: dict[int, list[tuple[int, int]]] = {}
        stolen: dict[int, dict[int, int]] = {}
        while heap:
            worker = workers[heapq.heappop(heap)[1]]
            room = min(worker.target, cap) - worker.owned
            # One at a time while several compete; the last one takes all it has room for.
            for _ in range(min(room if not heap else 1, self._policy.available(worker.id))):
                request = self.deadline.take(worker, now, out)
                if request is None:
                    room = 0
                    break
                self._ledger.move(request, worker, Phase.QUEUED)
                given.setdefault(worker.id, []).append((request.index, request.attempt))
                if request.stolen_from is not None:
                    if request.stolen_from != worker.id:
                        stolen.setdefault(worker.id, {})[request.index] = request.stolen_from
                    self._count_steal(request, request.stolen_from, worker)
                room -= 1
            if room > 0 and self._policy.available(worker.id):
                heapq.heappush(heap, (worker.owned / worker.slots, worker.id))
        for worker_id, items in given.items():
            self.note_room(workers[worker_id])
            out.append(Assign(worker_id, items, stolen.get(worker_id, {})))

    def _hand_out_suspects(self, now: float, out: list[Instruction]) -> None:
        hungry = [self._ledger.workers[worker] for worker in self._hungry]
        self.suspects.hand_out(hungry, bool(self._recalls), now, out)

    # ------------------------------------------------------------ stealing

    def _steal(self, cap: int, now: float, out: list[Instruction]) -> None:
        """Recall unstarted work so that slots free elsewhere get their share of what the most loaded hold.

        What a victim confirms comes back to the front of the queue and `_feed` deals it. A victim that does not
        answer for a while no longer keeps the free slots from looking elsewhere.
        """
        workers = self._ledger.workers
        free = sum(max(0, min(w.slots, cap) - w.owned) for w in map(workers.__getitem__, self._hungry))
        patience = now - self._limits.recall_patience_s
        free -= sum(len(recall.indexes) for recall in self._recalls.values() if recall.since > patience)
        if free <= 0:
            return
        asked = {recall.victim for recall in self._recalls.values()}
        victims = [
            w for w in workers.values() if w.state is WorkerState.READY and w.stealable > 0 and w.id not in asked
        ]
        victims.sort(key=lambda w: w.load_tokens / w.slots, reverse=True)
        for victim in victims:
            if free <= 0:
                return
            queued = victim.unstarted()
            stealable = min(victim.stealable, len(queued))
            if stealable <= 0:
                continue
            count = min(free, math.ceil(stealable * free / (free + victim.slots)))
            # In the order of assignment, which is that of starting: what is about to start would not come back.
            first = len(queued) - stealable
            first += min(int(victim.rate * self._limits.recall_margin_s), stealable - count)
            indexes = queued[first : first + count]
            if self.horizon.end_at is not None:
                indexes = [index for index in indexes if self._thief_in_time(victim.queued[index], now)]
            if indexes:
                self.recall(victim, indexes, now, out)
                free -= len(indexes)

    def _thief_in_time(self, request: RequestEntry, now: float) -> bool:
        """Whether a worker with room would end it in time: else it would only come back."""
        return any(self.horizon.in_time(worker, request.steps, now) for worker in self._hungry)

    def recall(self, victim: WorkerEntry, indexes: list[int], now: float, out: list[Instruction]) -> None:
        """Ask the victim to give back these of its queued requests, as far as it has not started them."""
        for index in indexes:
            self._ledger.move(victim.queued[index], victim, Phase.RECALLED)
        self._recalls[self.next_recall] = _OpenRecall(victim.id, indexes, now)
        out.append(Recall(victim.id, self.next_recall, indexes))
        self.next_recall += 1
        self._ledger.totals.recalls += 1

    def settle(self, worker: WorkerEntry, number: int, confirmed: Iterable[int]) -> list[RequestEntry]:
        """Close a recall: what the victim confirms is nobody's and is returned; what it keeps has started.

        Empty for a recall that is settled already: a duplicate, or the victim was lost meanwhile.

        Raises:
            ProtocolError: no correct victim says this. Nothing has changed.
        """
        if not 0 <= number < self.next_recall:
            raise ProtocolError(f"rank {worker.id} confirms recall {number}, which was never sent")
        recall = self._recalls.get(number)  # None also for one below `first_recall`: an earlier input's
        if recall is None:
            return []
        if recall.victim != worker.id:
            raise ProtocolError(f"rank {worker.id} confirms recall {number} of rank {recall.victim}")
        returned = set(confirmed)
        if wrong := (returned & worker.running.keys()) | returned.difference(recall.indexes):
            raise ProtocolError(
                f"rank {worker.id} gives back {sorted(wrong)}, which it has started or was not asked for"
            )
        del self._recalls[number]
        back = []
        for index in recall.indexes:
            request = worker.recalled.get(index)
            if request is None:
                continue  # it started or ended meanwhile: its report came first
            if index in returned:
                self._ledger.move(request, None, Phase.WAITING)
                request.stolen_from = worker.id
                back.append(request)
            else:
                self._ledger.move(request, worker, Phase.RUNNING)
        return back

    def _count_steal(self, request: RequestEntry, victim: int, thief: WorkerEntry) -> None:
        """A recalled request has a new owner; a victim that gets its own back has lost nothing."""
        if victim != thief.id:
            thief.stolen_in += 1
            self._ledger.workers[victim].stolen_out += 1
            self._ledger.totals.stolen += 1
        request.stolen_from = None

    # ------------------------------------------------------------ invariants

    def check(self) -> None:
        """Verify what is kept here against the books, linear in what lives.

        Raises:
            BugError: something does not add up.
        """
        ledger = self._ledger
        waiting = sum(request.phase is Phase.WAITING for request in ledger.live.values())
        must(waiting == self.waiting, "the policy has lost or invented requests")
        self.suspects.check()
        target = 0
        asked = {index for recall in self._recalls.values() for index in recall.indexes}
        for worker in ledger.workers.values():
            room = worker.state is WorkerState.READY and worker.owned < worker.target and not worker.apart
            must(not room or worker.id in self._hungry, f"rank {worker.id} has room and is forgotten")
            must(worker.state is WorkerState.READY or worker.id not in self._hungry, f"rank {worker.id} is fed")
            loading = worker.state is WorkerState.JOINING
            must(loading == (worker.id in self._loading), f"whether rank {worker.id} still loads is off")
            target += 0 if worker.state is WorkerState.GONE else worker.target
            must(asked.issuperset(worker.recalled), f"rank {worker.id} holds a recalled request of no recall")
        must(target == self.target, "the sum of the workers' targets is off")
