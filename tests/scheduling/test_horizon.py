"""What can still end in time: paces, estimates, and the plane's decisions before a time limit and during a drain."""

from __future__ import annotations

import pytest

from scheduling.control import ControlPlane, Limits
from scheduling.ending import Mode
from scheduling.events import (
    Assign,
    Committed,
    DrainRequested,
    Drop,
    Exhausted,
    GiveUp,
    InputEnded,
    NewRequest,
    Recall,
    RecallConfirmed,
    Record,
    Reported,
    RequestsArrived,
    Stop,
    Tick,
    TimeLimited,
    WorkerReady,
)
from scheduling.horizon import MEMORY_REQUESTS, PROMPT_STEPS, Horizon, Pace
from tests.scheduling.fakes import answer

OUTPUT = 4.8
"""Tokens that a request with a limit of 8 is expected to give before any has ended."""


def plane_of(workers: int = 1, slots: int = 1, prefetch: int = 1, schedule: str = "work-stealing") -> ControlPlane:
    ids = range(1, workers + 1)
    plane = ControlPlane(ids, schedule, 0.0, limits=Limits(prefetch=prefetch, prefetch_horizon_s=0.0, lease_s=None))
    for worker in ids:
        plane.handle(WorkerReady(worker, slots), 0.0)
    return plane


def arrive(plane: ControlPlane, *steps: float, now: float, first: int) -> list[object]:
    """Requests of about that many steps, prompt and expected output together."""
    news = [NewRequest(first + k, round((size - OUTPUT) / PROMPT_STEPS), 8) for k, size in enumerate(steps)]
    return list(plane.handle(RequestsArrived(news), now))


def run_one(plane: ControlPlane, worker: int, index: int, start: float, end: float) -> None:
    """The worker starts the request and ends it; its answer is durable at once."""
    plane.handle(Reported(worker, [(index, 1)], [], []), start)
    plane.handle(Reported(worker, [], [answer(index)], []), end)
    plane.handle(Committed(1), end)


# ---------------------------------------------------------------- paces


def test_a_pace_is_time_over_steps_and_recent_requests_weigh_more() -> None:
    pace = Pace()
    assert pace.step_s is None
    pace.observe(10.0, 100.0)
    assert pace.step_s == pytest.approx(0.1)
    pace.observe(30.0, 100.0)
    assert 0.2 < (pace.step_s or 0.0) < 0.202
    for _ in range(8 * MEMORY_REQUESTS):
        pace.observe(1.0, 100.0)
    assert pace.step_s == pytest.approx(0.01, rel=0.01)


def test_a_worker_is_taken_to_be_like_the_others_until_it_has_ended_something() -> None:
    horizon = Horizon()
    horizon.ended(1, 10.0, 100.0)
    assert horizon.expected_s(2, 50.0, 99.0) == pytest.approx(5.0)
    horizon.ended(2, 100.0, 100.0)
    assert horizon.expected_s(1, 50.0, 99.0) == pytest.approx(5.0)
    assert horizon.expected_s(2, 50.0, 99.0) == pytest.approx(50.0)


def test_while_nothing_has_ended_requests_start_until_half_of_the_time_is_over() -> None:
    horizon = Horizon()
    horizon.end_at = 110.0
    assert horizon.in_time(1, 1e9, 109.0), "nothing runs yet: one has to start for anything to be known"
    horizon.started(10.0)
    assert horizon.in_time(1, 1e9, 60.0)
    assert not horizon.in_time(1, 1.0, 60.1)


def test_without_a_limit_everything_is_in_time() -> None:
    horizon = Horizon()
    horizon.ended(1, 1e9, 1.0)
    assert horizon.in_time(1, 1e9, 0.0)


# ---------------------------------------------------------------- a drain with a deadline


def running(plane: ControlPlane, *indexes: int, now: float = 1.0) -> None:
    plane.handle(RequestsArrived([NewRequest(index, 10) for index in indexes]), now)
    plane.handle(Reported(1, [(index, 1) for index in indexes], [], []), now)


