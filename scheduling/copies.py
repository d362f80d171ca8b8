"""Copies of stragglers: near the end, what runs on a slow worker is started again on an idle one.

When no unstarted work is left anywhere, a run takes as long as its slowest requests, and stealing cannot help those:
they run. A worker with a free slot is then given a second attempt of a request that is expected to end sooner there,
from its beginning, and the first answer counts. Of the two entries that the request has in the ledger
(`RequestEntry.twin`) the one that answers first is recorded, the other's worker is told to cancel, and what still comes
of it is late. An entry whose engine or worker dies leaves the other alone: then that one is the request.

What is expected comes from measurements alone:

- The *pace* of a worker: seconds of a sequence for each output token it makes, reading its prompt included. It is the
  integral of the worker's running requests over time, over the tokens it reports to have made meanwhile.
- How many tokens a request has: the time since it started, over the pace. How many it will have: the mean of those
  requests that became longer than that (`estimates.Tail`).

A copy from the beginning has to overtake: it wins only if the request becomes long enough. The gain is the mean, over
how long it may become, of the time by which it wins. It has to be worth it (`Limits.copy_gain_s`, `copy_gain_share`):
workers of the same speed never copy from each other. Before a time limit a copy has to be expected to end in time, like
everything else that starts (`scheduling.horizon`). Not copied are requests an engine has died with, and those of
a worker that has been silent: whether that one is lost its lease decides.

This module decides over the ledger's books and what it is told of reports. It knows no events and no policy.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from scheduling.errors import BugError
from scheduling.estimates import LengthEstimator, Tail
from scheduling.events import Assign, Cancel, Instruction
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, RequestEntry, WorkerEntry, WorkerState
from scheduling.limits import Limits
from scheduling.messages import Finished

WINDOW_TOKENS = 16
"""A pace is measured over this many tokens at least."""
STALL_S = 5.0
"""A worker that runs requests and has reported no tokens for this long is as slow as that, whatever it was before."""
SILENT_S = 5.0
"""A worker that has said nothing at all for this long may be dead."""
REQUESTS_A_LOOK = 1000
"""For every so many requests that were looked at, the next look comes an interval later."""
TOLD_MAX = 4096
"""Copies that are told of one by one; all are counted."""


@dataclass(slots=True)
class Copied:
    """One copy, attempt `attempt` of a request, made at `worker` of what ran at `source`.

    `won`: it answered first; None while nobody has, and where one of the two was lost before.
    """

    index: int
    attempt: int
    worker: int
    source: int
    made_at: float
    answered_at: float | None = None
    won: bool | None = None


class _Pace:
    """Of one worker. `value`: seconds of a sequence for an output token, the last two windows weigh the same."""

    __slots__ = ("value", "_at", "_since", "_sequence_s", "_tokens")

    def __init__(self, now: float) -> None:
        self.value: float | None = None
        self._at = self._since = now
        self._sequence_s = 0.0
        self._tokens = 0

    def note(self, running: int, made_tokens: int, now: float) -> None:
        """`running` requests ran until now; tokens are reported when the worker has counted them."""
        if not running:
            self._since = now
        self._sequence_s += running * (now - self._at)
        self._at = now
        self._tokens += made_tokens
        if made_tokens and self._tokens >= WINDOW_TOKENS:
            window = self._sequence_s / self._tokens
            self.value = window if self.value is None else 0.5 * self.value + 0.5 * window
            self._since, self._sequence_s, self._tokens = now, 0.0, 0

    def at(self, running: int, now: float) -> float | None:
        """What it is now; None if nothing is known."""
        if running and now - self._since > STALL_S:
            sequence_s = self._sequence_s + running * (now - self._at)
            return max(self.value or 0.0, sequence_s / max(1, self._tokens))
        return self.value


class Copier:
    """See the module's text. `note_room` is told of workers whose number of requests has changed."""

    def __init__(
        self,
        ledger: Ledger,
        lengths: LengthEstimator,
        limits: Limits,
        horizon: Horizon,
        note_room: Callable[[WorkerEntry], None],
    ) -> None:
        self._ledger = ledger
        self._lengths = lengths
        self._limits = limits
        self._horizon = horizon
        self._note_room = note_room
        self._paces: dict[int, _Pace] = {}
        self._next_look = 0.0
        self._guessed: dict[tuple[int, int, int], int] = {}
        self.told: list[Copied] = []
        """The first TOLD_MAX of all copies."""
        self._open: dict[tuple[int, int], Copied] = {}
        """Those of them that nobody has answered, by index and attempt."""

    # ------------------------------------------------------------ what has happened

    def note_report(self, worker: WorkerEntry, made_tokens: int, now: float) -> None:
        """A worker has reported; what the report says of its requests is not in the books yet."""
        pace = self._paces.get(worker.id)
        if pace is None:
            pace = self._paces[worker.id] = _Pace(now)
        pace.note(len(worker.running), made_tokens, now)

    def note_late(self, worker: WorkerEntry, answer: Finished) -> None:
        """An answer came late. If it was cancelled, it says what that has cost."""
        guessed = self._guessed.pop((worker.id, answer.index, answer.attempt), None)
        if guessed is not None:
            self._ledger.totals.wasted_tokens += answer.output_tokens - guessed

    def answered(self, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        """One of two entries has ended the request: the other leaves the books, and its worker is to stop."""
        loser = request.twin
        if loser is None or loser.owner is None:
            raise BugError(f"{request} has no twin")
        pace = self._pace(self._ledger.workers[loser.owner], now)
        guessed = int((now - loser.started_at) / pace) if pace and loser.started_at is not None else 0
        self._guessed[loser.owner, loser.index, loser.attempt] = guessed
        self._ledger.totals.wasted_tokens += guessed
        won = request.attempt > loser.attempt
        self._ledger.totals.copies_won += won
        copied = self._open.pop((request.index, max(request.attempt, loser.attempt)), None)
        if copied is not None:
            copied.answered_at, copied.won = now, won
        self._ledger.part(loser)
        self._note_room(self._ledger.workers[loser.owner])
        out.append(Cancel(loser.owner, [(loser.index, loser.attempt)]))

    # ------------------------------------------------------------ what to copy

    def dispatch(self, now: float, out: list[Instruction]) -> None:
        """Give free slots copies of what would end sooner in them. To be asked when no unstarted work is left."""
        if now < self._next_look:
            return
        self._next_look = now + self._limits.copy_interval_s
        free = self._free(now)
        if not free:
            return
        tail = self._lengths.tail()
        slow = self._stragglers(free[0][0], tail, now)
        given: dict[int, list[tuple[int, int]]] = {}
        for left_s, _, request, pace in heapq.nlargest(sum(slots for _, slots, _ in free), slow):
            others = (place for place, (_, slots, worker) in enumerate(free) if slots and worker.id != request.owner)
            if (place := next(others, None)) is None:
                continue
            there, slots, worker = free[place]
            if not self._is_worth(self._gain_s(request, pace, there, tail, now), left_s):
                continue
            if not self._horizon.in_time(worker.id, request.steps, now):
                continue
            free[place] = (there, slots - 1, worker)
            copy = self._ledger.copy(request, worker)
            self._ledger.totals.copies += 1
            self._tell(copy, worker, request.owner, now)
            given.setdefault(worker.id, []).append((copy.index, copy.attempt))
        for worker_id, items in given.items():
            self._note_room(self._ledger.workers[worker_id])
            out.append(Assign(worker_id, items))

    def _tell(self, copy: RequestEntry, worker: WorkerEntry, source: int | None, now: float) -> None:
        if source is not None and len(self.told) < TOLD_MAX:
            copied = Copied(copy.index, copy.attempt, worker.id, source, now)
            self.told.append(copied)
            self._open[copy.index, copy.attempt] = copied

    def _free(self, now: float) -> list[tuple[float, int, WorkerEntry]]:
        """Workers with free slots, the fastest first: pace, number of free slots, worker."""
        free = []
        for worker in self._ledger.workers.values():
            slots = worker.slots - worker.owned
            pace = self._pace(worker, now)
            fit = worker.state is WorkerState.READY and not worker.apart and now - worker.heard <= SILENT_S
            if fit and slots > 0 and pace:
                free.append((pace, slots, worker))
        return sorted(free, key=lambda one: (one[0], one[2].id))

    def _stragglers(self, best: float, tail: Tail, now: float) -> list[tuple[float, int, RequestEntry, float]]:
        """Requests that run where a pace of `best` could be worth a copy: time left, order, request, pace."""
        found = []
        looked_at = 0
        for worker in self._ledger.workers.values():
            pace = self._pace(worker, now)
            if not worker.running or not pace or now - worker.heard > SILENT_S:
                continue
            if pace * (1 - self._limits.copy_gain_share) <= best:
                continue
            looked_at += len(worker.running)
            for request in worker.running.values():
                if request.twin is None and not request.history:
                    left_s = self._left_s(request, pace, tail, now)
                    if self._is_worth(self._gain_s(request, pace, best, tail, now), left_s):
                        found.append((left_s, -request.index, request, pace))
        self._next_look += self._limits.copy_interval_s * (looked_at // REQUESTS_A_LOOK)
        return found

    def _is_worth(self, gain_s: float, left_s: float) -> bool:
        return gain_s >= self._limits.copy_gain_s and gain_s >= self._limits.copy_gain_share * left_s

    def _left_s(self, request: RequestEntry, pace: float, tail: Tail, now: float) -> float:
        """How long it is expected to go on where it runs."""
        whole_s = pace * self._lengths.ceiling(request.limit)
        if not whole_s or request.started_at is None:
            return 0.0
        ran_s = now - request.started_at
        made = ran_s / whole_s
        count, total = tail.beyond(made)
        return whole_s * (total / count if count else tail.unheard_of(made)) - ran_s

    def _gain_s(self, request: RequestEntry, pace: float, there: float, tail: Tail, now: float) -> float:
        """By how much sooner it is expected to end if it also runs from its beginning at the pace `there`.

        With a share u of its limit made and x in the end it would take `pace` times x - u, and there `there` times x:
        less where x is beyond u `pace` / (`pace` - `there`). The mean over all x beyond u; where it does not win
        nothing is gained.
        """
        ceiling = self._lengths.ceiling(request.limit)
        if not ceiling or request.started_at is None or pace <= there:
            return 0.0
        made = (now - request.started_at) / (pace * ceiling)
        count, _ = tail.beyond(made)
        wins, total = tail.beyond(made * pace / (pace - there))
        if not count:
            count, wins, total = 1, 1, tail.unheard_of(made)
        return ceiling * max(0.0, (pace - there) * total - pace * made * wins) / count

    def _pace(self, worker: WorkerEntry, now: float) -> float | None:
        pace = self._paces.get(worker.id)
        return None if pace is None else pace.at(len(worker.running), now)
