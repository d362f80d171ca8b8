"""Runs that end early: drained, killed, or with a dead engine. Nothing is lost or doubled; the same command goes on.

The engines stand still at a gate until the test has interfered: how fast they are must not decide whether there is
something left to interrupt.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.launch import Argument, Finished, Job, Launcher, run_alone, start_alone
from tests.system.runs import (
    PATIENCE_S,
    Gate,
    Line,
    Run,
    check_one_clear_line,
    drain_signal,
    prompts,
    until,
    wait_for_answers,
    wait_gone,
    write_lines,
)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

Words = tuple[Argument, ...]

REQUESTS = 60
IDS = [f"r{k}" for k in range(REQUESTS)]


def long_work() -> list[Line]:
    """Requests of which no two neighbours are equally long: an engine's slots do not all become free at once."""
    return [line | {"max_tokens": 100 + 7 * (k % 8)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]


@pytest.fixture
def work(tiny_model: Path, tmp_path: Path, run: Run) -> Words:
    """The words of a `llmpi batch` with long work."""
    given = write_lines(tmp_path / "in.jsonl", long_work())
    return ("batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 256, "--slots", 4)


def wait_for_drain(job: Job) -> None:
    """Rank 0 has been told to stop, and has said so."""
    until(lambda: "draining" in job.stderr or job.process.poll() is not None, "the drain")
    assert "draining" in job.stderr, job.stdout + job.stderr


def check_stopped_early(run: Run) -> int:
    """`llmpi status` says that it can be resumed; returns how many requests are done."""
    status = run_alone("status", run.path, "--json")
    assert status.rc == 3, status.output
    told = json.loads(status.stdout)
    assert told["exit_code"] == 3
    assert not told["complete"]
    assert not told["running"]
    done: int = told["done"]
    assert 0 < done < told["total"]
    assert len(run.by_id()) == done
    return done


def check_resumed(done: Finished, run: Run, earlier: int) -> None:
    assert done.rc == 0, done.output
    said = re.search(r"resuming .*: ([\d,]+) requests? already done", done.stderr)
    assert said is not None, done.output
    assert int(said[1]) == earlier
    run.check_whole(IDS)
    sessions = {line["llmpi"]["session"] for line in run.record()}
    assert sessions == {0, 1}


def test_killed_run_resumes_where_its_record_ends(
    mpirun: Launcher, gate: Gate, work: Words, run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        os.killpg(job.process.pid, signal.SIGKILL)
        wait_gone(processes)  # they notice that their launcher is gone
    earlier = check_stopped_early(run)

    other = write_lines(tmp_path / "other.jsonl", prompts(3))
    refused = run_alone("batch", "-m", tiny_model, "-i", other, "-o", run.path, "--ctx", 256, "--slots", 4)
    check_one_clear_line(refused, 2, "another run")
    assert len(run.by_id()) == earlier

    check_resumed(mpirun(3, *work), run, earlier)

    again = mpirun(3, *work)
    assert again.rc == 0, again.output
    assert "complete already" in again.stderr
    status = run_alone("status", run.path)
    assert status.rc == 0, status.output
    assert f"{REQUESTS} of {REQUESTS}" in status.stdout

    record = run.path / "results.jsonl"
    *kept, lost = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(kept))
    mended = mpirun(3, *work)
    assert mended.rc == 0, mended.output
    assert f"{record} lacks {len(lost):,} bytes of answers that had been counted" in mended.stderr
    run.check_whole(IDS)


def test_drained_by_signal_it_finishes_what_runs_and_resumes(
    mpirun: Launcher, gate: Gate, work: Words, run: Run
) -> None:
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        job.process.send_signal(drain_signal(mpirun, mpich=signal.SIGINT))
        wait_for_drain(job)
        gate.open()
        stopped = job.wait(PATIENCE_S)
        wait_gone(processes)
    assert stopped.rc == 3, stopped.output
    assert "Traceback" not in stopped.stderr
    earlier = check_stopped_early(run)
    rows = run.metrics()["requests"]
    assert len(rows) == earlier, "a drained run has its metrics too"
    check_resumed(mpirun(3, *work), run, earlier)


def test_second_signal_stops_now_and_the_run_can_be_resumed(
    mpirun: Launcher, gate: Gate, work: Words, run: Run
) -> None:
    # The gate stays closed: what runs cannot be waited for.
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        job.process.send_signal(drain_signal(mpirun, mpich=signal.SIGINT))
        wait_for_drain(job)
        job.process.send_signal(drain_signal(mpirun, mpich=signal.SIGINT))
        stopped = job.wait(PATIENCE_S)
        wait_gone(processes)
    if mpirun.kind == "openmpi":
        assert stopped.rc == 3, stopped.output
        assert "stopped now" in stopped.stderr
    # MPICH's mpirun kills its ranks by itself then. Its status is whatever became of its own helpers, 0 too.
    check_stopped_early(run)


def test_drained_by_llmpi_stop(mpirun: Launcher, gate: Gate, work: Words, run: Run) -> None:
    with mpirun.start(3, *work, "--schedule", "round-robin", env=gate.env) as job:
        wait_for_answers(job, run)
        running = run_alone("status", run.path)
        assert running.rc == 3, running.output
        assert "running" in running.stdout
        second = run_alone(*work)
        check_one_clear_line(second, 2, str(run.path))
        asked = run_alone("stop", run.path)
        assert asked.rc == 0, asked.output
        wait_for_drain(job)
        gate.open()
        stopped = job.wait(PATIENCE_S)
    assert stopped.rc == 3, stopped.output
    assert "llmpi stop" in stopped.stderr
    check_stopped_early(run)
    nobody = run_alone("stop", run.path)
    check_one_clear_line(nobody, 2, "no job is running")


def test_ctrl_c_drains_the_mpirun_that_llmpi_started(mpirun: Launcher, gate: Gate, work: Words, run: Run) -> None:
    with start_alone(*work, "--ranks", 3, python=mpirun.python, env={**mpirun.env, **gate.env}) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        job.process.send_signal(signal.SIGINT)
        wait_for_drain(job)
        gate.open()
        stopped = job.wait(PATIENCE_S)
        wait_gone(processes)
    assert stopped.rc == 3, stopped.output
    check_stopped_early(run)


def test_killed_engine_costs_its_requests_an_attempt_and_nothing_else(
    mpirun: Launcher, gate: Gate, work: Words, run: Run
) -> None:
    # A copy of a request has an attempt of its own, and a loaded machine is slow enough for copies.
    with mpirun.start(3, *work, "--no-copies", env=gate.env) as job:
        wait_for_answers(job, run)
        until(gate.held, "an engine with requests that run")[0].kill()
        gate.open()
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    assert "engine was lost" in done.stderr, done.output
    assert "SIGKILL" in done.stderr or "signal 9" in done.stderr, done.output
    run.check_whole(IDS)
    again = [line for line in run.record() if line["llmpi"]["attempt"] > 1]
    assert 1 <= len(again) <= 4, "only what ran in the engine's four slots"
    assert {line["llmpi"]["attempt"] for line in again} == {2}
    metrics = run.metrics()
    assert sorted(metrics["ranks"]["engine_restarts"]) == [0, 1]
    assert int(metrics["attrs"]["retried"]) == len(again)


def test_engines_do_not_outlive_a_killed_rank(mpirun: Launcher, gate: Gate, work: Words, run: Run) -> None:
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        rank = until(gate.held, "an engine with requests that run")[0].parent()
        rank.kill()
        job.wait(PATIENCE_S)  # with whatever status: after a death by a signal it is the launcher's own
        wait_gone(processes)
    check_stopped_early(run)
