"""Jobs that have to be gone in time although nothing that runs can end: the engines stand still at a gate.

They do not even end when they are told to, and have to be killed. The next start does what was cut off.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from scheduling.wording import counted
from tests.launch import ROOT, Argument, Finished, Launcher, run_alone, start_alone
from tests.system.runs import (
    PATIENCE_S,
    Gate,
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

REQUESTS = 60
IDS = [f"r{k}" for k in range(REQUESTS)]
BOUND_S = 4.0
LOADED_S = 60.0
"""What launchers and interpreters may need beyond all bounds on a machine that does other work."""


@pytest.fixture
def work(tmp_path: Path, run: Run) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 10 + 7 * (k % 8)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(tmp_path / "in.jsonl", lines)
    simulated = ("-m", "any-name", "--engine", "simulated", "--time-scale", "0.02", "--ctx", 256, "--slots", 4)
    return ("batch", *simulated, "-i", given, "-o", run.path, "--drain-timeout", f"{BOUND_S:g}")


def check_cut_off(stopped: Finished, run: Run) -> None:
    """It has ended in order, with its metrics, and says how much it has cut off."""
    assert stopped.rc == 3, stopped.output
    assert "Traceback" not in stopped.stderr
    said = re.search(r"(\d+) that ran cut off; the same command resumes", stopped.stderr)
    assert said is not None, stopped.output
    facts = run.about()["sessions"][-1]
    assert facts["outcome"] == "drained"
    assert facts["unfinished"] == int(said[1]) > 0
    assert len(run.metrics()["requests"]) == len(run.by_id()) == facts["requests"]


def check_resumes(mpirun: Launcher, gate: Gate, work: tuple[Argument, ...], run: Run) -> None:
    earlier = len(run.by_id())
    gate.open()
    done = mpirun(3, *work, env=gate.env)
    assert done.rc == 0, done.output
    assert f": {counted(earlier, 'request')} already done" in done.stderr
    run.check_whole(IDS)


def test_a_drain_by_signal_is_over_within_its_bound_and_what_was_cut_off_is_done_once(
    mpirun: Launcher, gate: Gate, work: tuple[Argument, ...], run: Run
) -> None:
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        until(gate.held, "an engine that stands still")
        processes = job.processes()
        asked_at = time.monotonic()
        job.process.send_signal(drain_signal(mpirun))
        stopped = job.wait(PATIENCE_S)
        took_s = time.monotonic() - asked_at
        wait_gone(processes)
    check_cut_off(stopped, run)
    assert run.about()["sessions"][-1]["drain_s"] < BOUND_S
    assert BOUND_S / 2 <= took_s < BOUND_S + LOADED_S, f"gone after {took_s:.1f} s"
    check_resumes(mpirun, gate, work, run)


def test_llmpi_stop_waits_until_the_job_has_ended_and_exits_as_status_does(
    mpirun: Launcher, gate: Gate, work: tuple[Argument, ...], run: Run
) -> None:
    with mpirun.start(3, *work, env=gate.env) as job:
        wait_for_answers(job, run)
        until(gate.held, "an engine that stands still")
        asked = run_alone("stop", run.path, "--wait")
        assert asked.rc == 3, asked.output
        assert f"within {BOUND_S:g} s" in asked.stdout
        assert "not complete: the same command resumes it" in asked.stdout, "and no longer 'running'"
        stopped = job.wait(PATIENCE_S)
    check_cut_off(stopped, run)
    assert "asked by llmpi stop" in stopped.stderr
    check_one_clear_line(run_alone("stop", run.path, "--wait"), 2, "no job is running")


def test_a_job_is_gone_before_slurm_ends_it_and_is_requeued(
    gate: Gate, work: tuple[Argument, ...], run: Run, tmp_path: Path
) -> None:
    tools = tmp_path / "slurm"
    tools.mkdir()
    # Slurm takes its time: only when answers are there it says that the job ends in 19 s, less the margin 4.
    (tools / "squeue").write_text(
        f"#!/bin/sh\nwhile ! test -s {run.path}/results.jsonl; do sleep 0.05; done\n"
        f"date +%s > {tools}/told; date -d '+19 seconds' +%Y-%m-%dT%H:%M:%S\n"
    )
    (tools / "scontrol").write_text(f'#!/bin/sh\ndate +%s > {tools}/asked; echo "$@" >> {tools}/asked\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {**gate.env, "PATH": os.pathsep.join((str(tools), os.environ["PATH"])), "SLURM_JOB_ID": "77"}
    with start_alone(*work, "--on-limit", "requeue", env=env) as job:
        stopped = job.wait(PATIENCE_S)
    check_cut_off(stopped, run)
    assert "Slurm ends job 77" in stopped.stderr
    when, what = (tools / "asked").read_text().splitlines()
    assert what == "requeue 77"
    assert int(when) - int((tools / "told").read_text()) < 19, "Slurm would have ended it"


def test_a_time_limit_is_kept(gate: Gate, work: tuple[Argument, ...], run: Run) -> None:
    began = time.monotonic()
    with start_alone(*work, "--time-limit", "5s", env=gate.env) as job:
        stopped = job.wait(PATIENCE_S)
    took_s = time.monotonic() - began
    assert stopped.rc == 3, stopped.output
    assert "the time limit of 5s" in stopped.stderr
    assert took_s < 5.0 + LOADED_S, f"gone after {took_s:.1f} s"


LOADING = """
import os, sys, time
class Waits:
    def find_spec(self, name, *given):
        if name == "coordinator.cli":
            open(f"{FOLDER}/loading.{os.getpid()}", "w").close()
            while not os.path.exists(FOLDER + "/open"):
                time.sleep(0.01)
if {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & set(os.environ) and "batch" in sys.orig_argv:
    sys.meta_path.insert(0, Waits())
"""


def test_a_signal_that_comes_while_ranks_load_is_kept(
    mpirun: Launcher, work: tuple[Argument, ...], run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "loading"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"FOLDER = {str(folder)!r}\n{LOADING}")
    with mpirun.start(3, *work, env={"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}) as job:
        until(lambda: len(list(folder.glob("loading.*"))) == 3, "three ranks that load")
        job.process.send_signal(drain_signal(mpirun))
        time.sleep(0.5)  # it is on its way; what comes later is no other case
        (folder / "open").touch()
        stopped = job.wait(PATIENCE_S)
    check_one_clear_line(stopped, 3, "nothing was started")
    assert not run.record()


def test_requeueing_outside_of_slurm_is_refused(work: tuple[Argument, ...]) -> None:
    check_one_clear_line(run_alone(*work, "--on-limit", "requeue"), 2, "--on-limit requeue", "SLURM_JOB_ID")
