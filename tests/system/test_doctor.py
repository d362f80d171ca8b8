"""`llmpi doctor` on real ranks: what it tells, how it ends, and that a rank that says nothing holds nobody up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import cannot, hosts
from tests.launch import PATIENCE_S, ROOT, Finished, Launcher, run_alone
from tests.slurm_cluster import Cluster

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

# A rank that stops for good where it should look around.
STOPPED = """
import os, signal, sys
from coordinator.doctor import examining
if "2" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    examining.gather = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
sys.argv[0] = "llmpi"
from coordinator.cli import main
main()
"""


def told(stdout: str) -> dict[str, Any]:
    [line] = [line for line in stdout.splitlines() if line.startswith('{"level"')]
    found: dict[str, Any] = json.loads(line)
    return found


def finding(report: dict[str, Any], subject: str, check: str) -> dict[str, Any]:
    [found, *_] = [one for one in report["subjects"][subject] if one["check"] == check]
    return dict(found)


def check_three_ranks(done: Finished) -> dict[str, Any]:
    assert done.rc == 0, done.output
    report = told(done.stdout)
    assert report["errors"] == 0, report
    assert finding(report, "MPI", "answers")["level"] == "ok"
    assert finding(report, "MPI", "thread level")["found"].startswith("funneled")
    assert "sums are right" in finding(report, "network", "collectives")["found"]
    return report


def test_three_ranks_tell_what_a_run_would_find(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(3, "doctor", "--json", "--quick", "-o", tmp_path / "run", "--stage-dir", tmp_path)
    report = check_three_ranks(done)
    library = finding(report, "MPI", "library")["found"]
    assert ("Open MPI" if mpirun.kind == "openmpi" else "MPICH") in library
    assert finding(report, "MPI", "launcher")["found"] == f"{mpirun.kind}, 3 ranks"
    assert "shared memory" in finding(report, "MPI", "transports in use")["found"]
    assert "CPU" in finding(report, "placement", "rank 1")["found"]
    assert str(tmp_path / "run") in finding(report, "files", "run directory")["found"]
    assert not (tmp_path / "run").exists()


def test_a_rank_that_says_nothing_is_reported_in_time(mpirun: Launcher) -> None:
    options = ("doctor", "--json", "--quick", "--timeout", 6)
    done = mpirun(3, *options, program=("-c", STOPPED))
    assert done.rc != 0, done.output
    said = finding(told(done.stdout), "MPI", "answers")
    assert (said["level"], "rank 2" in said["found"]) == ("error", True), said
    assert "collectives" not in {one["check"] for one in told(done.stdout)["subjects"].get("network", [])}


def test_alone_it_tells_of_mpi_without_starting_it_and_exits_4_with_an_error(tmp_path: Path) -> None:
    done = run_alone("doctor", "--quick", "-m", tmp_path / "none.gguf", "-o", tmp_path)
    assert done.rc == 4, done.output
    assert "MPI was not started" in " ".join(done.stdout.split())
    summary = done.stdout.partition("1 error")[2]
    assert "✗ error  model" in summary.splitlines()[2], done.stdout
    assert run_alone("doctor", "--no-such-option").rc == 2


@pytest.mark.skipif(bool(cannot()), reason=cannot() or "-")
@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_two_hosts_are_told_apart(mpirun: Launcher, tmp_path: Path) -> None:
    with hosts(2, tmp_path) as made:
        llmpi = ("-x", "PYTHONPATH", str(mpirun.python), "-m", "llmpi", "doctor", "--json", "--quick")
        words = [str(mpirun.mpirun), *made.options(2), "-n", "3", *llmpi]
        env = {**os.environ, **mpirun.env, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            made.command(words), env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    report = told(done.stdout)
    first, second = made.names
    assert finding(report, "MPI", "ranks per host")["found"] == f"{first}: 2, {second}: 1"
    transports = finding(report, "MPI", "transports in use")["found"]
    assert f"TCP to {made.addresses[1]}" in transports, transports
    assert "unchanged" in finding(report, "network", f"payload to {second}")["found"]
    assert second in finding(report, "clocks", "clocks")["found"]
    assert {one for found in report["subjects"]["files"] for one in found["where"]} == {first, second}


@pytest.mark.parametrize("mpirun", ["mpich"], indirect=True)
def test_under_srun_it_tells_of_the_job(slurm: Cluster, mpirun: Launcher) -> None:
    """One task of each two nodes; and Open MPI's tasks that srun cannot connect are told so."""
    words = ("-m", "llmpi", "doctor", "--json", "--quick")
    done = slurm.run("srun", "--mpi=pmi2", "-N2", "-n2", "--time=10", str(mpirun.python), *words)
    report = told(done.stdout)
    assert finding(report, "MPI", "launcher")["found"] == "slurm, 2 ranks"
    assert finding(report, "MPI", "ranks per host")["found"] == "n1: 1, n2: 1"
    assert "limit 00:10:00" in finding(report, "Slurm", "time left")["found"]
    alone = slurm.run("srun", "--mpi=pmi2", "-N1", "-n2", sys.executable, *words, check=False)
    said = finding(told(alone.stdout), "MPI", "launcher")
    assert (said["level"], "srun --mpi=pmix" in said["found"]) == ("error", True), said
