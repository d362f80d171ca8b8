"""The simulation itself: it repeats itself, a quiet seed is a plain run, and what it finds it tells so that it can be
repeated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.launch import ROOT
from tests.simulation import weather
from tests.simulation.__main__ import main
from tests.simulation.bugs import BUGS, FIRST_SEEDS, planted
from tests.simulation.case import Case, in_simulation, simulate
from tests.simulation.faults import AT_ANY_TIME

pytestmark = pytest.mark.slow

SEEDS_MAX = 2_000


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with in_simulation(tmp_path):
        yield tmp_path


def test_every_kind_of_fault_has_a_rate_and_somebody_who_does_it() -> None:
    assert AT_ANY_TIME.keys() == weather.RATES_PER_S.keys()


def test_a_seed_repeats_itself_in_another_process_with_other_hashes() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "6", "--first-seed", "300", "--digests"]
    told = []
    for hashes, jobs in (("1", "1"), ("2", "3")):
        environ = os.environ | {"PYTHONHASHSEED": hashes}
        ran = subprocess.run(
            [*command, "--jobs", jobs], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=True
        )
        told.append(re.findall(r"^seed \d+: \d+ events, [0-9a-f]{32}$", ran.stdout, re.MULTILINE))
    assert len(told[0]) == 6
    assert told[0] == told[1]


def test_without_faults_the_run_is_complete_in_one_session_and_the_answers_are_those_expected(folder: Path) -> None:
    cases = [Case(seed, folder) for seed in range(20)]
    harmless = [case for case in cases if not case.work.poison]
    assert len(harmless) > 5
    for case in harmless[:4]:
        case.weather = weather.Weather(calm_at_s=0.0)
        case.shape.input.write_bytes(case.work.content)
        case.run()
        assert case.sessions == 2, "the command, and once more"
        assert not case.trace.faults
        assert len(case.books.promised) == len(case.work.expected)


def test_weather_is_quiet_in_some_seeds_and_stormy_in_others() -> None:
    kinds = [
        len(drawn.rates_per_s) + len(drawn.chances) for drawn in (weather.draw(Random(seed), 3) for seed in range(200))
    ]
    assert kinds.count(0) >= 5
    assert sum(kind >= 8 for kind in kinds) >= 20


def test_a_seed_that_fails_says_how_to_repeat_it_and_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--first-seed", "4", "--jobs", "1", "--bug", "nothing is synced"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 4 fails: make simulate SEEDS=1 FIRST_SEED=4"
    assert lines[1].strip() == "answers were acknowledged that are not on the disk"
    assert any("disk write results.jsonl" in line for line in lines[2:-1])
    assert re.match(r"2 seeds, 2 DO NOT HOLD: .* faults \(.*\); [0-9.]+ s, [0-9.]+ seeds/s$", lines[-1])


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, folder: Path, record_property: Callable[[str, object], None]) -> None:
    with planted(name):
        first = FIRST_SEEDS.get(name, 0)
        for seed in range(first, first + SEEDS_MAX):
            if simulate(seed, folder).violation:
                record_property("seeds", seed - first + 1)
                return
    pytest.fail(f"{SEEDS_MAX} seeds have not found it")
