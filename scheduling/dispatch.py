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
- A request that several engines died with is a *suspect* (`Limits.suspect_deaths`). It waits until a worker owns
  nothing and there is nothing else for it, and is run there alone: then what becomes of the engine says whether the
  request is to blame, and those that ran beside it are not failed with it. Nobody is kept idle for it earlier, unless
  engines die and die and nothing is answered in between: then suspects come first, because workers do not restart
  engines for ever. While some worker has answered anything, one that never has is given no suspect: its engine itself
  may be what is broken. While none has, few suspects come first, for the same reason.
- When the input has ended while workers still load, nobody takes more than a fair share of what is left: without
  it the first worker to be ready would take all of a short input.
- Before a time limit a worker is given, and keeps, only what it is expected to end in time (`scheduling.horizon`).
  What waits first and could not end in time anywhere is set aside, and the next one is looked at.
- When no free slot anywhere could find unstarted work the workers are told (`Exhausted`), and when there is some
  again.

The dispatcher decides over the ledger's books and the policy's queue, and emits instructions. It knows no events:
`scheduling.control` tells it what has changed, one method for each kind of change, and asks `dispatch` what follows.
While input is open and all workers are busy, nothing here grows with the number of workers.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from scheduling.errors import ProtocolError
from scheduling.events import Assign, Exhausted, GiveUp, Instruction, Recall
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry, WorkerState, must
from scheduling.limits import Limits
from scheduling.policies import Policy

RATE_WINDOW_S = 0.05
"""A worker's rate is measured over windows of at least this long."""

FRUITLESS_DEATHS = 4
"""After so many deaths of engines with no answer of anybody in between suspects come first: fewer than a worker
survives (`workers.care.RESTARTS_MAX`), so that each start of a run answers or fails something."""
UNPROVEN_TRIES = 2
"""So many suspects come first where nobody has answered anything yet."""

TURNS_AHEAD = 16
"""Round-robin behind a slow worker: how many more turns are read at a time for those through with theirs."""

