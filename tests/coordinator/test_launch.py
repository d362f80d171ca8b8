"""Launchers told apart by their variables, singletons refused, and our own mpirun with its signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from coordinator.launch import (
    Launch,
    check_singleton,
    detect,
    find_mpirun,
    flavour_of,
    own_mpirun,
    run_own_mpirun,
)
from scheduling.errors import ConfigError
from tests.launch import ROOT, Job, Launcher, start_alone
from tests.system.runs import PATIENCE_S, until, wait_gone

OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_RANK": "2",
    "PRTE_LAUNCHED": "1",
}
HYDRA = {"PMI_SIZE": "3", "PMI_RANK": "0", "PMI_FD": "9", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "0"}
IN_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = IN_JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP_PMI2 = STEP | {"PMI_SIZE": "4", "PMI_RANK": "3", "PMI_FD": "15"}
DAEMONS_STEP = IN_JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environ", "launcher", "size", "rank", "local"),
    [
        ({}, "none", None, None, None),
        (OPENMPI, "openmpi", 3, 2, 1),
        (HYDRA, "mpich", 3, 0, 0),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpich", 2, 1, None),
        (STEP, "slurm", 4, 3, 1),
        (STEP_PMI2, "slurm", 4, 3, 1),
        (IN_JOB, "none", None, None, None),
        (DAEMONS_STEP | OPENMPI, "openmpi", 3, 2, 1),
        (DAEMONS_STEP | HYDRA, "mpich", 3, 0, 0),
        ({"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "8", "PMI_RANK": "5"}, "pals", 8, 5, 1),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "none", None, None, None),
    ],
)
def test_launcher_is_told_by_its_variables(
    environ: dict[str, str], launcher: str, size: int | None, rank: int | None, local: int | None
) -> None:
    found = detect(environ)
    assert (found.launcher, found.size_claimed, found.rank_claimed, found.local_rank) == (
        launcher,
        size,
        rank,
        local,
    )


def test_details_hold_the_variables_that_told() -> None:
    assert detect(STEP).details == {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(("environ", "speaks"), [({}, True), (HYDRA, True), (OPENMPI, False), (STEP, False)])
def test_one_task_speaks_for_all(environ: dict[str, str], speaks: bool) -> None:
    assert detect(environ).speaks is speaks


@pytest.mark.parametrize(
    ("environ", "mpi_size"),
    [({}, 1), (OPENMPI, 3), (STEP, 4), (IN_JOB, 1), (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 1)],
)
def test_what_fits_is_no_singleton(environ: dict[str, str], mpi_size: int) -> None:
    check_singleton(detect(environ), mpi_size, environ)


@pytest.mark.parametrize(
    ("environ", "library", "said"),
    [
        (
            STEP_PMI2,
            "Open MPI v5.0.11",
            ["srun started 4 tasks", "PMI-2", "Open MPI needs `srun --mpi=pmix", "mpirun"],
        ),
        (
            STEP | {"PMIX_NAMESPACE": "x"},
            "MPICH Version: 5.0",
            ["offered PMIx", "this MPI needs `srun --mpi=pmi2"],
        ),
        (STEP, "", ["no PMI", "--mpi=pmix", "--mpi=pmi2", "srun --mpi=list"]),
        (OPENMPI, "MPICH Version: 5.0", ["Open MPI's mpirun started 3 tasks", "another MPI (MPICH Version: 5.0)"]),
        (HYDRA, "Open MPI v5.0.11, package: x", ["MPICH's mpirun started 3 tasks", "(Open MPI v5.0.11)"]),
    ],
)
def test_singletons_are_refused_with_the_fix(environ: dict[str, str], library: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_singleton(detect(environ), 1, environ, library)
    assert [clause for clause in said if clause not in str(caught.value)] == []


# ---------------------------------------------------------------- which mpirun, and how it is called


def _fake_mpirun(folder: Path, says: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_mpirun_beside_this_python_wins_over_the_path(tmp_path: Path) -> None:
    beside, other = _fake_mpirun(tmp_path / "venv", "x"), _fake_mpirun(tmp_path / "usr", "x")
    environ = {"PATH": str(other.parent)}
    assert find_mpirun(environ, str(beside.parent / "python")) == str(beside)
    assert find_mpirun(environ, str(tmp_path / "bare" / "python")) == str(other)


def test_no_mpirun_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llmpi\[openmpi\]"):
        find_mpirun({"PATH": str(tmp_path)}, str(tmp_path / "python"))


@pytest.mark.parametrize(
    ("says", "flavour"),
    [
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("HYDRA build details:", "mpich"),
        ("Intel(R) MPI Library for Linux* OS", "mpich"),
    ],
)
def test_flavour_is_told_by_version(tmp_path: Path, says: str, flavour: str) -> None:
    assert flavour_of(str(_fake_mpirun(tmp_path, says))) == flavour


def test_an_unknown_mpirun_is_refused_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither Open MPI nor MPICH.*'frob 1'"):
        flavour_of(str(_fake_mpirun(tmp_path, "frob 1")))
    with pytest.raises(ConfigError, match="cannot be run"):
        flavour_of(str(tmp_path / "gone"))


def _command(
    tmp_path: Path, flavour: str, ranks: int, environ: dict[str, str] | None = None, root: bool = False
) -> str:
    mpirun = _fake_mpirun(tmp_path, flavour)
    command = own_mpirun(
        ["batch", "-m", "x"],
        ranks,
        environ or {},
        executable=str(mpirun.parent / "python"),
        cores=4,
        flavour=lambda path: flavour,
        is_root=root,
    )
    return " ".join(command).replace(f"{mpirun.parent}/", "")


def test_openmpi_is_told_to_oversubscribe_only_if_ranks_outnumber_cores(tmp_path: Path) -> None:
    program = "python -m llmpi batch -m x"
    assert _command(tmp_path, "openmpi", 4) == f"mpirun --bind-to none -n 4 {program}"
    assert _command(tmp_path, "openmpi", 5) == f"mpirun --oversubscribe --bind-to none -n 5 {program}"
    assert "--oversubscribe" in _command(tmp_path, "openmpi", 2, {"SLURM_JOB_ID": "7"})
    assert _command(tmp_path, "mpich", 5) == f"mpirun -n 5 -bind-to none {program}"


def test_openmpi_as_root_is_refused_unless_the_environment_allows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"):
        _command(tmp_path, "openmpi", 2, root=True)
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert "allow" not in _command(tmp_path, "openmpi", 2, allowed, root=True)
    assert _command(tmp_path, "mpich", 2, root=True)


# ---------------------------------------------------------------- running it


class FakeChild:
    """Ends with `status`; while it is waited for, `during` happens."""

    def __init__(self, status: int = 0, during: Callable[[], None] = lambda: None) -> None:
        self.pid = 1 << 30  # nobody's
        self.got: list[int] = []
        self._status = status
        self._during = during

    def send_signal(self, sig: int, /) -> None:
        self.got.append(sig)

    def wait(self) -> int:
        self._during()
        return self._status


def _run(child: FakeChild, flavour: str = "openmpi") -> tuple[int, dict[str, str]]:
    given: dict[str, str] = {}

    def start(command: Sequence[str], environ: dict[str, str]) -> FakeChild:
        given.update(environ)
        return child

    status = run_own_mpirun(["mpirun"], {"A": "b"}, start=start, flavour=lambda path: flavour)
    return status, given


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (3, 3), (137, 137), (-15, 143)])
def test_exit_status_is_mpiruns(ended: int, status: int) -> None:
    assert _run(FakeChild(ended))[0] == status


def _press(*numbers: int) -> Callable[[], None]:
    def press() -> None:
        for number in numbers:
            signal.raise_signal(number)

    return press


@pytest.mark.parametrize(
    ("flavour", "pressed", "got"),
    [
        ("openmpi", [signal.SIGINT], [signal.SIGUSR2]),
        ("openmpi", [signal.SIGTERM], [signal.SIGUSR2]),
        ("openmpi", [signal.SIGINT, signal.SIGINT], [signal.SIGUSR2, signal.SIGTERM]),
        ("mpich", [signal.SIGINT], [signal.SIGTERM]),
        ("mpich", [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]),
        ("mpich", [signal.SIGINT, signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]),
    ],
)
def test_first_signal_drains_the_second_ends(flavour: str, pressed: list[int], got: list[int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    child = FakeChild(during=_press(*pressed))
    _run(child, flavour)
    assert child.got == got
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_comes_before_mpirun_is_there_is_passed_on_once() -> None:
    child = FakeChild()

    def start(command: Sequence[str], environ: dict[str, str]) -> FakeChild:
        signal.raise_signal(signal.SIGINT)
        return child

    run_own_mpirun(["mpirun"], {}, start=start, flavour=lambda path: "openmpi")
    assert child.got == [signal.SIGUSR2]


def test_outside_the_main_thread_no_signal_is_touched() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(_run(FakeChild(5))[0]))
    thread.start()
    thread.join()
    assert statuses == [5]


def test_mpirun_that_cannot_be_started_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        run_own_mpirun([str(tmp_path / "gone")], {}, flavour=lambda path: "openmpi")


# ---------------------------------------------------------------- a real mpirun

RANK = """
import os, signal, sys, time
def say(*words):
    os.write(1, f"{' '.join(words)}\\n".encode())  # a line in one piece: ranks' outputs interleave
