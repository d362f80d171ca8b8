"""What a job takes from its surroundings: no home directory that can be written to, and no port of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.launch import Launcher, start_alone
from tests.system.runs import PATIENCE_S, Gate, Run, engines_of, prompts, until, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 12
IDS = [f"r{k}" for k in range(REQUESTS)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.mark.parametrize(
    ("mpirun", "home"),
    # The last one is there, and nobody can write to it, not even root.
    [("openmpi", "/nonexistent"), ("openmpi", ""), ("mpich", "/proc")],
    indirect=["mpirun"],
)
def test_a_job_needs_no_home_directory(mpirun: Launcher, tiny_model: Path, tmp_path: Path, run: Run, home: str) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(REQUESTS, max_tokens=4))
    words = ("batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 256, "--slots", 2, "--threads", 1)
    done = mpirun(2, *words, env={"HOME": home}, timeout_s=PATIENCE_S, cwd=tmp_path)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "run"], "nothing lies beside the run"


def listening(processes: Iterable[psutil.Process]) -> set[int]:
    """TCP ports on which they accept connections."""
    return {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.fixture
def work(tmp_path: Path, run: Run) -> tuple[str | int | Path, ...]:
    given = write_lines(tmp_path / "in.jsonl", prompts(REQUESTS, max_tokens=20, ignore_eos=True))
    simulated = ("-m", "any", "--engine", "simulated", "--ctx", 256, "--slots", 2, "--time-scale", "0.02")
    return ("batch", *simulated, "-i", given, "-o", run.path)


def test_a_job_without_mpi_listens_on_no_port(work: tuple[str | int | Path, ...], tmp_path: Path, run: Run) -> None:
    gate = Gate.closed(tmp_path / "gate")
    with start_alone(*work, env=gate.env) as job:
        until(gate.held, "an engine at work")
        found = job.processes()
        assert len(found) > 1
        assert listening(found) == set()
        gate.open()
        assert job.wait(PATIENCE_S).rc == 0
    run.check_whole(IDS)


def test_under_mpirun_engines_listen_on_no_port(
    mpirun: Launcher, work: tuple[str | int | Path, ...], tmp_path: Path, run: Run
) -> None:
    """The ranks' are MPI's own."""
    gate = Gate.closed(tmp_path / "gate")
    with mpirun.start(2, *work, env=gate.env) as job:
        until(gate.held, "an engine at work")
        engines = engines_of(job)
        assert engines
        assert listening(engines) == set()
        gate.open()
        assert job.wait(PATIENCE_S).rc == 0
    run.check_whole(IDS)
