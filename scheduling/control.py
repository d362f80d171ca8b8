"""The control plane: what has happened to whom, and what is to be done about it. A pure state machine.

`ControlPlane.handle(event, now) -> list[Instruction]` is the only thing that changes state. It never sees text, a
clock, a message or a file: requests are numbers with a size, time is an argument, and whoever calls it carries
out the instructions. Tests and simulations drive the very same object as a real run.

A request's life (a request that has ended is simply no longer in `live`):

    waiting ──assign──> queued ──start──> running ──finish──> ended
       ^                  │ ^                │
       │                recall              lose (attempt + 1; failed after too many engine deaths)
       │                  v                  │
       └───give back── recalled ─keep──> running
       └─────────────────────────────────────┘

Every request that is not waiting has exactly one owner. Near the end one that runs may have one copy besides, with an
owner and an attempt of its own: the first of the two that answers ends the request, and one that is lost leaves the
other alone. Answers are taken only from an owner and only for its attempt; everything else is late, dropped and
counted. Here is what events mean: attempts, deaths, acknowledgement. Who gets what next, stealing included, is
`scheduling.dispatch`'s to decide, what is copied `scheduling.copies`', and when a run is over `scheduling.ending`'s.

An illegal event raises `ProtocolError` and changes nothing. `check()` verifies all invariants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduling.copies import Copied, Copier
from scheduling.dispatch import Dispatcher
from scheduling.ending import Ending, Mode
from scheduling.errors import ProtocolError
from scheduling.estimates import LengthEstimator
from scheduling.events import (
    Committed,
    DrainRequested,
    Drop,
    EngineLost,
    Event,
    Fail,
    Heard,
    InputEnded,
    Instruction,
    NewRequest,
    RecallConfirmed,
    Record,
    Reported,
    RequestRejected,
    RequestsArrived,
    Stream,
    Tick,
    TimeLimited,
    WorkerLost,
    WorkerReady,
    WorkerReturned,
)
from scheduling.horizon import steps_of
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry, WorkerState, WorkerView, must
from scheduling.limits import Limits as Limits
from scheduling.policies import Policy, policy_named


class ControlPlane:
    """See the module's text. `workers` are the ids expected at the start; all are JOINING.

    Indexes begin at `first_index` or later: answers below it belong to an earlier plane and are late. So do
    confirmations of recalls below `first_recall`.
    """

    def __init__(
        self,
        workers: Iterable[int],
        schedule: str,
        now: float,
        *,
        limits: Limits | None = None,
        output_limit_default: int = 512,
        first_index: int = 0,
        first_recall: int = 0,
    ) -> None:
        self.limits = limits or Limits()
        self.estimator = LengthEstimator(output_limit_default)
        self._ledger = Ledger(workers, now, first_index)
        self.totals = self._ledger.totals
        self._policy: Policy[RequestEntry] = policy_named(schedule)  # type: ignore[assignment]
        self._dispatcher = Dispatcher(self._ledger, self._policy, self.limits, first_recall)
        self._copies = Copier(
            self._ledger, self.estimator, self.limits, self._dispatcher.horizon, self._dispatcher.note_room
        )
        self._ending = Ending(self._ledger, self._dispatcher)
        self._unacknowledged: list[bool] = []
        self._acknowledged = 0

    # ------------------------------------------------------------ the one way in

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; return what is to be done, in order.

        Raises:
            ProtocolError: no correct peer causes this event in this state. Nothing has changed.
        """
        out: list[Instruction] = []
        match event:
            case Reported():
                self._reported(event, now, out)
            case RequestsArrived():
                self._arrived(event.requests)
            case Committed():
                self._committed(event.count)
            case RecallConfirmed():
                self._recall_confirmed(event, now)
            case Heard():
                self._ledger.worker(event.worker).heard = now
            case Tick():
                self._tick(now, out)
            case WorkerReady():
                self._worker_ready(event, now)
            case EngineLost():
                self._engine_lost(event, now, out)
            case WorkerLost():
                self._worker_lost(self._ledger.worker(event.worker), event.reason, out)
            case WorkerReturned():
                self._worker_returned(self._ledger.worker(event.worker), now)
            case RequestRejected():
                self._rejected(event, out)
            case InputEnded():
                self._ending.end_input()
            case DrainRequested():
                self._ending.drain(event, now, out)
            case TimeLimited():
                self._ending.limit_time(event)
        if self.mode is Mode.OPEN:
            self._dispatcher.dispatch(now, self.input_ended, out)
            at_end = self._dispatcher.exhausted and not self._dispatcher.waiting
            if at_end and self._policy.steals and self.limits.copies:
                self._copies.dispatch(now, out)
        self._ending.stop_if_over(self.unacknowledged, out)
        return out

    # ------------------------------------------------------------ what others may ask

    @property
    def mode(self) -> Mode:
        return self._ending.mode

    @property
    def input_ended(self) -> bool:
        return self._ending.input_ended

    @property
    def finished(self) -> bool:
        return self.mode is Mode.STOPPED

    @property
    def next_recall(self) -> int:
        """The number of the next recall."""
        return self._dispatcher.next_recall

    @property
    def highest(self) -> int:
        """The highest index that has arrived."""
        return self._ledger.highest

    @property
    def waiting(self) -> int:
        return self._dispatcher.waiting

    @property
    def unacknowledged(self) -> int:
        """Answers handed to the record and not yet durable."""
        return len(self._unacknowledged) - self._acknowledged

    @property
    def running(self) -> int:
        """Requests of which an entry runs, copied or not."""
        return len(self._ledger.live) - self._ledger.unstarted

    @property
    def copies(self) -> Sequence[Copied]:
        """The copies of stragglers one by one, in the order in which they were made, up to a number of them."""
        return self._copies.told

    def workers(self) -> list[WorkerView]:
        return [worker.view() for worker in self._ledger.workers.values()]

    def wanted(self) -> int:
        """How many more requests should be read now: enough that no worker waits, and no more.

        0 while draining, after the input's end, or while the record is behind: that is how a slow disk
        throttles the reader.
        """
        if self.mode is not Mode.OPEN or self.input_ended or self.unacknowledged >= self.limits.unacknowledged:
            return 0
        return self._dispatcher.wanted()

    # ------------------------------------------------------------ events

    def _worker_ready(self, event: WorkerReady, now: float) -> None:
        worker = self._ledger.worker(event.worker)
        if worker.state is WorkerState.READY:
            raise ProtocolError(f"rank {event.worker} says 'ready' twice")
        if event.slots < 1:
            raise ProtocolError(f"rank {event.worker} says 'ready' with {event.slots} slots")
        if worker.state is WorkerState.GONE:
            self._dispatcher.worker_joined(worker)
        worker.state = WorkerState.READY
        worker.slots = event.slots
        worker.heard = worker.rate_since = now
        worker.reason = ""
        worker.silent = False
        self._dispatcher.worker_ready(worker)

    def _arrived(self, requests: list[NewRequest]) -> None:
        self._note_indexes([new.index for new in requests])
        if self.mode is not Mode.OPEN:
            return  # read before the drain was known: the next start of the run reads it again
        for new in requests:
            output_tokens = self.estimator.output_tokens(new.output_limit)
            steps = steps_of(new.prompt_tokens, output_tokens)
            request = RequestEntry(new.index, new.prompt_tokens + output_tokens, new.output_limit, steps)
            self._dispatcher.horizon.arrived(steps)
            self._ledger.add(request)
            self._policy.arrive(request)
        self.totals.accepted += len(requests)

    def _rejected(self, event: RequestRejected, out: list[Instruction]) -> None:
        self._note_indexes([event.index])
        if self.mode is not Mode.OPEN:
            return
        self.totals.rejected += 1
        self._unacknowledged.append(False)
        out.append(Fail(event.index, 1, "invalid_request", event.reason))

    def _note_indexes(self, arrived: list[int]) -> None:
        if self.input_ended:
            raise ProtocolError("a request arrived after the input's end")
        highest = self._ledger.highest
        for index in arrived:
            if index <= highest:
                raise ProtocolError(f"request {index} arrived after request {highest}: indexes must rise")
            highest = index
        self._ledger.highest = highest

    def _reported(self, event: Reported, now: float, out: list[Instruction]) -> None:
        worker = self._ledger.worker(event.worker)
        for index, _ in event.started:
            self._ledger.refuse_unseen(index, worker)
        for answer in event.finished:
            self._ledger.refuse_unseen(answer.index, worker)
        heard_before, worker.heard = worker.heard, now
        self._copies.note_report(worker, event.made_tokens, now)
        for index, attempt in event.started:
            request = self._ledger.owned(worker, index, attempt)
            if request is not None and request.phase is not Phase.RUNNING:
                self._ledger.move(request, worker, Phase.RUNNING)
                request.started_at = now
                self._dispatcher.horizon.started(now)
        deltas = [delta for delta in event.deltas if self._ledger.streams(worker, delta.index, delta.attempt)]
        if deltas:
            out.append(Stream(deltas))
        accepted, late = [], []
        for answer in event.finished:
            request = self._ledger.owned(worker, answer.index, answer.attempt)
            if request is None:
                late.append((answer.index, answer.attempt))
                self._copies.note_late(worker, answer)
                continue
            accepted.append(answer)
            if request.twin is not None:
                self._copies.answered(request, now, out)
            if answer.ok and (request.started_at is not None or request.phase is Phase.QUEUED):
                # One that was not said to have started has started and ended since the last report.
                since = heard_before if request.started_at is None else request.started_at
                self._dispatcher.horizon.ended(worker.id, now - since, request.steps)
            self._ledger.end(request, worker)
            self._unacknowledged.append(answer.ok)
            if answer.ok:
                self.estimator.observe(request.limit, answer.output_tokens)
                self.totals.prompt_tokens += answer.prompt_tokens
                self.totals.output_tokens += answer.output_tokens
            else:
                worker.failed += 1
        if accepted:
            worker.requests += len(accepted)
            self._dispatcher.note_finished(worker, len(accepted), now)
            out.append(Record(worker.id, accepted))
        if late:
            self.totals.late += len(late)
            out.append(Drop(worker.id, late))
        self._dispatcher.note_room(worker)

    def _recall_confirmed(self, event: RecallConfirmed, now: float) -> None:
        worker = self._ledger.worker(event.worker)
        back = self._dispatcher.settle(worker, event.recall, event.indexes)
        worker.heard = now
        self._requeue(back)
        self._dispatcher.note_room(worker)

    def _engine_lost(self, event: EngineLost, now: float, out: list[Instruction]) -> None:
        worker = self._ledger.worker(event.worker)
        for index, _ in (*event.started, *event.unstarted):
            self._ledger.refuse_unseen(index, worker)
        if worker.state is WorkerState.GONE:
            worker.reason = event.reason
            return
        worker.heard = now
        worker.engine_losses += 1
        worker.reason = event.reason
        # One that had started nothing died of what it was handed (of a prompt it read, say), nobody knows of which.
        ran = event.started or event.unstarted
        died_with = {index for index, attempt in ran if self._ledger.owned(worker, index, attempt) is not None}
        if died_with:
            self._dispatcher.suspects.note_death()
        self._disown(worker, died_with, event.reason, out)
        if event.restarting:
            worker.state = WorkerState.JOINING
            self._dispatcher.worker_loading(worker)
        else:
            self._leave(worker)

    def _worker_lost(self, worker: WorkerEntry, reason: str, out: list[Instruction]) -> None:
        if worker.state is WorkerState.GONE:
            return
        worker.reason = reason
        for request in worker.holdings():
            # It may have started any of them, and may still answer: a new attempt makes such answers late.
            if request.twin is None:
                request.renew()
                self.totals.retried += 1
        self._disown(worker, set(), reason, out)
        self._leave(worker)

    def _worker_returned(self, worker: WorkerEntry, now: float) -> None:
        if worker.state is not WorkerState.GONE:
            raise ProtocolError(f"rank {worker.id} returns but was not lost")
        worker.state = WorkerState.JOINING
        worker.heard = now
        worker.silent = False
        self._dispatcher.worker_joined(worker)

    def _committed(self, count: int) -> None:
        if not 0 <= count <= self.unacknowledged:
            raise ProtocolError(f"{count} records became durable, but only {self.unacknowledged} were outstanding")
        end = self._acknowledged + count
        done = sum(self._unacknowledged[self._acknowledged : end])
        self.totals.done += done
        self.totals.failed += count - done
        self._acknowledged = end
        if end > 4096:
            del self._unacknowledged[:end]
            self._acknowledged = 0

    def _tick(self, now: float, out: list[Instruction]) -> None:
        if self.limits.lease_s is not None:
            self._end_leases(self.limits.lease_s, now, out)
        self._ending.keep_time(now, out)

    def _end_leases(self, lease_s: float, now: float, out: list[Instruction]) -> None:
        for worker in self._ledger.workers.values():
            silent_s = now - worker.heard
            if worker.state is not WorkerState.GONE and silent_s > lease_s:
                worker.silent = True
                self._worker_lost(worker, f"rank {worker.id} has been silent for {silent_s:.0f} s", out)

    # ------------------------------------------------------------ requests change hands

    def _requeue(self, requests: list[RequestEntry]) -> None:
        """Requests in phase WAITING wait again, unless the plane drains."""
        if self.mode is Mode.OPEN:
            self._dispatcher.put_back(requests)
        else:
            for request in requests:
                self._ledger.abandon(request)

    def _disown(self, worker: WorkerEntry, died_with: set[int], reason: str, out: list[Instruction]) -> None:
        """Take everything from a worker. Those in `died_with` ran when its engine died."""
        back = []
        where = f"on rank {worker.id}" + (", alone" if worker.apart else "")
        for request in worker.holdings():
            attempt, runs_once = request.attempt, request.twin is None
            if runs_once:
                self._ledger.move(request, None, Phase.WAITING)
            else:
                request = self._ledger.part(request)  # it goes on elsewhere, which no death elsewhere speaks against
            if request.index in died_with:
                request.history += (f"attempt {attempt} {where}: {reason}",)
            if not runs_once:
                continue
            if request.index in died_with:
                request.renew()
                request.deaths += 1
                self.totals.retried += 1
                if request.deaths >= self.limits.deaths:
                    self._give_up(request, attempt, out)
                    continue
            back.append(request)
        self._requeue(back)

    def _give_up(self, request: RequestEntry, attempt: int, out: list[Instruction]) -> None:
        self._ledger.forget(request)
        self._unacknowledged.append(False)
        story = "; ".join(request.history)
        reason = f"{request.deaths} engines died while running this request: {story}"
        out.append(Fail(request.index, attempt, "engine_died", reason))

    def _leave(self, worker: WorkerEntry) -> None:
        worker.state = WorkerState.GONE
        self._dispatcher.worker_left(worker)

    # ------------------------------------------------------------ invariants

    def check(self) -> None:
        """Verify every invariant over the whole state. For tests and simulations: linear in what lives.

        Raises:
            BugError: one does not hold.
        """
        self._ledger.check()
        self._dispatcher.check()
        ended = self.totals.done + self.totals.failed + self.unacknowledged
        arrived = self.totals.accepted + self.totals.rejected
        must(arrived == ended + len(self._ledger.live), "requests that arrived are neither live nor ended")
