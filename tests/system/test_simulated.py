"""Whole jobs on the simulated engine: no model, no llama.cpp, and everything else is the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import Argument, Launcher, run_alone
from tests.system.runs import (
    PATIENCE_S,
    Gate,
    Run,
    check_one_clear_line,
    check_ranks_add_up,
    prompts,
    until,
    write_lines,
)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 200
IDS = [f"r{k}" for k in range(REQUESTS)]
SIMULATED = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 4)


def job(tmp_path: Path, run: Run, time_scale: str) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, temperature=1))]
    given = write_lines(tmp_path / "in.jsonl", lines)
    return ("batch", *SIMULATED, "--time-scale", time_scale, "-i", given, "-o", run.path)


def texts(run: Run) -> dict[str, str]:
    return {name: line["response"]["body"]["choices"][0]["text"] for name, line in run.by_id().items()}


def test_every_request_is_answered_once_with_the_same_words_on_any_number_of_ranks(
    mpirun: Launcher, tmp_path: Path
) -> None:
    three, one = Run(tmp_path / "three"), Run(tmp_path / "one")
    done = mpirun(3, *job(tmp_path, three, "0.02"), "--schedule", "work-stealing")
    assert done.rc == 0, done.output
    assert "the answers mean nothing" in done.stdout
    three.check_whole(IDS)
    check_ranks_add_up(three)
    assert all(rank["requests"] > 0 for rank in three.metrics()["ranks"])
    assert run_alone(*job(tmp_path, one, "0.0")).rc == 0
    assert texts(one) == texts(three)


def test_a_killed_engine_costs_its_requests_an_attempt_and_changes_no_answer(mpirun: Launcher, tmp_path: Path) -> None:
    gate, run, undisturbed = Gate.closed(tmp_path / "gate"), Run(tmp_path / "run"), Run(tmp_path / "undisturbed")
    # Copies, of which a loaded machine makes some, have attempts of their own.
    with mpirun.start(3, *job(tmp_path, run, "0.02"), "--no-copies", env=gate.env) as started:
        until(gate.held, "an engine with requests that run")[0].kill()
        gate.open()
        done = started.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    assert "engine was lost" in done.stderr, done.output
    run.check_whole(IDS)
    assert {line["llmpi"]["attempt"] for line in run.record()} == {1, 2}
    assert run_alone(*job(tmp_path, undisturbed, "0.0")).rc == 0
    assert texts(run) == texts(undisturbed)


def test_ranks_are_refused_together_where_the_times_cannot_be_read(mpirun: Launcher, tmp_path: Path) -> None:
    words = job(tmp_path, Run(tmp_path / "run"), "1.0")
    done = mpirun(3, *words, "--service-times", tmp_path / "none.json")
    check_one_clear_line(done, 2, "--service-times", "none.json")
