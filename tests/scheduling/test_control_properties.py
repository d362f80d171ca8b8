"""The control plane under everything that can happen, in any order. `fakes` plays it, `oracle` judges it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scheduling.fakes import Scenario, World, scenario_of

seeds = st.integers(0, 2**32 - 1)
shapes = {
    "seed": seeds,
    "workers": st.integers(1, 6),
    "slots": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "requests": st.integers(0, 30),
    "prefetch": st.sampled_from([None, 0, 1, 4]),
}
quick = settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.slow
@quick
@given(st.builds(Scenario, schedule=st.sampled_from(["work-stealing", "round-robin"]), **shapes))
def test_every_request_ends_once_whatever_fails(scenario: Scenario) -> None:
    World(scenario).run()


@pytest.mark.slow
@quick
@given(st.builds(Scenario, drain=st.just(True), faults=st.booleans(), **shapes))
def test_a_drain_starts_nothing_new_and_ends(scenario: Scenario) -> None:
    outcome = World(scenario).run().stops[0].outcome
    assert outcome in ("done", "drained", "no workers")


@pytest.mark.slow
@quick
@given(
    st.builds(
        Scenario, schedule=st.sampled_from(["work-stealing", "round-robin"]), limit=st.just(True), drain=st.booleans(),
        faults=st.booleans(), **shapes,
    )
)  # fmt: skip
def test_before_a_time_limit_nothing_starts_that_would_be_late_and_at_it_all_is_over(scenario: Scenario) -> None:
    outcome = World(scenario).run().stops[0].outcome
    assert outcome in ("done", "drained", "no workers")


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.builds(Scenario, faults=st.just(False), copies=st.booleans(), last_steps=st.sampled_from([0, 200]), **shapes))
def test_without_faults_nothing_is_late_but_of_copies_nothing_is_retried_and_all_is_done(scenario: Scenario) -> None:
    oracle = World(scenario).run()
    totals = oracle.plane.totals
    assert oracle.stops[0].outcome == "done"
    assert (totals.late, totals.retried) == (totals.copies, 0)
    assert totals.done + totals.failed == scenario.requests


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.builds(Scenario, schedule=st.just("round-robin"), faults=st.just(False), **shapes))
def test_round_robin_gives_the_kth_request_to_the_kth_worker_in_turn(scenario: Scenario) -> None:
    oracle = World(scenario).run()
    turns = [worker for _, worker in sorted(oracle.assigned)]
    assert turns == [1 + k % scenario.workers for k in range(len(turns))]


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.builds(Scenario, faults=st.just(False), steps=st.integers(0, 120), **shapes))
def test_without_faults_no_worker_is_idle_for_long_while_work_could_move(scenario: Scenario) -> None:
    """From any state on, with messages that are delivered, an idle worker has work within four rounds: the recall
    goes out, its confirmation comes in, the work goes out, it starts. Or another one has it, who was idle as well."""
    world = World(scenario)
    for _ in range(scenario.steps):
        world.step()
    idle = dict.fromkeys(world.workers, 0)
    while not world.oracle.stops:
        assigned = len(world.oracle.assigned)
        world.round(finishes=1)
        if len(world.oracle.assigned) > assigned:
            idle = dict.fromkeys(world.workers, 0)
        for worker in world.workers.values():
            elsewhere = any(len(other.held) + len(other.running) > other.slots for other in world.workers.values())
            has_none = worker.engine_up and not worker.held and not worker.running
            idle[worker.id] = idle[worker.id] + 1 if has_none and elsewhere else 0
            assert idle[worker.id] <= 4, f"rank {worker.id} has been idle for {idle[worker.id]} rounds"


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.builds(
        Scenario,
        killers=st.lists(st.integers(0, 30), max_size=3).map(tuple),
        faults=st.just(False),
        schedule=st.sampled_from(["work-stealing", "round-robin"]),
        **shapes,
    )
)
def test_of_requests_that_ran_together_only_those_that_kill_engines_are_failed_for_it(scenario: Scenario) -> None:
    world = World(scenario)
    oracle = world.run()
    assert oracle.stops[0].outcome == "done"
    assert oracle.given_up <= set(scenario.killers)
    assert oracle.given_up | world.rejected >= {index for index in scenario.killers if index < scenario.requests}


@pytest.mark.slow
def test_scenarios_of_every_kind_hold_for_two_hundred_seeds() -> None:
    outcomes = {World(scenario_of(seed)).run().stops[0].outcome for seed in range(200)}
    assert outcomes == {"done", "drained", "no workers"}


def test_a_scenario_plays_the_same_way_twice() -> None:
    one, other = World(scenario_of(5)), World(scenario_of(5))
    one.run()
    other.run()
    assert list(one.story) == list(other.story)
