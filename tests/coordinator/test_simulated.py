"""A job on the simulated engine: which times, which engine, and that nobody takes it for a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import JobConfig
from coordinator.setup import prepare
from coordinator.simulated import read_service_times, simulated_engine
from scheduling.errors import ConfigError
from scheduling.messages import Placement
from scheduling.servicetime import EXAMPLE, ServiceTimes, service_times_json
from tests.launch import run_alone
from workers.protocol import EngineConfig

ON_CPU = Placement(gpu_uuids=(), device_mask={}, cpus=(0, 1), threads=2)
TWO_CONTEXTS = msgspec.structs.replace(EXAMPLE.measured, contexts=2, slots=6, ctx_tokens=300)
MEASURED = msgspec.structs.replace(EXAMPLE, measured=TWO_CONTEXTS)


def job(**options: Any) -> JobConfig:
    return JobConfig(model="any", engine="simulated", **options)


def engine(times: ServiceTimes = MEASURED, **options: Any) -> EngineConfig:
    return simulated_engine(job(**options), times, ON_CPU)


def test_without_a_file_the_times_are_the_examples() -> None:
    assert read_service_times(job()) == EXAMPLE
    assert read_service_times(job(time_scale=0.5)) == EXAMPLE.scaled(0.5)


def test_prefix_reuse_is_what_was_asked_for() -> None:
    assert engine().prefix_reuse
    assert not engine(prefix_reuse=False).prefix_reuse


def test_times_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_bytes(service_times_json(MEASURED))
    assert read_service_times(job(service_times=str(path))) == MEASURED


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_file_that_cannot_be_used_is_a_problem_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "times.json"
    if content is not None:
        path.write_bytes(content)
    setup = prepare(job(service_times=str(path)))
    assert isinstance(setup.problem, ConfigError)
    assert f"--service-times {path}" in str(setup.problem)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "llama", "service_times": "x"}, "--engine simulated"),
        ({"engine": "llama", "time_scale": 2.0}, "--engine simulated"),
        ({"engine": "simulated", "time_scale": -1.0}, "--time-scale"),
        ({"engine": "simulated", "time_scale": float("nan")}, "--time-scale"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JobConfig(model="m", **options)


def test_what_was_not_asked_for_is_as_it_was_measured() -> None:
    made = engine()
    assert (made.slots, made.contexts, made.ctx_tokens) == (6, 2, 300)
    assert made.service_times == MEASURED
    asked = engine(slots=40, ctx=64, max_tokens=9)
    assert (asked.slots, asked.contexts, asked.ctx_tokens, asked.max_tokens_default) == (40, 2, 64, 9)
    assert engine(slots=1).contexts == 1


def test_contexts_that_were_not_measured_are_refused_with_the_way_out() -> None:
    assert engine(contexts=2).contexts == 2
    with pytest.raises(ConfigError, match="--calibrate --contexts 3"):
        engine(contexts=3)


def test_it_needs_no_gpu_but_where_one_is_insisted_on() -> None:
    assert job().want_gpu is False
    assert job(device="gpu").want_gpu is True
    assert JobConfig(model="m").want_gpu is None
    assert JobConfig(model="m", device="cpu").want_gpu is False


def test_ranks_with_other_times_are_told_apart(tmp_path: Path) -> None:
    same, again, other = prepare(job()), prepare(job()), prepare(job(time_scale=0.5))
    assert same.fingerprint == again.fingerprint
    assert same.fingerprint != other.fingerprint
    assert same.model_name == "simulated-any"


@pytest.mark.slow
@pytest.mark.system
def test_a_simulated_run_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\nthree\n")
    run = tmp_path / "run"
    options = ("--engine", "simulated", "--time-scale", "0.01", "--max-tokens", 5, "-m", "whatever")
    done = run_alone("batch", *options, "-i", tmp_path / "in.txt", "-o", run)
    assert done.rc == 0, done.output
    assert "the answers mean nothing" in done.stdout
    again = run_alone("report", run)
    assert "the answers mean nothing" in again.stdout
    about = json.loads((run / "run.json").read_text())["details"]
    assert about["config"]["engine"] == "simulated"
    assert about["service_times"]["measured"]["model"] == EXAMPLE.measured.model
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {line["response"]["body"]["model"] for line in lines} == {"simulated-whatever"}
    quiet = run_alone("batch", *options, "-i", tmp_path / "in.txt", "-o", tmp_path / "quiet", "-q")
    assert "the answers mean nothing" in quiet.stderr
