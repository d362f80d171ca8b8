"""Start real MPI jobs from tests and never leave a process behind.

`Launcher` runs `mpirun -n N ... python -m llmpi ...` with the options and variables that the MPI library at hand
needs to run more ranks than cores, and as root. Output goes to files, so that a job that floods it cannot
block, and a process that survives its job cannot hold a pipe open. At the timeout the whole session of processes
is killed: Open MPI gives each rank a process group of its own, so killing one group is not enough.

Each job has a temporary directory of its own. A killed mpirun leaves its session directory behind, named after its
process id: in a shared one, the next mpirun that is given the same id could not start.

It knows nothing of what llmpi does: it returns exit status and text.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_SHOWN_CHARS = 8_000
PATIENCE_S = 300.0
"""Bounds waiting for what never comes. On a loaded machine starting Python takes ten seconds, and any process may
stand still for some: a test that waits for a condition waits as long as that takes."""
GONE_S = 60.0
"""Killed processes are gone at once, but for those that the kernel has not come to yet."""

Kind = Literal["openmpi", "mpich"]
Argument = str | int | Path

_AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@dataclass(frozen=True)
class Finished:
    """How a job ended. `rc` is negative (the signal) if mpirun itself died by one."""

    rc: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams, for messages of assertions."""
        return f"exit status {self.rc}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@dataclass(frozen=True)
class Job:
    """A job that runs. `process` is mpirun; its pid is also the id of the session all its processes are in."""

    process: subprocess.Popen[bytes]
    folder: Path
    command: tuple[str, ...]

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def wait(self, timeout_s: float) -> Finished:
        """Wait for the end. After `timeout_s` everything is killed and AssertionError shows the output."""
        try:
            rc = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"no end within {timeout_s:g} s: {' '.join(self.command)}\n"
                f"--- stdout\n{self.stdout[-OUTPUT_SHOWN_CHARS:]}\n--- stderr\n{self.stderr[-OUTPUT_SHOWN_CHARS:]}"
            ) from None
        return Finished(rc, self.stdout, self.stderr)

    def processes(self) -> list[psutil.Process]:
        """All processes of the job that are alive: by session, and by descent for those that left it."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
                    found.update((child.pid, child) for child in process.children(recursive=True))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return list(found.values())

    def kill(self) -> None:
        """SIGKILL to everything that is left of the job; returns when it is gone."""
        left = self.processes()
        for process in left:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(GONE_S)
        psutil.wait_procs(left, timeout=GONE_S)


@dataclass(frozen=True)
class Launcher:
    """Runs llmpi under the mpirun that belongs to `python`. Call it for a job's end, `start` it to interfere."""

    python: Path
    mpirun: Path
    kind: Kind
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self,
        ranks: int,
        *arguments: Argument,
        timeout_s: float = PATIENCE_S,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        mpi_options: Sequence[str] = (),
        program: Sequence[Argument] = ("-m", "llmpi"),
    ) -> Finished:
        """`mpirun -n ranks python -m llmpi arguments...`, to its end. `program` replaces `-m llmpi`."""
        with self.start(ranks, *arguments, env=env, cwd=cwd, mpi_options=mpi_options, program=program) as job:
            return job.wait(timeout_s)

    @contextmanager
    def start(
        self,
        ranks: int,
        *arguments: Argument,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        mpi_options: Sequence[str] = (),
        program: Sequence[Argument] = ("-m", "llmpi"),
    ) -> Iterator[Job]:
        """The same, running. What is left of it when the `with` block ends is killed."""
        options = ["-n", str(ranks), *mpi_options]
        if self.kind == "openmpi":
            options = ["--oversubscribe", "--bind-to", "none", *options]
        program_words = [str(word) for word in (*program, *arguments)]
        command = (str(self.mpirun), *options, str(self.python), *program_words)
        with _started(command, {**self.env, **(env or {})}, cwd or ROOT) as job:
            yield job


@contextmanager
def _started(command: tuple[str, ...], env: Mapping[str, str], cwd: Path) -> Iterator[Job]:
    # Sockets live below it, and their paths may have about 100 characters: a short name.
    folder = Path(tempfile.mkdtemp(prefix="llmpi-job-"))
    (folder / "tmp").mkdir()
    try:
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**base_env(), "TMPDIR": str(folder / "tmp"), **env},
                cwd=cwd,
                start_new_session=True,
            )
        job = Job(process, folder, command)
        try:
            yield job
        finally:
            job.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_alone(
    *arguments: Argument,
    timeout_s: float = PATIENCE_S,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    python: Path | None = None,
) -> Finished:
    """`python -m llmpi arguments...` without a launcher, to its end, under the same care."""
    with start_alone(*arguments, env=env, cwd=cwd, python=python) as job:
        return job.wait(timeout_s)


@contextmanager
def start_alone(
    *arguments: Argument,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    python: Path | None = None,
    program: Sequence[Argument] = ("-m", "llmpi"),
) -> Iterator[Job]:
    """The same, running. What is left of it when the `with` block ends is killed."""
    command = (str(python or sys.executable), *(str(word) for word in (*program, *arguments)))
    with _started(command, env or {}, cwd or ROOT) as job:
        yield job


def base_env() -> dict[str, str]:
    """The environment of this process, less a launcher's leftovers, plus what tests always need."""
    launchers = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "MPI_LOCAL")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Rich output and line widths must not depend on who runs the tests.
    env.update({"COLUMNS": "120", "TERM": "dumb", "PYTHONUNBUFFERED": "1"})
    if os.geteuid() == 0:
        env.update(_AS_ROOT)
    return env


def alive(pid: int) -> bool:
    """Whether the process runs. One that ended and that nobody has collected yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def find_launcher(python: Path) -> Launcher | None:
    """The launcher beside the interpreter `python`, else the first on PATH, or None."""
    beside = python.parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, env=base_env(), check=False)
    kind: Kind = "openmpi" if "Open MPI" in said.stdout + said.stderr else "mpich"
    # MPI's own helpers (prted, hydra_pmi_proxy) are looked up beside mpirun or on PATH.
    path = os.pathsep.join((str(Path(found).parent), os.environ.get("PATH", "")))
    return Launcher(python, Path(found), kind, {"PATH": path})
