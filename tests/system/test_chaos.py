"""A few of the schedules that `python -m tests.system.chaos` plays, and that they are what they claim to be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from tests.launch import Launcher
from tests.system.chaos import DEATHS_MAX, ENGINE_DEATHS, Fault, World, ends, play, schedule_of


@pytest.fixture(scope="module")
def world(mpirun: Launcher, real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(mpirun, real_model, tmp_path_factory.mktemp("chaos"))


def played(world: World, folder: Path, seed: int, *, ulfm: bool) -> None:
    schedule = schedule_of(seed, ulfm=ulfm)
    assert schedule.ulfm is ulfm
    met = play(schedule, world, folder)
    assert met.total() > met["jobs"], f"it met nothing: {schedule}"


@pytest.mark.mpi
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize(("mpirun", "seed"), [("openmpi", 6), ("openmpi", 59), ("mpich", 36)], indirect=["mpirun"])
def test_a_run_under_random_faults_ends_like_an_undisturbed_one(world: World, tmp_path: Path, seed: int) -> None:
    played(world, tmp_path, seed, ulfm=False)


@pytest.mark.mpi
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_a_run_that_may_survive_the_death_of_ranks_ends_like_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    played(world, tmp_path, 7, ulfm=True)


def test_a_seed_is_a_schedule_and_schedules_have_every_fault_on_every_engine() -> None:
    schedules = [schedule_of(seed) for seed in range(1, 101)]
    assert schedules == [schedule_of(seed) for seed in range(1, 101)]
    met = Counter((schedule.engine, act.fault) for schedule in schedules for act in schedule.acts)
    assert {(engine, fault) for engine in ("simulated", "tiny") for fault in get_args(Fault)} == met.keys()
    assert {schedule.ranks for schedule in schedules} == {3, 4, 5, 6}
    assert {schedule.ulfm for schedule in schedules} == {False, True}


def test_no_request_can_meet_so_many_deaths_in_one_job_that_it_must_fail() -> None:
    for seed in range(1, 101):
        schedule, deaths = schedule_of(seed), 0
        for act in schedule.acts:
            deaths = 0 if ends(act.fault, schedule.ulfm) else deaths + (act.fault in ENGINE_DEATHS)
            assert deaths <= DEATHS_MAX


def test_without_ulfm_a_seed_is_the_same_schedule_otherwise() -> None:
    for seed in range(1, 20):
        assert schedule_of(seed).acts == schedule_of(seed, ulfm=False).acts
        assert not schedule_of(seed, ulfm=False).ulfm