def test_what_still_runs_at_the_deadline_is_given_up_counted_and_late_afterwards() -> None:
    plane = plane_of(slots=2)
    running(plane, 0, 1)
    assert plane.handle(DrainRequested("asked to", 10.0), 2.0) == [Exhausted(True)]
    assert plane.handle(Reported(1, [], [answer(0)], []), 5.0) == [Record(1, [answer(0)])]
    assert plane.handle(Tick(), 9.9) == []
    assert plane.handle(Tick(), 10.0) == [GiveUp(1, [(1, 1)])], "the answer that came is not durable yet"
    assert plane.handle(Committed(1), 10.1) == [Stop("drained", "asked to")]
    assert (plane.totals.unfinished, plane.totals.done, plane.totals.accepted) == (1, 1, 1)
    assert plane.handle(Reported(1, [], [answer(1)], []), 10.2) == [Drop(1, [(1, 1)])]
    plane.check()


def test_a_recall_that_nobody_confirms_does_not_hold_a_drain_up() -> None:
    plane = plane_of(slots=1)
    plane.handle(RequestsArrived([NewRequest(0, 10), NewRequest(1, 10)]), 1.0)
    out = plane.handle(DrainRequested("asked to", 10.0), 1.0)
    assert Recall(1, 0, [0, 1]) in out
    assert plane.handle(Tick(), 10.0) == [GiveUp(1, [(0, 1), (1, 1)]), Stop("drained", "asked to")]
    plane.handle(RecallConfirmed(1, 0, [0, 1]), 11.0)
    plane.check()


def test_of_several_drains_the_earliest_deadline_counts() -> None:
    plane = plane_of()
    running(plane, 0)
    plane.handle(DrainRequested("asked to", 10.0), 2.0)
    plane.handle(DrainRequested("again", 20.0), 2.0)
    plane.handle(DrainRequested("and again"), 2.0)
    plane.handle(TimeLimited(8.0, "time is up"), 2.0)
    assert plane.handle(Tick(), 7.9) == []
    assert plane.handle(Tick(), 8.0) == [GiveUp(1, [(0, 1)]), Stop("drained", "asked to")]


def test_a_drain_without_a_deadline_waits() -> None:
    plane = plane_of()
    running(plane, 0)
    plane.handle(DrainRequested("asked to"), 2.0)
    assert plane.handle(Tick(), 1e9) == []


# ---------------------------------------------------------------- a time limit


def measured(prefetch: int = 1) -> ControlPlane:
    """Rank 1 takes 0.1 s a step, at t = 10."""
    plane = plane_of(prefetch=prefetch)
    arrive(plane, 100, now=0.0, first=0)
    run_one(plane, 1, 0, 0.0, 10.0)
    return plane


def test_a_request_that_would_be_late_is_set_aside_and_a_shorter_one_behind_it_starts() -> None:
    plane = measured()
    plane.handle(TimeLimited(15.0, "time is up"), 10.0)
    out = arrive(plane, 100, 100, 40, now=10.0, first=1)
    assert out == [GiveUp(None, [(1, 1), (2, 1)]), Assign(1, [(3, 1)])]
    assert plane.totals.set_aside == 2
    plane.check()


def test_what_would_wait_too_long_for_a_slot_is_kept_back_and_not_set_aside() -> None:
    plane = measured(prefetch=4)
    plane.handle(TimeLimited(17.0, "time is up"), 10.0)
    arrive(plane, 40, 40, 40, now=10.0, first=1)
    assert plane.waiting >= 1
    assert plane.totals.set_aside == 0


def test_with_all_that_is_left_set_aside_the_run_is_not_done() -> None:
    plane = measured()
    plane.handle(TimeLimited(15.0, "time is up"), 10.0)
    arrive(plane, 100, now=10.0, first=1)
    assert plane.handle(InputEnded(), 10.0) == [Exhausted(True), Stop("drained", "time is up")]


def test_queued_work_that_has_become_late_is_recalled() -> None:
    plane = measured(prefetch=2)
    arrive(plane, 30, 30, 60, now=10.0, first=1)
    plane.handle(Reported(1, [(1, 1)], [], []), 10.0)
    plane.handle(TimeLimited(19.0, "time is up"), 10.0)
    assert plane.handle(Tick(), 12.9) == []
    assert plane.handle(Tick(), 13.1) == [Recall(1, 0, [3])]
    assert plane.handle(RecallConfirmed(1, 0, [3]), 13.2) == [GiveUp(None, [(3, 1)])]
    plane.check()


