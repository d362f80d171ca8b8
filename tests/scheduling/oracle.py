"""An independent bookkeeper for the control plane: says of every event what must come of it.

`Oracle.handle(event, now)` first works out from its own simple books what the plane has to answer (which answers
are recorded, which are late, what fails, when it is over), then hands the event to the real plane, verifies the
plane's invariants, and compares. Books are kept from events and instructions alone, never from the plane's inside.
Any difference is an `AssertionError` (or the plane's own `BugError`).
"""

from __future__ import annotations

from scheduling.control import ControlPlane, Limits
from scheduling.events import (
    Assign,
    Cancel,
    Committed,
    DrainRequested,
    Drop,
    EngineLost,
    Event,
    Exhausted,
    Fail,
    GiveUp,
    Heard,
    InputEnded,
    Instruction,
    Recall,
    RecallConfirmed,
    Record,
    Reported,
    RequestRejected,
    RequestsArrived,
    Stop,
    Tick,
    TimeLimited,
    WorkerLost,
    WorkerReady,
    WorkerReturned,
)
from scheduling.horizon import steps_of
from scheduling.ledger import WorkerState
from scheduling.messages import Finished
from tests.scheduling.oracle_books import Books, Known


class Oracle(Books):
    """Books beside a plane. `workers` are its ids."""

    def __init__(self, workers: list[int], schedule: str, limits: Limits) -> None:
        super().__init__(workers, schedule, limits)
        self.plane = ControlPlane(workers, schedule, 0.0, limits=limits)
        self._records: list[Finished] = []
        self._fails: list[int] = []
        self._drops: list[tuple[int, int]] = []
        self._cancels: list[tuple[int, int, int]] = []
        self._given_up: dict[int, list[tuple[int, int]]] = {}

    # ------------------------------------------------------------ what an event must do

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Give the event to the plane and verify all that comes of it. Returns the plane's instructions."""
        self._records, self._fails, self._drops, self._cancels, self._given_up = [], [], [], [], {}
        stopped = bool(self.stops)
        self._expect(event, now)
        out = self.plane.handle(event, now)
        self.plane.check()
        if stopped:
            assert all(isinstance(each, Drop) for each in out), f"instructions after Stop: {out}"
        records: list[Finished] = []
        fails: list[int] = []
        drops: list[tuple[int, int]] = []
        cancels: list[tuple[int, int, int]] = []
        given_up: dict[int, list[tuple[int, int]]] = {}
        for place, instruction in enumerate(out):
            match instruction:
                case Assign():
                    self._assign(instruction, now)
                case Recall():
                    self._recall(instruction, now)
                case Record():
                    records += instruction.finished
                    self.unacknowledged.extend(answer.ok for answer in instruction.finished)
                case Fail():
                    fails.append(instruction.index)
                    self.unacknowledged.append(False)
                case Drop():
                    drops += instruction.answers
                case Cancel():
                    cancels += [(instruction.worker, index, attempt) for index, attempt in instruction.items]
                case GiveUp(None, items):
                    self._set_aside(items, now)
                case GiveUp(worker, items):
                    assert worker is not None
                    assert worker not in given_up, f"given up twice: {instruction}"
                    given_up[worker] = sorted(items)
                case Exhausted():
                    self.exhausted = instruction.empty
                case Stop():
                    assert place == len(out) - 1, "an instruction follows Stop"
                    self.stops.append(instruction)
        assert records == self._records, f"recorded {records}, not {self._records}"
        assert sorted(fails) == sorted(self._fails), f"failed {fails}, not {self._fails}"
        assert drops == self._drops, f"dropped {drops}, not {self._drops}"
        assert sorted(cancels) == sorted(self._cancels), f"cancelled {cancels}, not {self._cancels}"
        assert given_up == self._given_up, f"given up {given_up}, not {self._given_up}"
        self._judge_totals()
        if not stopped:
            self._judge_end()
        if self._open:
            self._judge_work(now)
        elif not self.stops:
            self._judge_drain()
        if isinstance(event, Tick) and not self.stops:
            self._judge_lateness(now)
        return out

    def _expect(self, event: Event, now: float) -> None:
        match event:
            case WorkerReady():
                answered = self.workers[event.worker].answered
                self.workers[event.worker] = Known(WorkerState.READY, event.slots, now, answered)
            case RequestsArrived() if self._open:
                for new in event.requests:
                    self.steps[new.index] = steps_of(new.prompt_tokens, self.estimator.output_tokens(new.output_limit))
                    self.horizon.arrived(self.steps[new.index])
                    self.limit_of[new.index] = new.output_limit
                    self.live.add(new.index)
                    self.attempt[new.index] = self.highest[new.index] = 1
                self.accepted += len(event.requests)
            case RequestRejected() if self._open:
                self.rejected += 1
                self._end(event.index)
                self._fails.append(event.index)
            case Reported():
                self._expect_report(event, now)
            case RecallConfirmed():
                self.workers[event.worker].heard = now
                self._expect_confirmation(event)
            case EngineLost():
                self._expect_engine_lost(event, now)
            case WorkerLost():
                self._expect_lost(event.worker)
            case WorkerReturned():
                before = self.workers[event.worker]
                self.workers[event.worker] = Known(WorkerState.JOINING, before.slots, now, before.answered)
            case Heard():
                self.workers[event.worker].heard = now
            case Tick():
                for worker, known in self.workers.items():
                    if self.limits.lease_s is not None and now - known.heard > self.limits.lease_s:
                        self._expect_lost(worker)
                self._expect_limits(now)
            case TimeLimited():
                self.horizon.end_at = event.end_at
            case Committed():
                for _ in range(event.count):
                    if self.unacknowledged.popleft():
                        self.done += 1
                    else:
                        self.failed += 1
            case InputEnded():
                self.input_ended = True
            case DrainRequested() if not self.stops:
                self._expect_drain(event.give_up_at)
                self.queue_recalled = True

    def _expect_drain(self, give_up_at: float | None) -> None:
        self.draining = True
        times = [at for at in (self.give_up_at, give_up_at) if at is not None]
        self.give_up_at = min(times, default=None)
        self._abandon_waiting()

    def _expect_limits(self, now: float) -> None:
        """At the time limit, or when nothing more could start before it, it is a drain. Its end is kept."""
        end_at = self.horizon.end_at
        if self.stops:
            return
        if end_at is not None and (self.draining or now >= end_at or self._nothing_in_time(now)):
            self._expect_drain(end_at)
        if not self.draining or self.give_up_at is None or now < self.give_up_at:
            return
        for index, owner in sorted(self.owner.items()):
            self._given_up.setdefault(owner, []).append((index, self.attempt[index]))
        for index, (worker, attempt) in self.copy.items():
            self._given_up.setdefault(worker, []).append((index, attempt))
        self._given_up = {worker: sorted(items) for worker, items in self._given_up.items()}
        self.copy.clear()
        self.copy_started.clear()
        self.copy_started_at.clear()
        self.unfinished += len(self.owner)
        for worker in list(self.workers):
            self._disown(worker)

    def _expect_report(self, event: Reported, now: float) -> None:
        heard_before, self.workers[event.worker].heard = self.workers[event.worker].heard, now
        for index, attempt in event.started:
            if self._is_owner(event.worker, index, attempt) and index not in self.started:
                self.started.add(index)
                self.started_at[index] = now
            elif self.copy.get(index) == (event.worker, attempt) and index not in self.copy_started:
                self.copy_started.add(index)
                self.copy_started_at[index] = now
            else:
                continue
            self.horizon.started(now)
        asked = {index for _, indexes, _ in self.recalls.values() for index in indexes}
        for answer in event.finished:
            index = answer.index
            owns = self._is_owner(event.worker, index, answer.attempt)
            if owns or self.copy.get(index) == (event.worker, answer.attempt):
                self._records.append(answer)
                self.workers[event.worker].answered += 1
                started, at = (self.started, self.started_at) if owns else (self.copy_started, self.copy_started_at)
                if answer.ok:
                    self.estimator.observe(self.limit_of[index], answer.output_tokens)
                    untold = index not in started and not (owns and index in asked)
                    since = heard_before if untold else at.get(index)
                    if since is not None:
                        self.horizon.ended(event.worker, now - since, self.steps[index])
                if owns and index in self.copy:
                    self._cancel_copy(index)
                elif not owns:
                    self.copies_won += 1
                    self._cancel_original(index)
                self._end(answer.index)
            else:
                self.late += 1
                self._drops.append((answer.index, answer.attempt))

    def _expect_confirmation(self, event: RecallConfirmed) -> None:
        recall = self.recalls.pop(event.recall, None)
        for index in recall[1] if recall else ():
            if self.owner.get(index) != event.worker or index in self.started:
                continue
            if index in event.indexes:
                del self.owner[index]
            else:
                self.started.add(index)
        self._abandon_waiting()

    def _expect_engine_lost(self, event: EngineLost, now: float) -> None:
        known = self.workers[event.worker]
        if known.state is WorkerState.GONE:
            return
        known.heard = now
        known.state = WorkerState.JOINING if event.restarting else WorkerState.GONE
        for index, attempt in event.started or event.unstarted:
            owns = self._is_owner(event.worker, index, attempt)
            if not owns and self.copy.get(index) != (event.worker, attempt):
                continue
            if index in self.copy:
                self.died_copied.add(index)
                continue
            self._next_attempt(index)
            self.deaths[index] = self.deaths.get(index, 0) + 1
            if self.deaths[index] >= self.limits.deaths:
                assert self.owned(event.worker) == 1, f"request {index} is failed for what it shared with others"
                self._fails.append(index)
                self.given_up.add(index)
                self._end(index)
        self._disown(event.worker)

    def _expect_lost(self, worker: int) -> None:
        if self.workers[worker].state is WorkerState.GONE:
            return
        self.workers[worker].state = WorkerState.GONE
        for index, owner in self.owner.items():
            if owner == worker and index not in self.copy:
                self._next_attempt(index)
        self._disown(worker)

    # ------------------------------------------------------------ what the plane may instruct

    def _assign(self, assign: Assign, now: float) -> None:
        known = self.workers[assign.worker]
        assert self._open, f"{assign} after the plane has closed"
        assert known.state is WorkerState.READY, f"{assign} to a worker that is {known.state}"
        assert assign.items, "an empty Assign"
        for index, attempt in assign.items:
            assert index in self.live, f"request {index} has ended or never was"
            assert self._in_time(assign.worker, index, now), f"request {index} is assigned and cannot end in time"
            if index in self.owner:
                self._copy(assign.worker, index, attempt)
                continue
            assert attempt == self.attempt[index], f"request {index} is assigned as attempt {attempt}"
            self.owner[index] = assign.worker
            self.assigned.append((index, assign.worker))
        held = [index for index, owner in self.owner.items() if owner == assign.worker]
        if any(map(self._suspected, held)):
            assert len(held) == 1, f"request {held} are run together, though one is suspected to kill engines"
            assert self._trusted(assign.worker), f"{assign}, which has never answered anything"
        assert self.owned(assign.worker) <= known.slots + self.limits.prefetch_max, "a bottomless backlog"

    def _copy(self, worker: int, index: int, attempt: int) -> None:
        """One more attempt of what runs elsewhere: near the end, once, into a slot that is free."""
        allowed = self.steals and self.limits.copies
        assert allowed, f"request {index} is rank {self.owner[index]}'s, and assigned again"
        near_end = self.exhausted and self.input_ended
        assert near_end, f"request {index} is copied before the end"
        unstarted = self._movable() + len(self.recalls)
        assert not unstarted, f"request {index} is copied while unstarted work is left"
        assert index in self.started, f"request {index} is copied and does not run"
        assert index not in self.copy, f"request {index} is copied twice"
        assert worker != self.owner[index], f"request {index} is copied to its owner"
        assert self.owned(worker) < self.workers[worker].slots, (
            f"request {index} is copied to rank {worker}, which is full"
        )
        died = self.deaths.get(index) or index in self.died_copied
        assert not died, f"request {index} is copied although an engine has died with it"
        assert not any(self._suspected(other) for other, owner in self.owner.items() if owner == worker)
        self._next_attempt(index, of_copy=True)
        assert attempt == self.highest[index], f"the copy of request {index} is attempt {attempt}"
        self.copy[index] = (worker, attempt)
        self.copies += 1

    def _recall(self, recall: Recall, now: float) -> None:
        limited = self.horizon.end_at is not None
        assert self.steals or self.draining or limited, "a recall without stealing"
        assert recall.indexes, "an empty Recall"
        assert recall.recall >= self.recalls_seen, "a number of a recall that was used before"
        asked = {index for _, indexes, _ in self.recalls.values() for index in indexes}
        for index in recall.indexes:
            assert self.owner.get(index) == recall.worker, f"request {index} is recalled from who does not own it"
            assert index not in self.started, f"request {index} is recalled while it runs"
            assert index not in asked, f"request {index} is recalled twice"
        self.recalls_seen = recall.recall + 1
        self.recalls[recall.recall] = (recall.worker, recall.indexes, now)

    def _set_aside(self, items: list[tuple[int, int]], now: float) -> None:
        """Only what waits, and what no worker that might get it would end in time."""
        assert self._open, "set aside after the plane has closed"
        ready = [worker for worker, known in self.workers.items() if known.state is WorkerState.READY]
        for index, attempt in items:
            assert index in self.live - self.owner.keys(), f"request {index} does not wait, and is set aside"
            assert attempt == self.attempt[index]
            late = [not self._in_time(worker, index, now) for worker in ready]
            assert all(late) if self.steals else any(late), f"request {index} could end in time, and is set aside"
            self.live.discard(index)
        self.accepted -= len(items)
        self.set_aside += len(items)

    # ------------------------------------------------------------ what must hold after every event

    def _judge_totals(self) -> None:
        plane, totals = self.plane, self.plane.totals
        assert (totals.unfinished, totals.set_aside) == (self.unfinished, self.set_aside)
        assert (totals.accepted, totals.rejected) == (self.accepted, self.rejected)
        assert (totals.done, totals.failed, totals.late) == (self.done, self.failed, self.late)
        assert (totals.copies, totals.copies_won) == (self.copies, self.copies_won)
        assert totals.wasted_tokens >= 0
        assert plane.unacknowledged == len(self.unacknowledged)
        assert plane.running == len(self.started)
        assert plane.waiting == len(self.live) - len(self.owner)
        assert 0 <= plane.wanted() <= self.limits.waiting

    def _judge_end(self) -> None:
        """Stop comes as soon as it is over and everything is durable, and not before."""
        gone = all(known.state is WorkerState.GONE for known in self.workers.values())
        over = not self.live and (self.draining or self.input_ended)
        outcomes = [stop.outcome for stop in self.stops]
        if self.unacknowledged or not (over or gone):
            assert not outcomes, f"stopped too early: {outcomes}"
        else:
            outcome = "no workers" if not over else "drained" if self.draining or self.set_aside else "done"
            assert outcomes == [outcome], f"it is over ({outcome}), and the plane says {outcomes}"

    def _judge_drain(self) -> None:
        asked = {index for _, indexes, _ in self.recalls.values() for index in indexes}
        # A copy that has not said that it started yet, and whose original was lost, goes on as that would have.
        kept = self.owner.keys() - self.started - asked - self.promoted
        assert not (kept and self.queue_recalled), f"requests {kept} will start in spite of the drain"

    def _judge_lateness(self, now: float) -> None:
        """After every tick: nothing is left in a queue that would be late, and nothing at all when time is up."""
        asked = {index for _, indexes, _ in self.recalls.values() for index in indexes}
        for index in self.owner.keys() - self.started - asked:
            assert self._in_time(self.owner[index], index, now), f"request {index} starts and cannot end in time"
        times = [at for at in (self.horizon.end_at, self.give_up_at) if at is not None]
        assert not times or now < min(times) or not self.live, f"{self.live} live when time is up"

    def _judge_work(self, now: float) -> None:
        empty = self.input_ended and not self.recalls and not self._movable()
        assert self.exhausted == empty, f"workers believe that work left is {not self.exhausted}"
        if self.steals and self._all_in_time(now):
            self._judge_idleness(now)

    def _judge_suspects(self, idle: list[int]) -> None:
        """A suspect waits for a worker that is empty, and one that has ever answered if there is one."""
        suspects = len(self.live) - len(self.owner) - self._waiting()
        if suspects and not self.recalls:
            able = list(filter(self._trusted, idle))
            assert not able, f"ranks {able} idle while {suspects} suspects wait"

    def _judge_idleness(self, now: float) -> None:
        """No slot is free while there is unstarted work for it, unless help is on its way."""
        ready = {worker: known for worker, known in self.workers.items() if known.state is WorkerState.READY}
        waiting = self._waiting()
        alone = {self.owner[index] for index in self.owner if self._suspected(index)}
        ready = {worker: known for worker, known in ready.items() if worker not in alone}
        idle = [worker for worker in ready if not self.owned(worker)]
        assert not (idle and waiting), f"ranks {idle} idle while {waiting} requests wait"
        self._judge_suspects(idle)
        loading = any(known.state is WorkerState.JOINING for known in self.workers.values())
        if loading and self.input_ended:
            free = len(idle)  # what is left is kept for those that still load, but nobody owns nothing
        else:
            free = sum(max(0, known.slots - self.owned(worker)) for worker, known in ready.items())
            assert not (free and waiting), f"{free} slots are free while {waiting} requests wait"
        patience = now - self.limits.recall_patience_s
        coming = sum(len(indexes) for _, indexes, since in self.recalls.values() if since > patience)
        if free <= coming:
            return
        asked = {victim for victim, _, _ in self.recalls.values()}
        for worker in ready.keys() - asked:
            assert not self._spare(worker), f"{free} slots are free while rank {worker} has work to spare"

    # ------------------------------------------------------------ the books, where a cancellation comes of it

    def _cancel_copy(self, index: int) -> None:
        worker, attempt = self.copy.pop(index)
        self.copy_started.discard(index)
        self.copy_started_at.pop(index, None)
        self._cancels.append((worker, index, attempt))

    def _cancel_original(self, index: int) -> None:
        """The copy has won, or fails with it: it is the request."""
        self._cancels.append((self.owner[index], index, self.attempt[index]))
        self._promote(index)
