"""Engines of real jobs that die, hang and cannot start, and requests that kill them: nobody else is hurt."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from scheduling.suspects import UNPROVEN_TRIES
from tests.launch import ROOT, Argument, Launcher, run_alone, start_alone
from tests.system.runs import (
    PATIENCE_S,
    Gate,
    Run,
    check_one_clear_line,
    prompts,
    until,
    wait_gone,
    write_lines,
)

pytestmark = [pytest.mark.system, pytest.mark.slow]
ONE_MPI = pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
"""What these tests are about is above MPI, and each job takes seconds."""

REQUESTS = 101
IDS = [f"r{k}" for k in range(REQUESTS)]
POISON = 37
SIMULATED = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 4)


def words(folder: Path, run: Run, *more: Argument) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, temperature=1))]
    return ("batch", *SIMULATED, "-i", write_lines(folder / "in.jsonl", lines), "-o", run.path, "-q", *more)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run answers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder / "run")
    done = run_alone(*words(folder, run, "--time-scale", "0.0"))
    assert done.rc == 0, done.output
    return texts_of(run)


def texts_of(run: Run) -> dict[str, Any]:
    return {name: line["response"]["body"]["choices"] for name, line in run.by_id().items() if line["response"]}


def in_engines(folder: Path, code: str) -> dict[str, str]:
    """An environment in which `code` is run when an engine starts."""
    folder.mkdir()
    lines = ["import sys", 'if any("workers.engine_main" in word for word in sys.orig_argv):']
    lines += [f"    {line}" for line in code.strip().splitlines()]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


# ---------------------------------------------------------------- engines that die in the middle of a batch


@pytest.mark.mpi
@ONE_MPI
def test_engines_that_die_in_any_way_in_the_middle_of_a_batch_change_no_answer(
    mpirun: Launcher, tmp_path: Path, texts: dict[str, Any]
) -> None:
    """One rank's engines die three times in a row, each in its way, with requests that run: none of these is failed."""
    gate, run = Gate.closed(tmp_path / "gate"), Run(tmp_path / "run")
    ways = [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL]
    # Copies, of which a loaded machine makes some, have attempts of their own.
    with mpirun.start(3, *words(tmp_path, run, "--time-scale", "0.02", "--no-copies"), env=gate.env) as job:
        until(lambda: len(gate.held()) == 2, "engines with requests that run")
        victim = gate.held()[0]
        rank = victim.ppid()
        for way in ways:
            victim.send_signal(way)
            wait_gone([victim])
            if way is not ways[-1]:
                [victim] = until(
                    lambda: [each for each in gate.held() if each.ppid() == rank],
                    "the next engine of the same rank",
                )
        gate.open()
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    for way in ways:
        assert f"its engine was lost (killed by {way.name}" in done.stderr, done.output
    run.check_whole(IDS)
    assert texts_of(run) == texts
    attempts = [line["llmpi"]["attempt"] for line in run.record()]
    assert {1, 2} <= set(attempts) <= {1, 2, 3, 4}
    assert run.metrics()["attrs"]["retried"] == sum(attempts) - len(attempts)
    assert sorted(run.metrics()["ranks"]["engine_restarts"]) == [0, 3]


@pytest.mark.mpi
@ONE_MPI
def test_a_stopped_engine_is_replaced_after_its_lease(mpirun: Launcher, tmp_path: Path, texts: dict[str, Any]) -> None:
    gate, run = Gate.closed(tmp_path / "gate"), Run(tmp_path / "run")
    job_words = words(tmp_path, run, "--time-scale", "0.02", "--engine-lease", 6)
    with mpirun.start(3, *job_words, env=gate.env) as job:
        stopped = until(gate.held, "an engine with requests that run")[0]
        stopped.suspend()
        gate.open()
        done = job.wait(PATIENCE_S)
        wait_gone([stopped])
    assert done.rc == 0, done.output
    assert "it had work and made no step for 6 s (--engine-lease), and was killed" in done.stderr, done.output
    run.check_whole(IDS)
    assert texts_of(run) == texts
    assert 2 in {line["llmpi"]["attempt"] for line in run.record()}


def test_a_killed_engine_of_a_real_model_changes_no_answer(tmp_path: Path, tiny_model: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(12, max_tokens=12, ignore_eos=True))
    options = ("batch", "-m", tiny_model, "-i", given, "--slots", 3, "--ctx", 128, "-q")
    gate, run, undisturbed = Gate.closed(tmp_path / "gate"), Run(tmp_path / "run"), Run(tmp_path / "undisturbed")
    with start_alone(*options, "-o", run.path, env=gate.env) as job:
        until(gate.held, "an engine with requests that run")[0].send_signal(signal.SIGSEGV)
        gate.open()
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    run.check_whole(f"r{k}" for k in range(12))
    assert {line["llmpi"]["attempt"] for line in run.record()} == {1, 2}
    assert run_alone(*options, "-o", undisturbed.path).rc == 0
    assert texts_of(run) == texts_of(undisturbed)


