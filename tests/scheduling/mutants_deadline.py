"""Planted bugs: what time is left for."""

from __future__ import annotations

from typing import Any

import pytest

from scheduling.control import ControlPlane
from scheduling.deadline import Deadline
from scheduling.ending import Ending
from scheduling.events import (
    Instruction,
)
from scheduling.horizon import Horizon
from scheduling.ledger import Phase, RequestEntry, WorkerEntry
from scheduling.suspects import Suspects
from tests.scheduling.planting import Mutants, wrap

mutants = Mutants()


@mutants.add
def nothing_is_given_up(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Ending, "_give_up_running", lambda original, ending, out: None)


@mutants.add
def what_is_recalled_is_waited_for_when_time_is_up(patch: pytest.MonkeyPatch) -> None:
    def holdings(original: Any, worker: WorkerEntry) -> list[RequestEntry]:
        found: list[RequestEntry] = original(worker)
        return [request for request in found if request.phase is not Phase.RECALLED]

    def give_up(original: Any, ending: Ending, out: list[Instruction]) -> None:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, WorkerEntry, "holdings", holdings)
            original(ending, out)

    wrap(patch, Ending, "_give_up_running", give_up)


@mutants.add
def the_first_of_several_times_counts(patch: pytest.MonkeyPatch) -> None:
    def close(original: Any, ending: Ending, reason: str, give_up_at: float | None, out: Any) -> None:
        original(ending, reason, give_up_at if ending._give_up_at is None else None, out)

    wrap(patch, Ending, "_close", close)


@mutants.add
def what_is_queued_may_be_late(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "late", lambda original, deadline, now: [])


@mutants.add
def what_is_assigned_may_be_late(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, deadline: Deadline, worker: WorkerEntry, now: float, out: Any) -> RequestEntry:
        return deadline._policy.take(worker.id)

    wrap(patch, Deadline, "take", take)


@mutants.add
def what_is_late_here_is_late_everywhere(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "in_time_somewhere", lambda original, deadline, worker, request, now: False)


@mutants.add
def a_time_limit_never_closes_early(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Deadline, "nothing_in_time", lambda original, deadline, now, target: False)


@mutants.add
def requests_run_from_their_assignment(patch: pytest.MonkeyPatch) -> None:
    def ended(original: Any, horizon: Horizon, worker: int, elapsed_s: float, tokens: float) -> None:
        original(horizon, worker, elapsed_s + 0.1, tokens)

    def reported(original: Any, plane: ControlPlane, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, Horizon, "ended", ended)
            original(plane, *args)

    wrap(patch, ControlPlane, "_reported", reported)


@mutants.add
def what_was_set_aside_is_forgotten_at_the_end(patch: pytest.MonkeyPatch) -> None:
    def stop(original: Any, ending: Ending, outcome: str, reason: str, out: Any) -> None:
        original(ending, "done" if ending.input_ended else outcome, reason, out)

    wrap(patch, Ending, "_stop", stop)


@mutants.add
def suspects_may_be_late(patch: pytest.MonkeyPatch) -> None:
    def hand_out(original: Any, suspects: Suspects, *args: Any) -> None:
        horizon = suspects._deadline.horizon
        end_at, horizon.end_at = horizon.end_at, None
        original(suspects, *args)
        horizon.end_at = end_at

    wrap(patch, Suspects, "hand_out", hand_out)
