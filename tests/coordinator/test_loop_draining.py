"""Rank 0's loop when it is asked to stop: what still runs, what is given up, what is set aside."""

from __future__ import annotations

from typing import Any

from coordinator.loop import TICK_S
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import Limits
from tests.coordinator.fakes import finished
from tests.coordinator.stage import Stage, assigned


def draining(*events: ev.DrainRequested | ev.TimeLimited) -> tuple[Stage, list[int], list[Any]]:
    """A stage whose worker runs the first of what it was given when these come; and what it is told then."""
    stops: list[ev.DrainRequested | ev.TimeLimited] = []
    stage = Stage(["x"] * 20, stops=lambda: [stops.pop(0) for _ in stops[:]])
    given = assigned(stage.ready(slots=2))
    stage.hear(1, m.Report(started=[(given[0], 1)]))
    stops.extend(events)
    stage.clock.pass_(TICK_S)
    return stage, given, stage.step()


def test_drain_starts_nothing_new_and_waits_for_what_runs() -> None:
    stage, given, said = draining(ev.DrainRequested("asked to"))
    assert not assigned(said)
    [recall] = [message for message in said if isinstance(message, m.Recall)]
    assert recall.indexes == given[1:]
    stage.hear(1, m.Recalled(recall.recall, recall.indexes))
    assert stage.coordinator.outcome is None
    stage.hear(1, m.Report(finished=[finished(given[0])]))
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")


def test_what_runs_at_the_deadline_is_given_up_and_its_row_not_counted() -> None:
    stage, given, _ = draining(ev.DrainRequested("asked to", 101.0))
    stage.hear(1, m.Recalled(0, given[1:]))
    assert stage.coordinator.outcome is None
    assert stage.coordinator.in_flight
    stage.clock.pass_(1.0)
    stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")
    assert stage.coordinator.dropped == {(1, given[0], 1)}, "its worker may have ended it meanwhile"
    assert stage.record.take() == []


def test_what_is_set_aside_before_a_time_limit_is_not_kept_in_memory() -> None:
    stops: list[ev.TimeLimited] = []
    stage = Stage(["x", *["y" * 64_000] * 5, "x"], stops=lambda: [stops.pop(0) for _ in stops[:]])
    assert assigned(stage.ready(slots=1)) == [0, 1]
    stage.hear(1, m.Report(started=[(0, 1)]))
    stage.clock.pass_(1.0)
    stage.hear(1, m.Report(finished=[finished(0)]))
    stage.durable()
    stops.append(ev.TimeLimited(104.0, "time is up"))
    stage.clock.pass_(TICK_S)
    [recall] = [message for message in stage.step() if isinstance(message, m.Recall)]
    said = stage.hear(1, m.Recalled(0, recall.indexes))
    for _ in range(5):
        said += stage.step()
    assert assigned(said) == [6], "what is long would be late, what is short would not"
    assert stage.coordinator.plane.totals.set_aside == 5
    assert stage.coordinator.snapshot().queued == 1, "the others are not kept in memory"


def test_what_runs_twice_is_given_up_once_at_the_deadline_of_a_drain() -> None:
    asked: list[ev.DrainRequested] = []
    stage = Stage(["one", "two"], 2, Limits(prefetch=0), stops=lambda: asked.copy())
    stage.ready(1, 1)
    stage.ready(2, 1)
    stage.hear(1, m.Report(started=[(0, 1)]))
    stage.hear(2, m.Report(started=[(1, 1)]))
    stage.clock.pass_(1.0)
    stage.hear(1, m.Report(made_tokens=1000))
    stage.hear(2, m.Report(made_tokens=20))
    stage.clock.pass_(1.0)
    stage.hear(2, m.Report(made_tokens=20))
    stage.clock.pass_(0.5)
    assert [item.attempt for item in _items(stage.hear(1, m.Report(finished=[finished(0, tokens=512)])))] == [2]
    stage.durable()
    asked.append(ev.DrainRequested("asked to", stage.clock() + 1.0))
    for _ in range(2):
        stage.clock.pass_(1.0)
        stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")
    assert stage.coordinator.plane.totals.unfinished == 1
    assert not stage.coordinator.in_flight


def _items(messages: list[Any]) -> list[m.WorkItem]:
    return [item for message in messages if isinstance(message, m.Assign) for item in message.items]


def test_stop_request_is_looked_for_at_every_tick_and_drains() -> None:
    reasons: list[list[ev.DrainRequested]] = [[], [ev.DrainRequested("asked by llmpi stop")]]
    stage = Stage(["x"] * 5, stops=lambda: reasons.pop(0) if reasons else [])
    stage.step()
    assert stage.coordinator.outcome is None
    stage.clock.pass_(TICK_S / 2)
    stage.step()
    assert len(reasons) == 1, "between ticks nothing is asked"
    stage.clock.pass_(TICK_S)
    stage.step()
    stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked by llmpi stop")
