"""Planted bugs: who owns a request, what an answer is, who gets what next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from scheduling.control import ControlPlane
from scheduling.dispatch import Dispatcher
from scheduling.ending import Mode
from scheduling.events import (
    Committed,
    Exhausted,
    Instruction,
    NewRequest,
    Record,
    Reported,
)
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry
from scheduling.policies import RoundRobin, WorkStealing
from tests.scheduling.planting import Mutants, wrap

mutants = Mutants()


@mutants.add
def attempts_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    def owned(_: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        return request if request is not None and request.owner == worker.id else None

    wrap(patch, Ledger, "owned", owned)


@mutants.add
def owners_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    def owned(_: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        return request if request is not None and request.attempt == attempt else None

    wrap(patch, Ledger, "owned", owned)


@mutants.add
def confirmations_are_ignored(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ControlPlane, "_recall_confirmed", lambda original, plane, event, now: None)


@mutants.add
def what_was_not_confirmed_moves_too(patch: pytest.MonkeyPatch) -> None:
    def settle(
        original: Any, dispatcher: Dispatcher, worker: WorkerEntry, number: int, confirmed: Iterable[int]
    ) -> list[RequestEntry]:
        recall = dispatcher._recalls.get(number)
        if recall is not None:
            confirmed = [index for index in recall.indexes if index in worker.recalled]
        back: list[RequestEntry] = original(dispatcher, worker, number, confirmed)
        return back

    wrap(patch, Dispatcher, "settle", settle)


@mutants.add
def what_was_kept_stays_recalled(patch: pytest.MonkeyPatch) -> None:
    def settle(
        original: Any, dispatcher: Dispatcher, worker: WorkerEntry, number: int, confirmed: Iterable[int]
    ) -> list[RequestEntry]:
        kept = dict(worker.recalled)
        recall = dispatcher._recalls.get(number)
        back: list[RequestEntry] = original(dispatcher, worker, number, confirmed)
        for index in recall.indexes if recall else ():
            if index in kept and index not in confirmed:
                dispatcher._ledger.move(kept[index], worker, Phase.QUEUED)
        return back

    wrap(patch, Dispatcher, "settle", settle)


@mutants.add
def an_answer_is_recorded_twice(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        original(plane, event, now, out)
        out += [each for each in out if isinstance(each, Record)]

    wrap(patch, ControlPlane, "_reported", reported)


@mutants.add
def a_lost_workers_requests_are_lost(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, worker: WorkerEntry, reason: str, out: list[Instruction]) -> None:
        held = [*worker.queued.values()]
        original(plane, worker, reason, out)
        for request in held:
            if request in getattr(plane._policy, "_queue", ()):
                plane._policy._queue.remove(request)  # type: ignore[attr-defined]

    wrap(patch, ControlPlane, "_worker_lost", lost)


@mutants.add
def a_lost_workers_attempts_stay(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, worker: WorkerEntry, reason: str, out: list[Instruction]) -> None:
        for request in (*worker.queued.values(), *worker.recalled.values(), *worker.running.values()):
            request.attempts -= 1
        original(plane, worker, reason, out)

    wrap(patch, ControlPlane, "_worker_lost", lost)


@mutants.add
def it_stops_before_the_record_is_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ControlPlane, "unacknowledged", 0)


@mutants.add
def failures_are_counted_as_done(patch: pytest.MonkeyPatch) -> None:
    def committed(original: Any, plane: ControlPlane, count: int) -> None:
        original(plane, count)
        plane.totals.done, plane.totals.failed = plane.totals.done + plane.totals.failed, 0

    wrap(patch, ControlPlane, "_committed", committed)


@mutants.add
def put_back_loses_one(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, policy: WorkStealing[RequestEntry], requests: Iterable[RequestEntry]) -> None:
        original(policy, list(requests)[1:])

    wrap(patch, WorkStealing, "put_back", put_back)


@mutants.add
def put_back_deals_one_twice(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, policy: WorkStealing[RequestEntry], requests: Iterable[RequestEntry]) -> None:
        returned = list(requests)
        original(policy, returned + returned[:1])

    wrap(patch, WorkStealing, "put_back", put_back)


@mutants.add
def load_only_grows(patch: pytest.MonkeyPatch) -> None:
    def end(original: Any, ledger: Ledger, request: RequestEntry, worker: WorkerEntry) -> None:
        original(ledger, request, worker)
        worker.load_tokens += request.cost

    wrap(patch, Ledger, "end", end)


@mutants.add
def running_requests_are_recalled(patch: pytest.MonkeyPatch) -> None:
    def recall(
        original: Any,
        dispatcher: Dispatcher,
        victim: WorkerEntry,
        indexes: list[int],
        now: float,
        out: list[Instruction],
    ) -> None:
        for request in list(victim.running.values())[:1]:
            dispatcher._ledger.move(request, victim, Phase.QUEUED)
            indexes = [request.index, *indexes]
        original(dispatcher, victim, indexes, now, out)

    wrap(patch, Dispatcher, "recall", recall)


@mutants.add
def recalls_of_a_lost_victim_stay_open(patch: pytest.MonkeyPatch) -> None:
    def withdraw(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        recalls = dict(dispatcher._recalls)
        original(dispatcher, worker)
        dispatcher._recalls = recalls

    wrap(patch, Dispatcher, "_withdraw", withdraw)


@mutants.add
def nobody_steals(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Dispatcher, "_steal", lambda original, dispatcher, cap, now, out: None)


@mutants.add
def a_drain_leaves_the_backlogs(patch: pytest.MonkeyPatch) -> None:
    def recall(
        original: Any,
        dispatcher: Dispatcher,
        victim: WorkerEntry,
        indexes: list[int],
        now: float,
        out: list[Instruction],
    ) -> None:
        if Exhausted(True) not in out:  # a drain says so first, stealing last
            original(dispatcher, victim, indexes, now, out)

    wrap(patch, Dispatcher, "recall", recall)


@mutants.add
def what_arrives_during_a_drain_waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    def arrived(original: Any, plane: ControlPlane, requests: list[NewRequest]) -> None:
        mode, plane._ending.mode = plane.mode, Mode.OPEN
        original(plane, requests)
        plane._ending.mode = mode

    wrap(patch, ControlPlane, "_arrived", arrived)


@mutants.add
def a_restarting_worker_is_fed(patch: pytest.MonkeyPatch) -> None:
    def loading(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        dispatcher._hungry[worker.id] = None

    wrap(patch, Dispatcher, "worker_loading", loading)


@mutants.add
def a_restarting_worker_has_no_share_kept(patch: pytest.MonkeyPatch) -> None:
    def loading(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        dispatcher._loading.discard(worker.id)

    wrap(patch, Dispatcher, "worker_loading", loading)


@mutants.add
def the_target_of_a_worker_that_left_is_still_read_for(patch: pytest.MonkeyPatch) -> None:
    def left(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        target = dispatcher.target
        original(dispatcher, worker)
        dispatcher.target = target

    wrap(patch, Dispatcher, "worker_left", left)


@mutants.add
def a_worker_with_room_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        original(plane, event, now, out)
        plane._dispatcher._hungry.pop(event.worker, None)

    wrap(patch, ControlPlane, "_reported", reported)


@mutants.add
def turns_are_skipped(patch: pytest.MonkeyPatch) -> None:
    def leave(original: Any, policy: RoundRobin[RequestEntry], worker: int) -> None:
        policy._queues.pop(worker, None)
        original(policy, worker)

    wrap(patch, RoundRobin, "worker_left", leave)


@mutants.add
def workers_are_not_told_that_there_is_work_again(patch: pytest.MonkeyPatch) -> None:
    def dispatch(original: Any, dispatcher: Dispatcher, now: float, input_ended: bool, out: list[Instruction]) -> None:
        original(dispatcher, now, input_ended, out)
        out[:] = [each for each in out if each != Exhausted(False)]

    wrap(patch, Dispatcher, "dispatch", dispatch)


@mutants.add
def late_answers_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        late = plane.totals.late
        original(plane, event, now, out)
        plane.totals.late = late

    wrap(patch, ControlPlane, "_reported", reported)


@mutants.add
def the_last_commit_goes_unnoticed(patch: pytest.MonkeyPatch) -> None:
    def handle(original: Any, plane: ControlPlane, event: Any, now: float) -> list[Instruction]:
        if isinstance(event, Committed):
            plane._committed(event.count)
            return []
        instructions: list[Instruction] = original(plane, event, now)
        return instructions

    wrap(patch, ControlPlane, "handle", handle)
