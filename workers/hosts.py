"""What this rank says about where it runs: its `Host`, from the launcher's variables, cgroups and sysfs.

Processors: a launcher may have bound the rank to one core for MPI's sake; the engine takes back what the
cgroup allows (cpuset), so that is what is reported. One case is different: under a plain srun whose cgroup
confines nothing, the affinity that Slurm set is the only thing that says which processors are the job's, and it
is kept. A quota (cpu.max) does not say which processors, only how many at once. Memory: what is available now, within
what cgroups (Slurm's --mem) grant.

Files are read below `root`, so that tests can build a machine in a folder. Nothing here raises for a file that
is missing or odd: the next best source is taken.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from scheduling.backends import CPU, CUDA, of
from scheduling.messages import Host
from workers.devices import look
from workers.gpus import GpuInventory

LOCAL_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI's mpirun
    "MPI_LOCALRANKID",  # Hydra: MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",  # MVAPICH
    "PMI_LOCAL_RANK",  # Cray and others
    "PALS_LOCAL_RANKID",  # HPE PALS
    "SLURM_LOCALID",  # last: mpirun inside a batch script inherits it from the script
)
MASK_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "GGML_VK_VISIBLE_DEVICES",
)


def describe_host(
    environ: Mapping[str, str],
    *,
    gpus: GpuInventory | None = None,
    backends: tuple[str, ...] = (CUDA.name,),
    root: Path = Path("/"),
    hostname: str | None = None,
    affinity: frozenset[int] | None = None,
) -> Host:
    """This rank's `Host`. What is not given is found out: `gpus`, with the `backends` of the build whose devices they
    are, by `workers.devices`, the rest from the kernel."""
    if gpus is None:
        found = look(environ, root=root)
        gpus = GpuInventory(found.known, found.reason, found.gpus)
        backends = tuple(backend.name for backend in found.build.backends if backend != CPU)
    if affinity is None:
        affinity = _current_affinity()
    cpus = allowed_cpus(environ, root, affinity)
    backend = of(backends)
    masks = MASK_VARIABLES if backend == CUDA else backend.variables
    return Host(
        hostname=hostname or socket.gethostname(),
        gpus=gpus.gpus,
        backends=backends,
        gpus_known=gpus.known,
        cpus=_neighbours_together(cpus, root),
        cpu_limit=cpu_quota(root),
        numa_cpus={node: near for node, all_of in _numa_nodes(root).items() if (near := _within(all_of, cpus))},
        memory_bytes=free_memory(root),
        cpus_per_task=_natural(environ.get("SLURM_CPUS_PER_TASK")),
        local_rank=local_rank(environ),
        mask=next(((name, environ[name]) for name in masks if name in environ), None),
    )


def local_rank(environ: Mapping[str, str]) -> int | None:
    """This rank's number among those of its host, as its launcher counts; None without a launcher."""
    numbers = (_natural(environ.get(name)) for name in LOCAL_RANK_VARIABLES)
    return next((number for number in numbers if number is not None), None)


def allowed_cpus(environ: Mapping[str, str], root: Path, affinity: frozenset[int]) -> tuple[int, ...]:
    """Processors that the engine may take, rising. `affinity`: those that this process is bound to now."""
    online = parse_cpu_list(_read(root / "sys/devices/system/cpu/online"))
    confined = next((cpus for text in _cpuset_texts(root) if (cpus := parse_cpu_list(text))), ())
    allowed = confined or online or tuple(sorted(affinity)) or tuple(range(os.cpu_count() or 1))
    if affinity and _started_by_srun(environ) and set(allowed) >= set(online):
        return tuple(sorted(affinity))
    return allowed


def cpu_quota(root: Path) -> int | None:
    """Whole processors' worth of time that the tightest cgroup above us grants; None if none has a quota."""
    limits = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        share, per = _natural(quota), _natural(period)
        if share and per:
            limits.append(max(1, share // per))
    return min(limits, default=None)


def free_memory(root: Path) -> int | None:
    """Bytes that can still be had: of the host's memory, or of the tightest cgroup above us. None if nothing says."""
    available = _named_number(_read(root / "proc/meminfo"), "MemAvailable:")
    left = [] if available is None else [1024 * available]
    for folder in _cgroup_folders(root, "memory"):
        limit = _natural(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
        used = _natural(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # Pages of files that nobody has touched lately count as used, and are given up when memory is asked for.
            files = _named_number(_read(folder / "memory.stat"), "inactive_file", "total_inactive_file")
            left.append(max(0, limit - used + (files or 0)))
    return min(left, default=None)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """'0-3,8' is (0, 1, 2, 3, 8). Empty where the text is no such list."""
    cpus: set[int] = set()
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except ValueError:
        return ()
    return tuple(sorted(cpus))


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    """A task of a Slurm step, not a rank that an mpirun inside a job (which uses a step itself) started."""
    by_mpirun = "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALRANKID" in environ
    return "SLURM_STEP_ID" in environ and not by_mpirun


def _cpuset_texts(root: Path) -> Iterator[str]:
    for folder in _cgroup_folders(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            yield _read(folder / name)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and those above it, nearest first, in the hierarchies of both versions.

    In a container the path that the kernel names may lie outside of what is mounted; then only the mount is left.
    """
    for line in reversed(_read(root / "proc/self/cgroup").splitlines()):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(",") and number != "0":
            continue
        for mount, shown in _cgroup_mounts(root, "" if number == "0" else controller):
            inside = path[len(shown) :] if shown != "/" and path.startswith(shown) else path
            folder = mount / inside.strip("/")
            yield from (part for part in (folder, *folder.parents) if part == mount or mount in part.parents)


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """(where it is mounted, which part of the hierarchy is shown there); no `controller` means version 2."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version_1 = kind[0] == "cgroup" and controller in kind[2].split(",")
        if version_1 if controller else kind[0] == "cgroup2":
            yield root / fields[4].lstrip("/"), fields[3]


def _numa_nodes(root: Path) -> dict[int, tuple[int, ...]]:
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        number = _natural(folder.name[4:])
        if number is not None:
            found[number] = parse_cpu_list(_read(folder / "cpulist"))
    return dict(sorted(found.items()))


def _neighbours_together(cpus: tuple[int, ...], root: Path) -> tuple[int, ...]:
    """By NUMA node, then core: cut into runs, two workers then share neither a core nor, if possible, a node."""
    node_of = {cpu: node for node, members in _numa_nodes(root).items() for cpu in members}

    def key(cpu: int) -> tuple[int, int, int]:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = parse_cpu_list(_read(topology / "thread_siblings_list"))
        return node_of.get(cpu, 0), min(siblings, default=cpu), cpu

    return tuple(sorted(cpus, key=key))


def _within(cpus: tuple[int, ...], allowed: tuple[int, ...]) -> tuple[int, ...]:
    permitted = set(allowed)
    return tuple(cpu for cpu in cpus if cpu in permitted)


def _current_affinity() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS
        return frozenset()


def _natural(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _named_number(text: str, *names: str) -> int | None:
    """The number behind the first word that is one of `names`, of lines that hold a name and a number each."""
    found = (line.split() for line in text.splitlines())
    return next((_natural(words[1]) for words in found if len(words) > 1 and words[0] in names), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
