"""`llmpi bench engine --calibrate`: what it asks of an engine, and what it stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.calibrate import Calibration, Series, row_counts
from scheduling.errors import ConfigError
from scheduling.requests import Sampling
from scheduling.servicetime import parse_service_times
from tests.launch import run_alone
from workers.protocol import EngineConfig

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize(
    ("slots", "contexts", "expected"), [(1, 1, [1]), (2, 1, [1, 2]), (8, 1, [1, 2, 4, 8]), (24, 2, [1, 2, 4, 8, 12])]
)
def test_the_curve_goes_up_to_the_slots_of_a_context(slots: int, contexts: int, expected: list[int]) -> None:
    assert row_counts(EngineConfig(model="m", slots=slots, contexts=contexts)) == expected


def test_the_timed_request_comes_last_and_ends_before_all_others() -> None:
    jobs = Series(3, 8, 12).jobs(2, GREEDY, 1000, seed=0)
    assert [job.request.sampling.max_tokens for job in jobs] == [24] * 5 + [13]
    assert len({job.request.prompt for job in jobs}) == 6
    assert all(job.request.sampling.ignore_eos for job in jobs)
    [alone] = Series(1, 500, 0).jobs(1, GREEDY, 1000, seed=0)
    assert (len(alone.request.prompt), alone.request.sampling.max_tokens) == (500, 1)


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ctx 32"):
        Calibration(None, EngineConfig(model="m", slots=1, ctx_tokens=32), GREEDY)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.system
def test_an_engine_is_measured_and_its_times_stored(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    options = ("--calibrate", "--slots", 3, "--ctx", 96, "--repeats", 1, "--threads", 1, "-o", path)
    done = run_alone("bench", "engine", "-m", tiny_model, *options, "--json")
    assert done.rc == 0, done.output
    told = json.loads(done.stdout)
    times = parse_service_times(path.read_bytes(), str(path))
    assert told["file"] == str(path)
    assert {row["what"] for row in told["residuals"]} >= {"prompt of 32", "prompt of 72", "step of 3, 14 cells each"}
    assert times.decode_rows == (1, 2, 3)
    measured = times.measured
    assert (measured.slots, measured.contexts, measured.ctx_tokens, measured.threads) == (3, 1, 96, 1)
    assert (measured.backend, measured.device, measured.steady) == ("CPU", "CPU", False)
    assert measured.model == tiny_model.stem
    table = run_alone("bench", "engine", "-m", tiny_model, *options)
    assert table.rc == 0, table.output
    assert f"stored in {path}" in table.stdout


@pytest.mark.slow
@pytest.mark.system
def test_where_nothing_can_be_stored_nothing_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    done = run_alone("bench", "engine", "-m", tiny_model, "--calibrate", "-o", tmp_path / "none" / "times.json")
    assert done.rc == 2, done.output
    assert "there is no folder" in done.stderr