SET_ASIDE_MAX = 1024
"""Before a time limit: after so many requests in a row that would be too late, no shorter one is looked for."""


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
        self._target = 0
        self._recalls: dict[int, _OpenRecall] = {}
        self.next_recall = first_recall
        self.horizon = Horizon()
        self._said_exhausted = False
        self._suspects: deque[RequestEntry] = deque()
        self._fruitless = 0
        """Deaths of engines since the last answer."""
        self._wary = False
        """Suspects come first, as long as there are any."""
        self._unproven_tries = 0
        for worker in ledger.workers.values():
            self.worker_joined(worker)

    # ------------------------------------------------------------ workers come, load and leave

    def worker_joined(self, worker: WorkerEntry) -> None:
        """A worker belongs to the run, or does again. Its engine is still to load."""
        self._loading.add(worker.id)
        self._target += worker.target
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
        self._target -= worker.target
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
        self._fruitless = 0
        worker.rate_count += count
        elapsed_s = now - worker.rate_since
        if elapsed_s >= RATE_WINDOW_S:
            worker.rate = 0.5 * worker.rate + 0.5 * worker.rate_count / elapsed_s
            worker.rate_since = now
            worker.rate_count = 0
            self._retarget(worker)

    def note_death(self) -> None:
        """An engine has died with requests. To be told before these are put back."""
        self._fruitless += 1

    def _retarget(self, worker: WorkerEntry) -> None:
        """How many requests a worker should own, after its slots or its rate have changed."""
        least = max(1, worker.slots // 4) if self._limits.prefetch is None else self._limits.prefetch
        ahead = max(least, math.ceil(worker.rate * self._limits.prefetch_horizon_s))
        target = worker.slots + min(self._limits.prefetch_max, ahead)
        self._target += target - worker.target
        worker.target = target

    def wanted(self) -> int:
        """How many more requests should be read so that no worker waits."""
        waiting = self._policy.waiting()
        wanted = self._target - waiting
        if wanted <= 0 and any(self._policy.starving(worker) for worker in self._hungry):
            wanted = TURNS_AHEAD * len(self._ledger.workers)
        return max(0, min(wanted, self._limits.waiting - waiting))

    # ------------------------------------------------------------ what waits

    @property
    def waiting(self) -> int:
        """All waiting requests, suspects too."""
        return self._policy.waiting() + len(self._suspects)

    def put_back(self, requests: Iterable[RequestEntry]) -> None:
        """Requests that had an owner wait again."""
        again = []
        for request in requests:
            if request.deaths < self._limits.suspect_deaths:
                again.append(request)
            else:
                self._suspects.append(request)
                self._wary = self._wary or self._fruitless >= FRUITLESS_DEATHS
        self._policy.put_back(again)

    def clear(self) -> list[RequestEntry]:
        """Forget and return all waiting requests."""
        left = [*self._policy.clear(), *self._suspects]
        self._suspects.clear()
        self._wary = False
        return left

    # ------------------------------------------------------------ what to do next

    def dispatch(self, now: float, input_ended: bool, out: list[Instruction]) -> None:
        """Instruct all that follows from what has changed. `input_ended`: nothing more will arrive."""
        if self._hungry:
            cap = self._fair_cap(input_ended)
            if self._wary:
                self._try_suspects(now, out)
            if self._policy.waiting():
                self._feed(cap, now, out)
            if self._policy.steals and self._hungry and not self._policy.waiting():
                self._steal(cap, now, out)
            if self._suspects:
                self._try_suspects(now, out)
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
                request = self._take(worker, now, out)
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

    def _try_suspects(self, now: float, out: list[Instruction]) -> None:
        """Give a suspect each to workers that own nothing and could be given nothing else, or should not."""
        workers = self._ledger.workers
        proven = any(w.requests for w in workers.values() if w.state is not WorkerState.GONE)
        for worker in [workers[worker] for worker in self._hungry]:
            if not self._suspects:
                break
            if worker.owned or (proven and not worker.requests):
                continue
            if self._policy.available(worker.id):
                if not self._wary or (not proven and self._unproven_tries >= UNPROVEN_TRIES):
                    continue
                self._unproven_tries += not proven
            elif self._recalls:
                continue  # what comes back may be for it
            request = self._suspect_in_time(worker, now, out)
            if request is None:
                continue
            worker.apart = True
            self._ledger.move(request, worker, Phase.QUEUED)
            self.note_room(worker)
            out.append(Assign(worker.id, [(request.index, request.attempt)]))
        self._wary = self._wary and bool(self._suspects)

    def _suspect_in_time(self, worker: WorkerEntry, now: float, out: list[Instruction]) -> RequestEntry | None:
        """The first suspect; None if the worker would not end it in time. What nobody would is set aside."""
        while self._suspects:
            request = self._suspects[0]
            if self.horizon.in_time(worker.id, request.steps, now):
                return self._suspects.popleft()
            if self._in_time_somewhere(worker, request, now):
                return None
            self._set_aside([self._suspects.popleft()], out)
        return None

    # ------------------------------------------------------------ before a time limit

    def _take(self, worker: WorkerEntry, now: float, out: list[Instruction]) -> RequestEntry | None:
        """The next request for the worker; None if it has none that it would end in time."""
        horizon = self.horizon
        if horizon.end_at is None:
            return self._policy.take(worker.id)
        found = None
        aside = []
        while self._policy.available(worker.id):
            request = self._policy.peek(worker.id)
            if horizon.in_time(worker.id, request.steps, now, self._wait_s(worker, request, now)):
                found = self._policy.take(worker.id)
                horizon.set_aside_since = 0
                break
            if self._in_time_somewhere(worker, request, now):
                break
            aside.append(self._policy.take(worker.id))
        if aside:
            horizon.set_aside_since += len(aside)
            self._set_aside(aside, out)
        return found

    def _set_aside(self, requests: list[RequestEntry], out: list[Instruction]) -> None:
        """Waiting requests that nobody would end in time leave."""
        for request in requests:
            self._ledger.abandon(request)
        self._ledger.totals.set_aside += len(requests)
        out.append(GiveUp(None, [(request.index, request.attempt) for request in requests]))

    def _wait_s(self, worker: WorkerEntry, request: RequestEntry, now: float) -> float:
        """How long the request would wait for a slot of the worker. Others are taken to be as much prompt as it is."""
        before = len(worker.queued) + len(worker.recalled)
        if worker.owned < worker.slots or not before:
            return 0.0
        tokens = worker.load_tokens * before / worker.owned / worker.slots
        return self.horizon.expected_s(worker.id, tokens * request.steps / request.cost, now)

    def _in_time_somewhere(self, worker: WorkerEntry, request: RequestEntry, now: float) -> bool:
        """Whether the request would end in time on a free slot of this worker, or of another one that may have it."""
        others = self._ledger.workers.values() if self._policy.steals else (worker,)
        return any(w.state is WorkerState.READY and self.horizon.in_time(w.id, request.steps, now) for w in others)

    def recall_late(self, now: float, out: list[Instruction]) -> None:
        """Recall what is queued and would not end in time any more, even if it started now."""
        horizon = self.horizon
        for worker in self._ledger.workers.values():
            if not worker.queued or horizon.in_time(worker.id, horizon.longest, now):
                continue
            steps = ((index, worker.queued[index].steps) for index in unstarted(worker))
            late = [index for index, wanted in steps if not horizon.in_time(worker.id, wanted, now)]
            if late:
                self.recall(worker, late, now, out)

    def nothing_in_time(self, now: float) -> bool:
        """Whether nothing more can start: not even the shortest that has come, or none of very many in a row."""
        horizon = self.horizon
        if horizon.set_aside_since >= max(SET_ASIDE_MAX, 4 * self._target):
            return True
        ready = [w.id for w in self._ledger.workers.values() if w.state is WorkerState.READY]
        if not ready or math.isinf(horizon.shortest):
            return False
        return not any(horizon.in_time(worker, horizon.shortest, now) for worker in ready)

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
            queued = unstarted(victim)
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
        must(not self._wary or bool(self._suspects), "suspects come first though there are none")
        target = 0
        asked = {index for recall in self._recalls.values() for index in recall.indexes}
        for worker in ledger.workers.values():
            suspects = sum(request.deaths >= self._limits.suspect_deaths for request in worker.holdings())
            must(
                suspects == worker.apart and (not suspects or worker.owned == 1), f"rank {worker.id} runs no one alone"
            )
            room = worker.state is WorkerState.READY and worker.owned < worker.target and not worker.apart
            must(not room or worker.id in self._hungry, f"rank {worker.id} has room and is forgotten")
            must(worker.state is WorkerState.READY or worker.id not in self._hungry, f"rank {worker.id} is fed")
            loading = worker.state is WorkerState.JOINING
            must(loading == (worker.id in self._loading), f"whether rank {worker.id} still loads is off")
            target += 0 if worker.state is WorkerState.GONE else worker.target
            must(asked.issuperset(worker.recalled), f"rank {worker.id} holds a recalled request of no recall")
        must(target == self._target, "the sum of the workers' targets is off")


def unstarted(worker: WorkerEntry) -> list[int]:
    """What a worker has queued, in its order, but for copies of what runs elsewhere: those stay where they are."""
    return [index for index, request in worker.queued.items() if request.twin is None]
