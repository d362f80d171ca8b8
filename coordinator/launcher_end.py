"""Make the launcher end when the job has been aborted and it does not.

An abort asks the launcher to end all ranks. Open MPI's mpirun waits for a daemon on a host that cannot be reached for
as long as TCP does, and with fault tolerance it may take an abort as one more rank that is gone. So a rank that aborts
leaves a guard behind: a shell in a session of its own, which gives the launcher (or the launcher's daemon on this
host) time to end by itself and then ends it. Ranks that have lost their launcher are ended by MPI.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess

import psutil

GRACE_S = 10.0
"""What the launcher has after an abort to end by itself. It takes about two seconds."""
TERM_S = 3.0
"""And after SIGTERM, before SIGKILL."""
LAUNCHERS = ("mpirun", "prterun", "prted", "orterun", "orted", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy")

# A number that has become another process's is left alone.
_END = """
end() { for p; do case $(cat /proc/$p/comm 2>&- || ps -o comm= -p $p 2>&-) in NAMES) kill -$signal $p;; esac; done; }
if [ $rank ]; then
    while [ $grace -gt 0 ]; do sleep 1; kill -0 $rank 2>&- || exit; grace=$((grace - 1)); done
    echo "$says" >&2
else sleep $grace
fi
signal=TERM; end "$@"; sleep $term; signal=KILL; end "$@"
""".replace("NAMES", "|".join(f"*{name}" for name in LAUNCHERS))


def launchers() -> list[int]:
    """Process ids of the launcher, or its daemon on this host, that this process descends from; it may be several."""
    found = []
    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents():
            if ancestor.name() not in LAUNCHERS:
                break
            found.append(ancestor.pid)
    return found


def guard_launcher(
    grace_s: float = GRACE_S, term_s: float = TERM_S, says: str | None = None
) -> subprocess.Popen[bytes] | None:
    """See to it that the launcher ends within `grace_s + term_s` seconds from now. Returns the guard, the head of a
    process group of its own; None where there is no launcher or no guard could be started.

    `says`: what the guard tells people then. Such a one ends with this process, and `grace_s` is rounded up.
    """
    ending = [str(pid) for pid in launchers()]
    if not ending:
        return None
    nothing = subprocess.DEVNULL
    environ = {"PATH": os.environ.get("PATH", os.defpath), "grace": f"{grace_s:g}", "term": f"{term_s:g}"}
    if says is not None:
        environ |= {"grace": str(math.ceil(grace_s)), "rank": str(os.getpid()), "says": says}
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            ["/bin/sh", "-c", _END, "sh", *ending], stdin=nothing, stdout=nothing, cwd="/",
            stderr=nothing if says is None else None, env=environ, start_new_session=True,
        )  # fmt: skip
    return None


def dismiss_guard(guard: subprocess.Popen[bytes] | None) -> None:
    """The launcher may live."""
    if guard is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def is_sibling(pid: int) -> bool:
    """Whether this process was started by whoever started us, as all ranks of a job on one host are."""
    try:
        return pid != os.getpid() and psutil.Process(pid).ppid() == os.getppid()
    except psutil.Error:
        return False