# ---------------------------------------------------------------- requests that kill engines

POISONOUS = {
    "while it runs": f"""
from workers.outbox import Outbox
send = Outbox.send
def deadly(self, message):
    send(self, message)
    if {POISON} in getattr(message, "started", ()):
        import os
        os.abort()
Outbox.send = deadly
""",
    "while its prompt is read": f"""
from workers.engine import BatchingEngine
prepare = BatchingEngine._prepare_prompt
def deadly(self, task):
    if task.key == {POISON}:
        import os
        os.abort()
    prepare(self, task)
BatchingEngine._prepare_prompt = deadly
""",
}


@pytest.mark.mpi
@ONE_MPI
@pytest.mark.parametrize("when", POISONOUS)
def test_a_request_that_kills_every_engine_fails_alone(
    mpirun: Launcher, tmp_path: Path, texts: dict[str, Any], when: str
) -> None:
    run = Run(tmp_path / "run")
    env = in_engines(tmp_path / "hook", POISONOUS[when])
    done = mpirun(3, *words(tmp_path, run, "--time-scale", "0.02"), env=env, timeout_s=PATIENCE_S)
    assert done.rc == 1, done.output
    run.check_whole(IDS, failed=1)
    poisonous = run.by_id()[f"r{POISON}"]
    assert poisonous["error"]["code"] == "engine_died"
    assert poisonous["error"]["message"].startswith("3 engines died while running this request: attempt 1 on rank ")
    assert ", alone: killed by SIGABRT" in poisonous["error"]["message"].split("attempt 3")[1]
    assert texts_of(run) == {name: text for name, text in texts.items() if name != f"r{POISON}"}
    assert "takes no more work" not in done.stderr, done.output
    assert "workers_lost" not in run.metrics()["attrs"]


def test_a_request_over_its_time_is_stopped_and_its_slot_is_used_by_others(tmp_path: Path) -> None:
    lines = prompts(5, ignore_eos=True, max_tokens=2)
    lines[1]["max_tokens"] = 240
    run = Run(tmp_path / "run")
    given = write_lines(tmp_path / "in.jsonl", lines)
    options = ("--slots", 1, "--time-scale", "20", "--request-timeout", 6, "-q")
    done = run_alone("batch", *SIMULATED, "-i", given, "-o", run.path, *options)
    assert done.rc == 1, done.output
    run.check_whole((line["custom_id"] for line in lines), failed=1)
    error = run.by_id()["r1"]["error"]
    assert error["code"] == "timeout"
    assert error["message"].startswith("it ran for longer than --request-timeout 6 and was stopped after ")
    assert 6 <= run.by_id()["r1"]["llmpi"]["e2e_s"] < PATIENCE_S


# ---------------------------------------------------------------- engines that cannot start, or not any more

CANNOT_LOAD = """
from scheduling.errors import EngineError
from workers import engine_main
def refuse(config, outbox):
    raise EngineError("CUDA0: cudaMalloc failed: out of memory")
engine_main.load = refuse
"""


@pytest.mark.mpi
@ONE_MPI
def test_without_any_engine_the_job_ends_at_once_with_each_ones_reason(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(3, *words(tmp_path, Run(tmp_path / "run")), env=in_engines(tmp_path / "hook", CANNOT_LOAD))
    check_one_clear_line(done, 4, "rank 1 on ", "rank 2 on ", "cudaMalloc failed: out of memory")


def test_an_engine_that_always_dies_at_work_ends_the_job_and_not_its_requests(tmp_path: Path) -> None:
    """What is broken is not the requests. They are there for the next start of the run, but for very few."""
    run = Run(tmp_path / "run")
    env = in_engines(tmp_path / "hook", POISONOUS["while it runs"].replace(f"{POISON} in ", ""))
    done = run_alone(*words(tmp_path, run), env=env, timeout_s=PATIENCE_S)
    check_one_clear_line(done, 4, "rank 0: killed by SIGABRT", "6 of its engines have died")
    assert len(run.record()) <= UNPROVEN_TRIES
    status = run_alone("status", run.path, "--json")
    assert (status.rc, json.loads(status.stdout)["ok"]) == (3, 0)
