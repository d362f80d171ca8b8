"""Runs that end early: drained, killed, or with a dead engine. Nothing is lost or doubled; the same command goes on.

What a test does to a running job, it does while the engines stand still: how fast they are must not decide whether
there is something left to interrupt.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.launch import Finished, Job, Launcher, run_alone, start_alone
from tests.system.runs import (
    PATIENCE_S,
    Line,
    Run,
    check_one_clear_line,
    engines_of,
    frozen,
    prompts,
    until,
    wait_gone,
    write_lines,
)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 160
IDS = [f"r{k}" for k in range(REQUESTS)]


def long_work() -> list[Line]:
    """Some fifteen seconds for two ranks after the first answers: enough to interfere.

    No two neighbours are equally long, so that the slots of an engine do not all become free at once.
    """
    return [line | {"max_tokens": 100 + 7 * (k % 8)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]


def command(model: Path, given: Path, run: Run) -> tuple[str | Path | int, ...]:
    return ("batch", "-m", model, "-i", given, "-o", run.path, "--ctx", 256, "--slots", 4)


def wait_for_answers(job: Job, run: Run, count: int = 5) -> None:
    def so_far() -> bool:
        assert job.process.poll() is None, job.stdout + job.stderr
        return run.lines_so_far() >= count

    until(so_far, f"{count} answers in the record")


def wait_for_drain(job: Job) -> None:
    """Rank 0 has been told to stop, and has said so."""
    until(lambda: "draining" in job.stderr or job.process.poll() is not None, "the drain")
    assert job.process.poll() is None, job.stdout + job.stderr


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
    said = re.search(r"resuming .*: (\d+) requests were already done", done.stderr)
    assert said is not None, done.output
    assert int(said[1]) == earlier
    run.check_whole(IDS)
    sessions = {line["llmpi"]["session"] for line in run.record()}
    assert sessions == {0, 1}


def test_killed_run_resumes_where_its_record_ends(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    work = command(tiny_model, given, run)
    with mpirun.start(3, *work) as job:
        wait_for_answers(job, run)
        processes, engines = job.processes(), engines_of(job)
        os.killpg(job.process.pid, signal.SIGKILL)
        with frozen(engines):  # the ranks must leave because they notice, not because the work is done
            wait_gone(processes)
    earlier = check_stopped_early(run)

    other = write_lines(tmp_path / "other.jsonl", prompts(3))
    refused = run_alone(*command(tiny_model, other, run))
    check_one_clear_line(refused, 2, "another run")
    assert len(run.by_id()) == earlier

    check_resumed(mpirun(3, *work, timeout_s=PATIENCE_S), run, earlier)

    again = mpirun(3, *work)
    assert again.rc == 0, again.output
    assert "complete already" in again.stderr
    status = run_alone("status", run.path)
    assert status.rc == 0, status.output
    assert f"{REQUESTS} of {REQUESTS}" in status.stdout


def drain_signal(mpirun: Launcher) -> signal.Signals:
    """What this launcher hands on to its ranks without killing them."""
    return signal.SIGUSR2 if mpirun.kind == "openmpi" else signal.SIGINT


def test_drained_by_signal_it_finishes_what_runs_and_resumes(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path
) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    work = command(tiny_model, given, run)
    with mpirun.start(3, *work) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        with frozen(engines_of(job)):
            job.process.send_signal(drain_signal(mpirun))
            wait_for_drain(job)
        stopped = job.wait(PATIENCE_S)
        wait_gone(processes)
    assert stopped.rc == 3, stopped.output
    assert "drain" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    earlier = check_stopped_early(run)
    rows = run.metrics()["requests"]
    assert len(rows) == earlier, "a drained run has its metrics too"
    check_resumed(mpirun(3, *work, timeout_s=PATIENCE_S), run, earlier)


def test_second_signal_stops_now_and_the_run_can_be_resumed(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    # Answers of minutes: finishing what runs is no option for who is in a hurry. A short one tells that they run.
    lines = prompts(8, max_tokens=8_000, ignore_eos=True)
    lines[0]["max_tokens"] = 3
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    work = ("batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 8192, "--slots", 4)
    with mpirun.start(3, *work) as job:
        wait_for_answers(job, run, 1)
        processes = job.processes()
        with frozen(engines_of(job)):
            job.process.send_signal(drain_signal(mpirun))
            wait_for_drain(job)
            job.process.send_signal(drain_signal(mpirun))
            stopped = job.wait(PATIENCE_S)
            wait_gone(processes)
    if mpirun.kind == "openmpi":  # MPICH's mpirun ends its ranks by itself then, with a status of its own
        assert stopped.rc == 3, stopped.output
        assert "stopped now" in stopped.stderr
    assert stopped.rc != 0, stopped.output
    status = run_alone("status", run.path, "--json")
    assert status.rc == 3, status.output
    assert json.loads(status.stdout)["done"] == 1


def test_drained_by_llmpi_stop(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    with mpirun.start(3, *command(tiny_model, given, run), "--schedule", "round-robin") as job:
        wait_for_answers(job, run)
        with frozen(engines_of(job)):
            running = run_alone("status", run.path)
            assert running.rc == 3, running.output
            assert "running" in running.stdout
            second = run_alone(*command(tiny_model, given, run))
            check_one_clear_line(second, 2, str(run.path))
            asked = run_alone("stop", run.path)
            assert asked.rc == 0, asked.output
            wait_for_drain(job)
        stopped = job.wait(PATIENCE_S)
    assert stopped.rc == 3, stopped.output
    assert "llmpi stop" in stopped.stderr
    check_stopped_early(run)
    nobody = run_alone("stop", run.path)
    check_one_clear_line(nobody, 2, "no job is running")


def test_ctrl_c_drains_the_mpirun_that_llmpi_started(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    with start_alone(*command(tiny_model, given, run), "--ranks", 3, python=mpirun.python, env=mpirun.env) as job:
        wait_for_answers(job, run)
        processes = job.processes()
        with frozen(engines_of(job)):
            job.process.send_signal(signal.SIGINT)
            wait_for_drain(job)
        stopped = job.wait(PATIENCE_S)
        wait_gone(processes)
    assert stopped.rc == 3, stopped.output
    check_stopped_early(run)


def engine_at_work(job: Job, run: Run) -> psutil.Process:
    """The engine that gave the first answer. Another rank's may still be loading: its death would cost nothing."""
    first = json.loads((run.path / "results.jsonl").read_bytes().split(b"\n")[0])
    for engine in engines_of(job):
        rank = engine.parent()
        assert rank is not None
        told = rank.environ()
        if first["llmpi"]["rank"] == int(told.get("OMPI_COMM_WORLD_RANK") or told["PMI_RANK"]):
            return engine
    raise AssertionError(f"rank {first['llmpi']['rank']} has no engine")


def test_killed_engine_costs_its_requests_an_attempt_and_nothing_else(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path
) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    with mpirun.start(3, *command(tiny_model, given, run)) as job:
        wait_for_answers(job, run)
        engine_at_work(job, run).kill()
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


def test_engines_do_not_outlive_a_killed_rank(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", long_work())
    run = Run(tmp_path / "run")
    with mpirun.start(3, *command(tiny_model, given, run)) as job:
        wait_for_answers(job, run)
        processes, engines = job.processes(), engines_of(job)
        rank = engines[0].parent()
        assert rank is not None
        rank.kill()
        with frozen(engines):
            ended = job.wait(PATIENCE_S)
            wait_gone(processes)
    assert ended.rc != 0
    check_stopped_early(run)
