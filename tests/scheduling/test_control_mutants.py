"""The property driver can fail: each bug planted here is found within a few seeds.

A mutant replaces a method of the real control plane, its ledger or a policy by one with a single mistake in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from scheduling.control import ControlPlane
from scheduling.copies import Copier
from scheduling.deadline import Deadline
from scheduling.dispatch import Dispatcher
from scheduling.ending import Ending, Mode
from scheduling.events import (
    Cancel,
    Committed,
    EngineLost,
    Exhausted,
    Instruction,
    NewRequest,
    Record,
    Reported,
)
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry
from scheduling.policies import RoundRobin, WorkStealing
from scheduling.suspects import Suspects
from tests.scheduling.fakes import World, scenario_of

SEEDS = 400
Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: list[Patch] = []


def mutant(plant: Patch) -> Patch:
    MUTANTS.append(plant)
    return plant


def wrap(patch: pytest.MonkeyPatch, owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, *args)`."""
    original = getattr(owner, name)

    def replaced(self: Any, *args: Any) -> Any:
        return around(original, self, *args)

    patch.setattr(owner, name, replaced)


@mutant
def attempts_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    def owned(_: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        return request if request is not None and request.owner == worker.id else None

    wrap(patch, Ledger, "owned", owned)


@mutant
def owners_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    def owned(_: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        return request if request is not None and request.attempt == attempt else None

    wrap(patch, Ledger, "owned", owned)


@mutant
def confirmations_are_ignored(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ControlPlane, "_recall_confirmed", lambda original, plane, event, now: None)


@mutant
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


@mutant
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


@mutant
def an_answer_is_recorded_twice(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        original(plane, event, now, out)
        out += [each for each in out if isinstance(each, Record)]

    wrap(patch, ControlPlane, "_reported", reported)


@mutant
def a_lost_workers_requests_are_lost(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, worker: WorkerEntry, reason: str, out: list[Instruction]) -> None:
        held = [*worker.queued.values()]
        original(plane, worker, reason, out)
        for request in held:
            if request in getattr(plane._policy, "_queue", ()):
                plane._policy._queue.remove(request)  # type: ignore[attr-defined]

    wrap(patch, ControlPlane, "_worker_lost", lost)


@mutant
def a_lost_workers_attempts_stay(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, worker: WorkerEntry, reason: str, out: list[Instruction]) -> None:
        for request in (*worker.queued.values(), *worker.recalled.values(), *worker.running.values()):
            request.attempts -= 1
        original(plane, worker, reason, out)

    wrap(patch, ControlPlane, "_worker_lost", lost)


@mutant
def it_stops_before_the_record_is_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ControlPlane, "unacknowledged", 0)


@mutant
def failures_are_counted_as_done(patch: pytest.MonkeyPatch) -> None:
    def committed(original: Any, plane: ControlPlane, count: int) -> None:
        original(plane, count)
        plane.totals.done, plane.totals.failed = plane.totals.done + plane.totals.failed, 0

    wrap(patch, ControlPlane, "_committed", committed)


@mutant
def put_back_loses_one(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, policy: WorkStealing[RequestEntry], requests: Iterable[RequestEntry]) -> None:
        original(policy, list(requests)[1:])

    wrap(patch, WorkStealing, "put_back", put_back)


@mutant
def put_back_deals_one_twice(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, policy: WorkStealing[RequestEntry], requests: Iterable[RequestEntry]) -> None:
        returned = list(requests)
        original(policy, returned + returned[:1])

    wrap(patch, WorkStealing, "put_back", put_back)


@mutant
def load_only_grows(patch: pytest.MonkeyPatch) -> None:
    def end(original: Any, ledger: Ledger, request: RequestEntry, worker: WorkerEntry) -> None:
        original(ledger, request, worker)
        worker.load_tokens += request.cost

    wrap(patch, Ledger, "end", end)


@mutant
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


@mutant
def recalls_of_a_lost_victim_stay_open(patch: pytest.MonkeyPatch) -> None:
    def withdraw(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        recalls = dict(dispatcher._recalls)
        original(dispatcher, worker)
        dispatcher._recalls = recalls

    wrap(patch, Dispatcher, "_withdraw", withdraw)


@mutant
def nobody_steals(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Dispatcher, "_steal", lambda original, dispatcher, cap, now, out: None)


@mutant
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


@mutant
def what_arrives_during_a_drain_waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    def arrived(original: Any, plane: ControlPlane, requests: list[NewRequest]) -> None:
        mode, plane._ending.mode = plane.mode, Mode.OPEN
        original(plane, requests)
        plane._ending.mode = mode

    wrap(patch, ControlPlane, "_arrived", arrived)


@mutant
def deaths_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, event: EngineLost, now: float, out: list[Instruction]) -> None:
        for index, _ in event.started:
            if index in plane._ledger.live:
                plane._ledger.live[index].deaths = 0
        original(plane, event, now, out)

    wrap(patch, ControlPlane, "_engine_lost", lost)


@mutant
def engines_that_had_started_nothing_died_of_nothing(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, event: EngineLost, now: float, out: list[Instruction]) -> None:
        original(plane, replace(event, unstarted=[]), now, out)

    wrap(patch, ControlPlane, "_engine_lost", lost)


@mutant
def suspects_have_neighbours(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, dispatcher: Dispatcher, requests: Iterable[RequestEntry]) -> None:
        dispatcher._policy.put_back(requests)

    wrap(patch, Dispatcher, "put_back", put_back)


@mutant
def a_suspect_is_given_neighbours_later(patch: pytest.MonkeyPatch) -> None:
    def note_room(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        if worker.apart and worker.owned < worker.target:
            dispatcher._hungry[worker.id] = None

    wrap(patch, Dispatcher, "note_room", note_room)


@mutant
def suspects_wait_for_ever(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Suspects, "hand_out", lambda original, suspects, hungry, recalling, now, out: None)


@mutant
def suspects_are_tried_where_nothing_ever_worked(patch: pytest.MonkeyPatch) -> None:
    def hand_out(original: Any, suspects: Suspects, *args: Any) -> None:
        before = {worker: worker.requests for worker in suspects._ledger.workers.values()}
        for worker in before:
            worker.requests = 0
        original(suspects, *args)
        for worker, requests in before.items():
            worker.requests = requests

    wrap(patch, Suspects, "hand_out", hand_out)


@mutant
def a_worker_stays_apart(patch: pytest.MonkeyPatch) -> None:
    def note_room(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        apart = worker.apart
        original(dispatcher, worker)
        worker.apart = worker.apart or apart
        if worker.apart:
            dispatcher._hungry.pop(worker.id, None)

    wrap(patch, Dispatcher, "note_room", note_room)


@mutant
def a_drain_forgets_suspects(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Dispatcher, "clear", lambda original, dispatcher: dispatcher._policy.clear())


@mutant
def a_restarting_worker_is_fed(patch: pytest.MonkeyPatch) -> None:
    def loading(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        dispatcher._hungry[worker.id] = None

    wrap(patch, Dispatcher, "worker_loading", loading)


@mutant
def a_restarting_worker_has_no_share_kept(patch: pytest.MonkeyPatch) -> None:
    def loading(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        dispatcher._loading.discard(worker.id)

    wrap(patch, Dispatcher, "worker_loading", loading)


@mutant
def the_target_of_a_worker_that_left_is_still_read_for(patch: pytest.MonkeyPatch) -> None:
    def left(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        target = dispatcher.target
        original(dispatcher, worker)
        dispatcher.target = target

    wrap(patch, Dispatcher, "worker_left", left)


@mutant
def a_worker_with_room_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        original(plane, event, now, out)
        plane._dispatcher._hungry.pop(event.worker, None)

    wrap(patch, ControlPlane, "_reported", reported)


@mutant
def turns_are_skipped(patch: pytest.MonkeyPatch) -> None:
    def leave(original: Any, policy: RoundRobin[RequestEntry], worker: int) -> None:
        policy._queues.pop(worker, None)
        original(policy, worker)

    wrap(patch, RoundRobin, "worker_left", leave)


@mutant
def workers_are_not_told_that_there_is_work_again(patch: pytest.MonkeyPatch) -> None:
    def dispatch(original: Any, dispatcher: Dispatcher, now: float, input_ended: bool, out: list[Instruction]) -> None:
        original(dispatcher, now, input_ended, out)
        out[:] = [each for each in out if each != Exhausted(False)]

    wrap(patch, Dispatcher, "dispatch", dispatch)


@mutant
def late_answers_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def reported(original: Any, plane: ControlPlane, event: Reported, now: float, out: list[Instruction]) -> None:
        late = plane.totals.late
        original(plane, event, now, out)
        plane.totals.late = late

    wrap(patch, ControlPlane, "_reported", reported)


@mutant
def the_last_commit_goes_unnoticed(patch: pytest.MonkeyPatch) -> None:
    def handle(original: Any, plane: ControlPlane, event: Any, now: float) -> list[Instruction]:
        if isinstance(event, Committed):
            plane._committed(event.count)
            return []
        instructions: list[Instruction] = original(plane, event, now)
        return instructions

    wrap(patch, ControlPlane, "handle", handle)


@mutant
def who_was_slower_is_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        original(copier, request, now, out)
        out.pop()

    wrap(patch, Copier, "answered", answered)


@mutant
def the_winner_is_cancelled(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        original(copier, request, now, out)
        out[-1] = Cancel(request.owner or 0, [(request.index, request.attempt)])

    wrap(patch, Copier, "answered", answered)


@mutant
def room_where_one_was_cancelled_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        copier._note_room, note_room = lambda worker: None, copier._note_room
        original(copier, request, now, out)
        copier._note_room = note_room

    wrap(patch, Copier, "answered", answered)


@mutant
def a_copy_that_won_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        won = copier._ledger.totals.copies_won
        original(copier, request, now, out)
        copier._ledger.totals.copies_won = won

    wrap(patch, Copier, "answered", answered)


@mutant
def a_copy_has_the_attempt_of_its_original(patch: pytest.MonkeyPatch) -> None:
    def copy(original: Any, ledger: Ledger, request: RequestEntry, worker: WorkerEntry) -> RequestEntry:
        twin: RequestEntry = original(ledger, request, worker)
        twin.attempt = request.attempt
        return twin

    wrap(patch, Ledger, "copy", copy)


@mutant
def the_attempt_of_a_lost_copy_is_given_out_again(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        other.attempts = other.attempt
        return other

    wrap(patch, Ledger, "part", part)


@mutant
def a_copy_is_lost_with_its_original(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        if other.attempt > request.attempt and other.owner is not None:
            ledger.move(other, None, Phase.WAITING)
        return other

    wrap(patch, Ledger, "part", part)


@mutant
def only_the_original_may_answer(patch: pytest.MonkeyPatch) -> None:
    def owned(original: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        found: RequestEntry | None = original(ledger, worker, index, attempt)
        return found if found is request else None

    wrap(patch, Ledger, "owned", owned)


@mutant
def copies_are_made_while_there_is_other_work(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dispatcher, "exhausted", True)


@mutant
def copies_go_where_no_slot_is_free(patch: pytest.MonkeyPatch) -> None:
    def free(original: Any, copier: Copier, now: float) -> list[tuple[float, int, WorkerEntry]]:
        return [(pace, slots + 1, worker) for pace, slots, worker in original(copier, now)]

    wrap(patch, Copier, "_free", free)


@mutant
def what_an_engine_died_with_is_copied(patch: pytest.MonkeyPatch) -> None:
    def dispatch(original: Any, copier: Copier, now: float, out: list[Instruction]) -> None:
        histories = {request: request.history for request in copier._ledger.live.values()}
        for request in histories:
            request.history = ()
        original(copier, now, out)
        for request, history in histories.items():
            request.history = history

    wrap(patch, Copier, "dispatch", dispatch)


@mutant
def the_death_of_one_of_two_counts_for_the_other(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        other.deaths += 1
        return other

    wrap(patch, Ledger, "part", part)


@mutant
def nothing_is_given_up(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Ending, "_give_up_running", lambda original, ending, out: None)


@mutant
def what_is_recalled_is_waited_for_when_time_is_up(patch: pytest.MonkeyPatch) -> None:
    def holdings(original: Any, worker: WorkerEntry) -> list[RequestEntry]:
        found: list[RequestEntry] = original(worker)
        return [request for request in found if request.phase is not Phase.RECALLED]

    def give_up(original: Any, ending: Ending, out: list[Instruction]) -> None:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, WorkerEntry, "holdings", holdings)
            original(ending, out)

    wrap(patch, Ending, "_give_up_running", give_up)


@mutant
def the_first_of_several_times_counts(patch: pytest.MonkeyPatch) -> None:
    def close(original: Any, ending: Ending, reason: str, give_up_at: float | None, out: Any) -> None:
        original(ending, reason, give_up_at if ending._give_up_at is None else None, out)

    wrap(patch, Ending, "_close", close)


@mutant
def what_is_queued_may_be_late(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "late", lambda original, deadline, now: [])


@mutant
def what_is_assigned_may_be_late(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, deadline: Deadline, worker: WorkerEntry, now: float, out: Any) -> RequestEntry:
        return deadline._policy.take(worker.id)

    wrap(patch, Deadline, "take", take)


@mutant
def what_is_late_here_is_late_everywhere(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "in_time_somewhere", lambda original, deadline, worker, request, now: False)


@mutant
def a_time_limit_never_closes_early(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "nothing_in_time", lambda original, deadline, now, target: False)


@mutant
def requests_run_from_their_assignment(patch: pytest.MonkeyPatch) -> None:
    def ended(original: Any, horizon: Horizon, worker: int, elapsed_s: float, tokens: float) -> None:
        original(horizon, worker, elapsed_s + 0.1, tokens)

    def reported(original: Any, plane: ControlPlane, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, Horizon, "ended", ended)
            original(plane, *args)

    wrap(patch, ControlPlane, "_reported", reported)


@mutant
def what_was_set_aside_is_forgotten_at_the_end(patch: pytest.MonkeyPatch) -> None:
    def stop(original: Any, ending: Ending, outcome: str, reason: str, out: Any) -> None:
        original(ending, "done" if ending.input_ended else outcome, reason, out)

    wrap(patch, Ending, "_stop", stop)


@mutant
def suspects_may_be_late(patch: pytest.MonkeyPatch) -> None:
    def hand_out(original: Any, suspects: Suspects, *args: Any) -> None:
        horizon = suspects._deadline.horizon
        end_at, horizon.end_at = horizon.end_at, None
        original(suspects, *args)
        horizon.end_at = end_at

    wrap(patch, Suspects, "hand_out", hand_out)


def seeds_to_find(limit: int) -> int | None:
    """How many seeds it takes until a scenario fails; None if none of `limit` does."""
    for seed in range(limit):
        try:
            World(scenario_of(seed)).run()
        except AssertionError:
            return seed + 1
    return None


@pytest.mark.slow
@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert seeds_to_find(SEEDS) is not None, f"no scenario of {SEEDS} notices that {plant.__name__}"
