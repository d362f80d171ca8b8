"""What a job takes from its surroundings: no home directory that can be written to, no port of its own, and no
package from the user's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.launch import Launcher, run_alone, start_alone
from tests.system.runs import PATIENCE_S, Gate, Run, check_one_clear_line, engines_of, prompts, until, write_lines
from workers.processes import python_command

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


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A user's folder with packages of its own that are called as ours."""
    folder = tmp_path / "project"
    for name in ("coordinator", "scheduling", "storage", "workers"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    return folder


def test_packages_of_the_users_folder_are_not_taken_for_ours(crowded: Path, tiny_model: Path, run: Run) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "yes", "schema": {"type": "boolean"}}}
    chat = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 8, "response_format": schema}
    lines = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": chat} for name in IDS]
    given = write_lines(crowded / "in.jsonl", lines)
    words = ("batch", "--ranks", 2, "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 256, "--threads", 1)
    program = python_command("coordinator.entry")[1:]
    with start_alone(*words, cwd=crowded, program=program) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert run.about()["details"]["command"][:2] == ["llmpi", "batch"]


def test_what_stands_in_the_way_of_our_packages_is_named(crowded: Path) -> None:
    done = run_alone("--version", cwd=crowded)
    assert "the wrong one" not in done.output
    told = check_one_clear_line(done, 2, f"{crowded}/coordinator", "rename it")
    with start_alone(cwd=crowded, program=("-c", "import llmpi")) as job:
        script = job.wait(PATIENCE_S)
    assert script.rc == 1
    assert told.removeprefix("llmpi: ") in script.stderr.splitlines()[-1]
    shutil.rmtree(crowded / "coordinator")
    with start_alone("--version", cwd=crowded, program=("-c", "from coordinator.entry import main; main()")) as job:
        check_one_clear_line(job.wait(PATIENCE_S), 2, f"{crowded}/workers stands", "rename it")
    (crowded / "coordinator.py").touch()
    check_one_clear_line(run_alone("--version", cwd=crowded), 2, f"{crowded}/coordinator.py stands")


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
