"""Planted bugs: engines that die, and the requests that are suspected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from scheduling.control import ControlPlane
from scheduling.dispatch import Dispatcher
from scheduling.events import (
    EngineLost,
    Instruction,
)
from scheduling.ledger import RequestEntry, WorkerEntry
from scheduling.suspects import Suspects
from tests.scheduling.planting import Mutants, wrap

mutants = Mutants()


@mutants.add
def deaths_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, event: EngineLost, now: float, out: list[Instruction]) -> None:
        for index, _ in event.started:
            if index in plane._ledger.live:
                plane._ledger.live[index].deaths = 0
        original(plane, event, now, out)

    wrap(patch, ControlPlane, "_engine_lost", lost)


@mutants.add
def engines_that_had_started_nothing_died_of_nothing(patch: pytest.MonkeyPatch) -> None:
    def lost(original: Any, plane: ControlPlane, event: EngineLost, now: float, out: list[Instruction]) -> None:
        original(plane, replace(event, unstarted=[]), now, out)

    wrap(patch, ControlPlane, "_engine_lost", lost)


@mutants.add
def suspects_have_neighbours(patch: pytest.MonkeyPatch) -> None:
    def put_back(original: Any, dispatcher: Dispatcher, requests: Iterable[RequestEntry]) -> None:
        dispatcher._policy.put_back(requests)

    wrap(patch, Dispatcher, "put_back", put_back)


@mutants.add
def a_suspect_is_given_neighbours_later(patch: pytest.MonkeyPatch) -> None:
    def note_room(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        original(dispatcher, worker)
        if worker.apart and worker.owned < worker.target:
            dispatcher._hungry[worker.id] = None

    wrap(patch, Dispatcher, "note_room", note_room)


@mutants.add
def suspects_wait_for_ever(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Suspects, "hand_out", lambda original, suspects, hungry, recalling, now, out: None)


@mutants.add
def suspects_are_tried_where_nothing_ever_worked(patch: pytest.MonkeyPatch) -> None:
    def hand_out(original: Any, suspects: Suspects, *args: Any) -> None:
        before = {worker: worker.requests for worker in suspects._ledger.workers.values()}
        for worker in before:
            worker.requests = 0
        original(suspects, *args)
        for worker, requests in before.items():
            worker.requests = requests

    wrap(patch, Suspects, "hand_out", hand_out)


@mutants.add
def a_worker_stays_apart(patch: pytest.MonkeyPatch) -> None:
    def note_room(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        apart = worker.apart
        original(dispatcher, worker)
        worker.apart = worker.apart or apart
        if worker.apart:
            dispatcher._hungry.pop(worker.id, None)

    wrap(patch, Dispatcher, "note_room", note_room)


@mutants.add
def a_drain_forgets_suspects(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Dispatcher, "clear", lambda original, dispatcher: dispatcher._policy.clear())
