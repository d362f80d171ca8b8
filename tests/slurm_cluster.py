"""A Slurm of two nodes on this machine: real munged, slurmctld and slurmd, in a folder of their own, without systemd.

Each node's daemon, and so all that it starts, has a host's name (n1, n2) and process ids of its own, and dies with
this process. A node has 8 processors and 4 GPUs, as far as Slurm knows: the GPUs' device files are /dev/null by other
names, so that jobs get the variables that they would get from real ones. Devices are not confined. Root is needed.

| partition | what is special |
|---|---|
| main | the default; its jobs are requeued for those of `urgent` |
| minute | jobs end after a minute |
| urgent | goes before the others |

Jobs that were put back into the queue start again after `REQUEUE_DELAY_S`, which is minutes elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT, Finished, base_env

NODES = ("n1", "n2")
GPUS_PER_NODE = 4
CPUS_PER_NODE = 8
KILL_WAIT_S = 30
REQUEUE_DELAY_S = 5
PATIENCE_S = 300.0
CLIENT_PATIENCE_S = 60.0

PMIX_FOLDERS = ("/usr/lib/x86_64-linux-gnu/pmix2/lib", "/usr/lib/aarch64-linux-gnu/pmix2/lib")
DEBIAN_OPENMPI = ("/usr/lib/x86_64-linux-gnu/libmpi.so.40", "/usr/lib/aarch64-linux-gnu/libmpi.so.40")

UNSHARE = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def cannot() -> str:
    """Why there can be no Slurm here; '' if there can."""
    if os.geteuid() != 0:
        return "a Slurm needs root"
    for program in ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setpriv"):
        if _program(program) is None:
            return f"there is no {program} (Debian: slurm-wlm, munge, util-linux)"
    with tempfile.TemporaryDirectory() as folder:
        # What a node is made of, where it leaves no trace.
        tried = f"hostname {NODES[0]} && mount --bind /etc/hosts /etc/hosts && mknod {folder}/nvidia c 1 3"
        done = subprocess.run([*UNSHARE, "bash", "-c", tried], capture_output=True, text=True, check=False)
    return f"namespaces or devices are not permitted: {done.stderr.strip()}" if done.returncode else ""


def debian_openmpi() -> Path | None:
    """The system's Open MPI, whose PMIx is that of the system's Slurm; None if there is none, or Slurm has no PMIx.

    mpi4py takes it if it stands in MPI4PY_LIBMPI.
    """
    pmix = any(Path(folder, "libpmix.so").exists() for folder in PMIX_FOLDERS)
    return next((path for path in map(Path, DEBIAN_OPENMPI) if path.exists()), None) if pmix else None


@dataclass(frozen=True)
class SlurmJob:
    """A job that was submitted; `log` is its output, of all times that it was started."""

    cluster: Cluster
    number: str
    log: Path

    def facts(self) -> dict[str, str]:
        """What scontrol knows of it: JobState, Restarts, ExitCode ('3:0'), NodeList, ..."""
        shown = self.cluster.run("scontrol", "-o", "show", "job", self.number).stdout
        return dict(re.findall(r"(?:^| )([A-Za-z][\w/:]*)=(.*?)(?= [A-Za-z][\w/:]*=|$)", shown.splitlines()[0]))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `holds`. A job that has ended before, or the end of patience, is an AssertionError."""
        pause, deadline = threading.Event(), time.monotonic() + timeout_s
        while not holds():
            facts = self.facts()
            late = time.monotonic() > deadline
            if late or facts["JobState"] in OVER:
                if not late and holds():  # it did, just before the job ended
                    return
                if late:
                    self.cancel()
                why = "too late" if late else "the job is over"
                raise AssertionError(f"{what}: {why}: {facts}\n{self.output[-8000:]}\n{self.cluster.logs()}")
            pause.wait(0.1)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, when it is over. AssertionError if it has not ended by itself."""
        facts: dict[str, str] = {}

        def over() -> bool:
            facts.update(self.facts())
            return facts["JobState"] in OVER

        self.until(over, f"the end of job {self.number}", timeout_s)
        assert facts["JobState"] in ("COMPLETED", "FAILED"), f"{facts}\n{self.output}\n{self.cluster.logs()}"
        return int(facts["ExitCode"].split(":")[0])

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number, check=False)


@dataclass(frozen=True)
class Cluster:
    """A Slurm that runs. `env` is what its clients need in their environment."""

    folder: Path
    env: Mapping[str, str]

    def run(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = CLIENT_PATIENCE_S,
    ) -> Finished:
        """A client (srun, scontrol, ...) to its end. `check`: a status other than 0 is an AssertionError."""
        command = [str(word) for word in words]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**base_env(), **self.env, **(env or {})}, cwd=cwd or ROOT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise AssertionError(f"no end within {timeout_s:g} s: {command}\n{out}\n{err}\n{self.logs()}") from None
        done = Finished(process.returncode, out, err)
        assert not (check and done.rc), f"{command}: {done.output}\n{self.logs()}"
        return done

    def submit(
        self,
        script: Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path,
    ) -> SlurmJob:
        """`sbatch options script arguments`, in the folder `cwd`, where it finds its log."""
        return self.submit_all(script, *arguments, options=options, env=env, cwd=cwd)[0]

    def submit_all(
        self,
        script: Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path,
    ) -> list[SlurmJob]:
        """The same; with `--array` among the options a job for each of its tasks, lowest first."""
        log = cwd / ("job-%A_%a.log" if any(option.startswith("--array") for option in options) else "job-%j.log")
        done = self.run("sbatch", "--parsable", f"--output={log}", *options, script, *arguments, env=env, cwd=cwd)
        name = done.stdout.strip().split(";")[0]
        shown = self.run("squeue", "-h", "-r", "-j", name, "-t", "all", "-o", "%i").stdout.split()
        return [SlurmJob(self, one, cwd / f"job-{one.split('+')[0]}.log") for one in sorted(shown, key=_place)]

    def logs(self) -> str:
        """What the daemons said last, for messages of assertions."""
        parts = []
        for file in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)


def _place(number: str) -> int:
    """Of '12_3' (a task of an array) and '12+3' (a part of a heterogeneous job) the 3."""
    return int([*re.split(r"[_+]", number), "0"][1])


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """A Slurm of two idle nodes. When the block ends its daemons and all that they started are killed.

    Raises:
        AssertionError: it does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="llmpi-slurm-"))  # short: a socket lies in it
    started: list[subprocess.Popen[bytes]] = []

    def start(log: str, *words: str | Path) -> None:
        with (folder / f"{log}.log").open("ab") as file:
            # Dies with this process, however that dies.
            command = ["setpriv", "--pdeathsig", "KILL", *map(str, words)]
            env = base_env() | {"SLURM_CONF": str(folder / "slurm.conf")}
            started.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, cwd=folder)
            )

    try:
        _configure(folder)
        # UCX (MPICH) takes the nodes for one host, and fails in memory that they do not share. It takes all networks
        # that it sees, also those of other tests, which go, or make its addresses too long for Slurm's pmi2.
        ucx = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": _network() or "all"}
        cluster = Cluster(folder, {"SLURM_CONF": str(folder / "slurm.conf"), **ucx})
        start(
            "munged", _daemon("munged"), "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", "--num-threads=2",
        )  # fmt: skip
        _until(lambda: (folder / "munge").exists(), "munged's socket", cluster, started)
        start("slurmctld", _daemon("slurmctld"), "-D")
        for name in NODES:
            # A shell as the first process, for it collects those that lost their parent, which Slurm waits for.
            node = f"hostname {name}; mount --bind hosts /etc/hosts; {_daemon('slurmd')} -D -N {name} & wait"
            start(name, *UNSHARE, "bash", "-c", node)
        _until(lambda: _idle(cluster) == len(NODES), "two idle nodes", cluster, started)
        yield cluster
    finally:
        for process in started[1:2]:
            process.terminate()  # slurmctld has a child to collect
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for process in reversed(started):
            process.kill()
        for process in started:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    folder.chmod(0o711)  # munged asks for that
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for number in range(GPUS_PER_NODE):
        os.mknod(folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
    controller, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} RealMemory=16000 Gres=gpu:{GPUS_PER_NODE}"
        for name, port in zip(NODES, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(
        f"""ClusterName=llmpi
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire={REQUEUE_DELAY_S}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={KILL_WAIT_S}
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=minute Nodes=ALL MaxTime=1 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""
    )
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{GPUS_PER_NODE - 1}]\n")


def _idle(cluster: Cluster) -> int:
    """Nodes that are idle; 0 while nobody answers."""
    done = cluster.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False)
    return int(done.stdout) if done.rc == 0 and done.stdout.strip() else 0


def _until(
    holds: Callable[[], object], what: str, cluster: Cluster, started: Sequence[subprocess.Popen[bytes]]
) -> None:
    pause, deadline = threading.Event(), time.monotonic() + CLIENT_PATIENCE_S
    while not holds():
        dead = [process.args for process in started if process.poll() is not None]
        assert not dead, f"{what}: {dead} ended\n{cluster.logs()}"
        assert time.monotonic() < deadline, f"{what}: not within {CLIENT_PATIENCE_S:g} s\n{cluster.logs()}"
        pause.wait(0.05)


def _network() -> str:
    """The network that leads out of this machine: nobody else removes it. '' if there is none."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    return next((name for name, destination, *_ in routes if destination == "00000000"), "")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _daemon(name: str) -> str:
    found = _program(name)
    assert found is not None, name
    return found


def _program(name: str) -> str | None:
    """Where a program is; daemons lie where a plain user's PATH does not lead."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
