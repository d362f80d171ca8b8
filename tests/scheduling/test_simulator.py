"""The simulated cluster, against cases that can be computed by hand, and the schedules' goals on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.control import Limits
from scheduling.errors import ConfigError
from scheduling.simulator import list_schedule, lower_bound, simulate

lengths = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=25)
speeds = st.lists(st.sampled_from([0.2, 0.5, 1.0, 2.0]), min_size=1, max_size=5)


def lognormal(count: int, seed: int, sigma: float = 1.0) -> list[float]:
    values: list[float] = np.random.default_rng(seed).lognormal(0.0, sigma, count).tolist()
    return values


def test_one_request_takes_its_time_and_its_messages() -> None:
    run = simulate([2.0], [0.5], "work-stealing", latency_s=0.001)
    assert run.makespan_s == pytest.approx(4.0 + 3 * 0.001)  # ready, assign, report
    assert run.busy_s == (4.0,)
    assert run.requests == (1,)


def test_slots_run_side_by_side() -> None:
    run = simulate([1.0] * 8, [1.0, 1.0], "round-robin", slots=4, latency_s=0.0)
    assert run.makespan_s == pytest.approx(1.0)
    assert run.busy_s == (4.0, 4.0)


def test_round_robin_waits_for_the_slow_worker_and_stealing_does_not() -> None:
    slow = [1.0, 0.1]
    assert simulate([1.0] * 10, slow, "round-robin", latency_s=0.0).makespan_s == pytest.approx(50.0)
    stealing = simulate([1.0] * 10, slow, "work-stealing", latency_s=0.0)
    assert stealing.makespan_s == pytest.approx(10.0)
    assert stealing.stolen == 1


def test_a_straggler_is_started_again_where_it_ends_sooner() -> None:
    """Three requests run one after the other on the fast worker while one runs on the slow one."""
    alone = simulate([1.0] * 4, [1.0, 0.1], "work-stealing", latency_s=0.0, limits=Limits(copies=False, lease_s=None))
    assert alone.makespan_s == pytest.approx(10.0)
    assert alone.wasted_s == pytest.approx(0.0)
    run = simulate([1.0] * 4, [1.0, 0.1], "work-stealing", latency_s=0.0)
    assert run.makespan_s == pytest.approx(4.0, abs=0.25 + 1e-9)
    assert (run.copies, run.copies_won, run.requests) == (1, 1, (4, 0))
    assert run.wasted_s == pytest.approx(run.makespan_s)
    assert simulate([1.0] * 4, [1.0, 0.1], "round-robin", latency_s=0.0).copies == 0


def test_free_slots_count_only_while_there_is_unstarted_work() -> None:
    run = simulate([1.0, 1.0, 1.0], [1.0, 1.0], "work-stealing", latency_s=0.0)
    assert run.free_slot_s == 0.0
    late = simulate([1.0] * 4, [1.0, 1.0], "work-stealing", latency_s=0.0, ready_s=[0.0, 1.5])
    assert sum(late.requests) == 4
    waiting = simulate([1.0] * 2, [1.0], "work-stealing", latency_s=0.25)
    assert waiting.free_slot_s == pytest.approx(0.25)  # from 'ready' being known until the assignment arrives


def test_a_function_gives_lengths_if_it_is_said_how_many() -> None:
    by_function = simulate(lambda k: 1.0 + k, [1.0, 1.0], "work-stealing", requests=5)
    assert by_function == simulate([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0], "work-stealing")
    with pytest.raises(ValueError, match="number of requests"):
        simulate(lambda k: 1.0, [1.0], "work-stealing")


def test_no_requests_end_at_once() -> None:
    run = simulate([], [1.0], "work-stealing")
    assert (run.makespan_s, run.requests) == (0.0, (0,))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="no schedule"):
        simulate([1.0], [1.0], "best")


def test_the_same_input_gives_the_same_run() -> None:
    one = simulate(lognormal(100, 3), [1.0, 0.3, 2.0], "work-stealing", slots=3)
    assert one == simulate(lognormal(100, 3), [1.0, 0.3, 2.0], "work-stealing", slots=3)


def test_list_scheduling_and_lower_bound_by_hand() -> None:
    assert list_schedule([3.0, 1.0, 1.0, 1.0], [1.0, 1.0]) == 3.0
    assert list_schedule([1.0, 1.0], [1.0, 4.0]) == pytest.approx(1.0)
    assert lower_bound([3.0, 1.0, 1.0, 1.0], [1.0, 1.0]) == 3.0
    assert lower_bound([4.0], [1.0, 2.0]) == 2.0
    assert lower_bound([4.0, 4.0], [1.0, 2.0]) == pytest.approx(8.0 / 3.0)
    assert lower_bound([1.0] * 6, [1.0], slots=3) == 2.0
    assert list_schedule([1.0] * 6, [1.0], slots=3) == 2.0


@given(lengths, speeds, st.integers(1, 3), st.sampled_from(["work-stealing", "round-robin"]))
@settings(max_examples=25)
def test_every_request_runs_once_and_none_beats_the_bound(
    service_s: list[float], speeds: list[float], slots: int, schedule: str
) -> None:
    run = simulate(service_s, speeds, schedule, slots=slots)
    assert sum(run.requests) == len(service_s)
    work_s = sum(busy_s * speed for busy_s, speed in zip(run.busy_s, speeds, strict=True))
    assert (work_s == pytest.approx(sum(service_s))) == (run.copies == 0)
    assert (run.wasted_s > 1e-9) == (run.copies > 0)
    bound_s = lower_bound(service_s, speeds, slots)
    assert run.makespan_s >= bound_s * (1 - 1e-9)
    assert list_schedule(service_s, speeds, slots) >= bound_s * (1 - 1e-9)


@given(lengths, speeds, st.integers(1, 3))
@settings(max_examples=25)
def test_copies_make_no_run_longer(service_s: list[float], speeds: list[float], slots: int) -> None:
    """They use slots that nothing else could use."""
    with_copies = simulate(service_s, speeds, "work-stealing", slots=slots)
    without = simulate(service_s, speeds, "work-stealing", slots=slots, limits=Limits(copies=False, lease_s=None))
    assert with_copies.makespan_s <= without.makespan_s + 1e-9
    assert without.copies == 0
    if with_copies.copies == 0:
        assert with_copies == without


@given(lengths, st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=25)
def test_stealing_keeps_grahams_bound_on_equal_workers(service_s: list[float], workers: int, slots: int) -> None:
    """Work conservation, measured: makespan <= work / slots + longest, and a few messages for every steal."""
    run = simulate(service_s, [1.0] * workers, "work-stealing", slots=slots, latency_s=1e-4)
    bound_s = sum(service_s) / (workers * slots) + max(service_s)
    assert run.makespan_s <= bound_s + 1e-4 * (3 + 4 * len(service_s))


def test_a_deeper_backlog_costs_nothing_under_stealing() -> None:
    service_s = lognormal(100, 1)
    shallow = simulate(service_s, [1.0, 1.0, 0.2], "work-stealing", limits=Limits(prefetch=0, lease_s=None))
    deep = simulate(service_s, [1.0, 1.0, 0.2], "work-stealing", limits=Limits(prefetch=40, lease_s=None))
    assert deep.stolen > shallow.stolen
    longest_s = max(service_s) / 0.2
    assert deep.makespan_s <= shallow.makespan_s + longest_s


@pytest.mark.slow
def test_stealing_reaches_its_goals_with_few_requests() -> None:
    over_list, over_round_robin = [], []
    for seed in range(60):
        service_s, speeds = lognormal(69, seed), [1.0] * 7 + [0.2]
        made_s = simulate(service_s, speeds, "work-stealing").makespan_s
        over_list.append(made_s / list_schedule(service_s, speeds))
        over_round_robin.append(made_s / simulate(service_s, speeds, "round-robin").makespan_s)
    assert np.median(over_list) <= 1.02
    assert np.median(over_round_robin) <= 0.5


@pytest.mark.slow
def test_stealing_reaches_its_goals_with_many_requests() -> None:
    over_bound, free = [], []
    for seed in range(8):
        service_s, speeds = lognormal(2000, seed), [1.0] * 7 + [0.2]
        run = simulate(service_s, speeds, "work-stealing")
        over_bound.append(run.makespan_s / lower_bound(service_s, speeds))
        free.append(run.free_slot_s / run.slot_s)
    assert np.median(over_bound) <= 1.05
    assert np.median(free) <= 0.01


@pytest.mark.slow
def test_copies_reach_their_goal_and_leave_equal_workers_alone() -> None:
    """One of four workers is five times slower: the run must end a third sooner, and waste little."""
    ratio, wasted = [], []
    for seed in range(30):
        service_s, speeds = lognormal(200, seed), [1.0, 1.0, 1.0, 0.2]
        run = simulate(service_s, speeds, "work-stealing", slots=8)
        without = simulate(service_s, speeds, "work-stealing", slots=8, limits=Limits(copies=False, lease_s=None))
        ratio.append(run.makespan_s / without.makespan_s)
        wasted.append(run.wasted_s / sum(run.busy_s))
        equal = simulate(service_s, [1.0] * 4, "work-stealing", slots=8)
        assert equal.copies == 0
    assert np.median(ratio) <= 0.67
    assert np.median(wasted) <= 0.15