def on(number, frame):
    say("drained by", signal.Signals(number).name)
    sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, on)
say("up")
end = time.monotonic() + 600
while time.monotonic() < end:
    signal.sigtimedwait([], 0.2)
"""
RUNNER = """
import json, os, sys
from coordinator.launch import run_own_mpirun
sys.exit(run_own_mpirun(json.loads(sys.argv[1])))
"""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@contextmanager
def _three_ranks(mpirun: Launcher, folder: Path) -> Iterator[Job]:
    """A process in `run_own_mpirun`, its three ranks up."""
    (folder / "rank.py").write_text(RANK)
    command = own_mpirun([], 3, os.environ | AS_ROOT, executable=str(mpirun.python))
    command[command.index("-m") :] = [str(folder / "rank.py")]
    program = ["-c", RUNNER, json.dumps(command)]
    with start_alone(program=program, python=mpirun.python, env={**mpirun.env, **AS_ROOT}) as job:
        # MPI's own libraries may have something to say too.
        until(lambda: job.stdout.splitlines().count("up") == 3 or job.process.poll() is not None, "three ranks")
        assert job.process.poll() is None, job.stdout + job.stderr
        yield job


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.system
def test_ctrl_c_drains_the_ranks_of_a_real_mpirun(mpirun: Launcher, tmp_path: Path) -> None:
    drained = "SIGUSR2" if mpirun.kind == "openmpi" else "SIGTERM"
    with _three_ranks(mpirun, tmp_path) as job:
        job.process.send_signal(signal.SIGINT)
        ended = job.wait(PATIENCE_S)
    assert ended.rc == 3, ended.output
    assert f"drained by {drained}" in ended.stdout


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_real_mpirun_ends_with_the_process_that_started_it(mpirun: Launcher, tmp_path: Path) -> None:
    with _three_ranks(mpirun, tmp_path) as job:
        started = psutil.Process(job.process.pid).children(recursive=True)
        assert len(started) >= 4
        job.process.kill()
        wait_gone(started)


def test_launch_is_a_plain_value() -> None:
    assert detect({}) == Launch("none", None, None, None, {})


def test_module_does_not_import_mpi() -> None:
    code = "import sys, coordinator.launch; sys.exit('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