def test_queues_are_not_looked_through_while_the_longest_queued_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = measured(prefetch=32)
    arrive(plane, *[30] * 33, now=10.0, first=1)
    plane.handle(TimeLimited(120.0, "time is up"), 10.0)
    asked: list[float] = []
    in_time = Horizon.in_time

    def counted(horizon: Horizon, worker: int, steps: float, now: float, wait_s: float = 0.0) -> bool:
        asked.append(steps)
        return in_time(horizon, worker, steps, now, wait_s)

    monkeypatch.setattr(Horizon, "in_time", counted)
    assert plane.handle(Tick(), 115.0) == [], "the longest that was queued would be late, and has ended"
    asked.clear()
    assert plane.handle(Tick(), 116.0) == []
    assert len(asked) == 2, "the longest that is queued, and the shortest of all"
    [recall] = plane.handle(Tick(), 117.5)[:1]
    assert isinstance(recall, Recall)
    assert len(recall.indexes) == 33
    asked.clear()
    plane.handle(Tick(), 117.6)
    assert len(asked) <= 2
    plane.check()


def test_when_not_even_the_shortest_could_start_it_is_a_drain_and_what_is_queued_in_time_still_starts() -> None:
    plane = measured(prefetch=1)
    arrive(plane, 30, 30, now=10.0, first=1)
    plane.handle(Reported(1, [(1, 1)], [], []), 10.0)
    plane.handle(TimeLimited(16.1, "time is up"), 10.0)
    plane.handle(Reported(1, [(2, 1)], [answer(1)], []), 13.0)
    plane.handle(Committed(1), 13.0)
    assert plane.handle(Tick(), 13.0) == []
    assert plane.wanted() > 0
    assert plane.handle(Tick(), 13.2) == [Exhausted(True)]
    assert (plane.mode, plane.wanted()) == (Mode.DRAINING, 0)
    plane.handle(Reported(1, [], [answer(2)], []), 15.9)
    assert plane.handle(Committed(1), 16.0) == [Stop("drained", "time is up")]
    assert plane.totals.unfinished == 0


def test_at_the_limit_what_runs_is_given_up() -> None:
    plane = plane_of()
    running(plane, 0)
    plane.handle(TimeLimited(5.0, "time is up"), 1.0)
    assert plane.handle(Tick(), 5.0) == [Exhausted(True), GiveUp(1, [(0, 1)]), Stop("drained", "time is up")]


def test_a_slow_worker_is_passed_over_for_one_that_ends_in_time() -> None:
    plane = plane_of(workers=2)
    arrive(plane, 100, 100, now=0.0, first=0)
    run_one(plane, 1, 0, 0.0, 10.0)
    run_one(plane, 2, 1, 0.0, 50.0)
    plane.handle(TimeLimited(70.0, "time is up"), 50.0)
    assert arrive(plane, 100, now=50.0, first=2) == [Assign(1, [(2, 1)])]
    assert arrive(plane, 100, now=51.0, first=3) == [], "rank 2 would be late, rank 1 has no room"
    assert plane.totals.set_aside == 0
    assert plane.waiting == 1


def test_a_slow_idle_worker_steals_nothing_that_it_could_not_end() -> None:
    plane = plane_of(workers=2, prefetch=3)
    arrive(plane, 100, 100, now=0.0, first=0)
    run_one(plane, 1, 0, 0.0, 1.0)
    run_one(plane, 2, 1, 0.0, 50.0)
    plane.handle(TimeLimited(70.0, "time is up"), 50.0)
    arrive(plane, 100, 100, 100, now=50.0, first=2)
    out = plane.handle(InputEnded(), 50.0)
    assert not [each for each in out if isinstance(each, Recall)]
    assert all(view.load_tokens == 0 for view in plane.workers() if view.id == 2)


def test_round_robin_sets_aside_by_the_pace_of_whose_turn_it_is() -> None:
    plane = plane_of(workers=2, schedule="round-robin")
    arrive(plane, 100, 100, now=0.0, first=0)
    run_one(plane, 1, 0, 0.0, 10.0)
    run_one(plane, 2, 1, 0.0, 50.0)
    plane.handle(TimeLimited(70.0, "time is up"), 50.0)
    assert arrive(plane, 100, 100, now=50.0, first=2) == [GiveUp(None, [(3, 1)]), Assign(1, [(2, 1)])]
