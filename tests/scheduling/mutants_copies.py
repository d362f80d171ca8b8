"""Planted bugs: requests that run twice."""

from __future__ import annotations

from typing import Any

import pytest

from scheduling.copies import Copier
from scheduling.dispatch import Dispatcher
from scheduling.events import (
    Cancel,
    Instruction,
)
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry
from tests.scheduling.planting import Mutants, wrap

mutants = Mutants()


@mutants.add
def who_was_slower_is_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        original(copier, request, now, out)
        out.pop()

    wrap(patch, Copier, "answered", answered)


@mutants.add
def the_winner_is_cancelled(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        original(copier, request, now, out)
        out[-1] = Cancel(request.owner or 0, [(request.index, request.attempt)])

    wrap(patch, Copier, "answered", answered)


@mutants.add
def room_where_one_was_cancelled_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        copier._note_room, note_room = lambda worker: None, copier._note_room
        original(copier, request, now, out)
        copier._note_room = note_room

    wrap(patch, Copier, "answered", answered)


@mutants.add
def a_copy_that_won_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    def answered(original: Any, copier: Copier, request: RequestEntry, now: float, out: list[Instruction]) -> None:
        won = copier._ledger.totals.copies_won
        original(copier, request, now, out)
        copier._ledger.totals.copies_won = won

    wrap(patch, Copier, "answered", answered)


@mutants.add
def a_copy_has_the_attempt_of_its_original(patch: pytest.MonkeyPatch) -> None:
    def copy(original: Any, ledger: Ledger, request: RequestEntry, worker: WorkerEntry) -> RequestEntry:
        twin: RequestEntry = original(ledger, request, worker)
        twin.attempt = request.attempt
        return twin

    wrap(patch, Ledger, "copy", copy)


@mutants.add
def the_attempt_of_a_lost_copy_is_given_out_again(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        other.attempts = other.attempt
        return other

    wrap(patch, Ledger, "part", part)


@mutants.add
def a_copy_is_lost_with_its_original(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        if other.attempt > request.attempt and other.owner is not None:
            ledger.move(other, None, Phase.WAITING)
        return other

    wrap(patch, Ledger, "part", part)


@mutants.add
def only_the_original_may_answer(patch: pytest.MonkeyPatch) -> None:
    def owned(original: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        found: RequestEntry | None = original(ledger, worker, index, attempt)
        return found if found is request else None

    wrap(patch, Ledger, "owned", owned)


@mutants.add
def copies_are_made_while_there_is_other_work(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dispatcher, "exhausted", True)


@mutants.add
def copies_go_where_no_slot_is_free(patch: pytest.MonkeyPatch) -> None:
    def free(original: Any, copier: Copier, now: float) -> list[tuple[float, int, WorkerEntry]]:
        return [(pace, slots + 1, worker) for pace, slots, worker in original(copier, now)]

    wrap(patch, Copier, "_free", free)


@mutants.add
def what_an_engine_died_with_is_copied(patch: pytest.MonkeyPatch) -> None:
    def dispatch(original: Any, copier: Copier, now: float, out: list[Instruction]) -> None:
        histories = {request: request.history for request in copier._ledger.live.values()}
        for request in histories:
            request.history = ()
        original(copier, now, out)
        for request, history in histories.items():
            request.history = history

    wrap(patch, Copier, "dispatch", dispatch)


@mutants.add
def the_death_of_one_of_two_counts_for_the_other(patch: pytest.MonkeyPatch) -> None:
    def part(original: Any, ledger: Ledger, request: RequestEntry) -> RequestEntry:
        other: RequestEntry = original(ledger, request)
        other.deaths += 1
        return other

    wrap(patch, Ledger, "part", part)
