"""`llmpi submit` on a real Slurm of two nodes: jobs that follow each other until all is answered."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT, Argument, Finished, Launcher, base_env
from tests.slurm_cluster import Cluster
from tests.system.runs import PATIENCE_S, Run, our_lines, prompts, until, write_lines

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.mpi,
    pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True),
]

REQUESTS = 24
IDS = [f"r{k}" for k in range(REQUESTS)]


def command(launcher: Launcher, run: Run, *sbatch: str, time_scale: str) -> list[str]:
    requests = write_lines(run.path.parent / "in.jsonl", prompts(REQUESTS, ignore_eos=True, max_tokens=20))
    batch = ("-m", "any", "--engine", "simulated", "--ctx", "256", "--slots", "2", "--time-scale", time_scale)
    words: Sequence[Argument] = ("submit", *sbatch, "--", "batch", *batch, "-i", requests, "-o", run.path)
    return [str(launcher.python), "-m", "llmpi", *map(str, words)]


def environ(launcher: Launcher) -> dict[str, str]:
    """llmpi of this checkout first, in the job, too."""
    path = os.pathsep.join((str(launcher.python.parent), os.environ["PATH"]))
    return {"PATH": path, "PYTHONPATH": str(ROOT)}


def test_a_run_goes_on_in_the_next_job_when_one_is_cancelled(slurm: Cluster, mpirun: Launcher, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    words = command(mpirun, run, "-N2", "-n3", "--wait", time_scale="1")
    env = {**base_env(), **slurm.env, **environ(mpirun)}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path, start_new_session=True
    ) as waiting:
        until(lambda: run.lines_so_far() or waiting.poll() is not None, "an answer")
        assert waiting.poll() is None, waiting.communicate()
        told = map(json.loads, (run.path / "slurm" / "jobs.jsonl").read_text().splitlines())
        first = next(line for line in told if "next" in line)
        slurm.run("scancel", first["job"])
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 0, out + err
    run.check_whole(IDS)
    sessions = run.about()["sessions"]
    assert [session["slurm_job"] for session in sessions] == [first["job"], first["next"]]
    assert [session["slurm_previous"] for session in sessions] == [None, first["job"]]
    assert sessions[0]["slurm_next"] == first["next"]
    assert f"job {first['job']} running on n[1-2]" in err
    assert f"job {first['next']} " in err
    assert err.splitlines()[-1] == f"{REQUESTS} of {REQUESTS} done, complete · no job is left"
    assert slurm.run("squeue", "-h", "-n", "llmpi-run").stdout == "", "the job after the last one is taken back"


def test_a_run_that_was_stopped_is_submitted_again_at_once(slurm: Cluster, mpirun: Launcher, tmp_path: Path) -> None:
    """Its first job is still in the queue for a moment, with the one that was to follow."""
    run = Run(tmp_path / "run")

    def llmpi(*words: str) -> Finished:
        return slurm.run(*words, env=environ(mpirun), check=False, timeout_s=PATIENCE_S)

    first = llmpi(*command(mpirun, run, "-N2", "-n3", time_scale="1"))
    assert first.rc == 0, first.output
    until(run.lines_so_far, "an answer")
    stopped = llmpi(str(mpirun.python), "-m", "llmpi", "stop", str(run.path), "--wait")
    assert stopped.rc == 3, stopped.output
    again = llmpi(*command(mpirun, run, "-N2", "-n3", "--wait", time_scale="1"))
    assert again.rc == 0, again.output
    run.check_whole(IDS)
    assert slurm.run("squeue", "-h", "-n", "llmpi-run").stdout == ""


def test_what_slurm_does_not_have_is_said_before(slurm: Cluster, mpirun: Launcher, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")

    def refused(*sbatch: str) -> str:
        done: Finished = slurm.run(
            *command(mpirun, run, *sbatch, time_scale="1"), env=environ(mpirun), check=False, timeout_s=PATIENCE_S
        )
        assert done.rc == 2, done.output
        (line,) = our_lines(done)
        return line

    assert "5 nodes are wanted, but partition main has 2" in refused("-N5")
    assert "but partition minute allows 1m00s" in refused("-p", "minute", "-t", "2:00")
    assert not run.path.exists()


def test_a_mistyped_batch_is_told_before_a_job_waits_for_hours(
    slurm: Cluster, mpirun: Launcher, tmp_path: Path
) -> None:
    words = [str(mpirun.python), "-m", "llmpi", "submit", "-n1", "--", "batch", "-m", "x", "--slotz", "3"]
    done = slurm.run(*words, env=environ(mpirun), check=False, timeout_s=PATIENCE_S)
    assert done.rc == 2
    assert "--slotz" in done.stderr
