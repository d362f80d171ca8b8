"""Processors, limits of the system, and variables of the environment that surprise people."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.doctor.facts import Facts, Limits, Node
from coordinator.doctor.findings import Finding, error, merged, ok, size_text, warning

OPEN_FILES_MIN = 1024
OPEN_FILES_PER_RANK = 16
LOCKED_BYTES_MIN = 64 << 20
SHM_BYTES_MIN = 256 << 20
"""Docker gives 64 MiB, which shared-memory transports of MPI can exhaust."""

HIDING = {
    "CUDA_VISIBLE_DEVICES": ("", "-1"),
    "ROCR_VISIBLE_DEVICES": ("", "-1"),
    "HIP_VISIBLE_DEVICES": ("-1",),
    "GGML_VK_VISIBLE_DEVICES": ("",),
}
"""Values that hide all devices; an empty HIP_VISIBLE_DEVICES counts as not set."""


def about_processors(facts: Mapping[int, Facts]) -> list[Finding]:
    """One finding a host: what its ranks may use there."""
    findings = []
    by_host: dict[str, list[Facts]] = {}
    for one in facts.values():
        by_host.setdefault(one.host.hostname, []).append(one)
    for name, ranks in by_host.items():
        cpus = {cpu for one in ranks for cpu in one.host.cpus}
        host = ranks[0].host
        said = [f"{len(cpus)} processors"]
        said.append(f"quota {host.cpu_limit} at once" if host.cpu_limit else "no quota")
        if host.numa_cpus:
            said.append(f"{len(host.numa_cpus)} NUMA node{'s' if len(host.numa_cpus) > 1 else ''}")
        if host.cpus_per_task:
            said.append(f"{host.cpus_per_task} a task by Slurm")
        if host.memory_bytes is not None:
            said.append(f"{size_text(host.memory_bytes)} of memory can be had")
        bound = sorted({one.bound_cpus for one in ranks if one.bound_cpus})
        narrow = bool(bound) and bound[0] < len(cpus)
        if narrow:
            said.append(f"the launcher bound ranks to {bound[0]}; engines take back their share")
        findings.append(ok("processors", ", ".join(said), name))
        if len(ranks) > max(1, len(cpus)):
            findings.append(
                warning("processors", f"{len(ranks)} ranks on {len(cpus)} processors",
                        "start fewer ranks there: they take turns, and figures measured here mean little", name)
            )  # fmt: skip
    return merged(findings)


def about_limits(nodes: Mapping[str, Node], ranks: int) -> list[Finding]:
    return merged(
        finding
        for host, node in nodes.items()
        if node.limits is not None
        for finding in _limits(host, node.limits, ranks, gpus_beyond=bool(node.gpus))
    )


def _limits(host: str, limits: Limits, ranks: int, *, gpus_beyond: bool) -> list[Finding]:
    findings = []
    needed = max(OPEN_FILES_MIN, OPEN_FILES_PER_RANK * ranks)
    if 0 <= limits.open_files < needed:
        findings.append(
            warning("open files", f"at most {limits.open_files} (ulimit -n); {ranks} ranks may want {needed}",
                    "raise it before mpirun or srun", host, command=f"ulimit -n {needed}")
        )  # fmt: skip
    else:
        findings.append(ok("open files", f"{'unlimited' if limits.open_files < 0 else limits.open_files}", host))
    locked = limits.locked_memory_bytes
    little = 0 <= locked < LOCKED_BYTES_MIN
    if little and limits.rdma:
        findings.append(
            warning("locked memory", f"at most {size_text(locked)} (ulimit -l): RDMA cannot register memory",
                    "raise it (memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1)", host,
                    command="ulimit -l unlimited")
        )  # fmt: skip
    else:
        said = "unlimited" if locked < 0 else size_text(locked)
        findings.append(
            ok("locked memory", said + (" (RDMA would want more: there is none here)" if little else ""), host)
        )
    if limits.shm_bytes is None:
        findings.append(
            warning("/dev/shm", "there is none: MPI's shared memory has no place",
                    "mount it, or turn shared memory off (OMPI_MCA_btl=^sm)", host)
        )  # fmt: skip
    elif limits.shm_bytes < SHM_BYTES_MIN:
        findings.append(
            warning("/dev/shm", f"{size_text(limits.shm_bytes)} in all, as containers have it: MPI may run out of it",
                    "start the container with more", host, command="docker run --shm-size=1g …")
        )  # fmt: skip
    else:
        free = "" if limits.shm_free_bytes is None else f", {size_text(limits.shm_free_bytes)} free"
        findings.append(ok("/dev/shm", f"{size_text(limits.shm_bytes)}{free}", host))
    return findings


def about_environment(facts: Mapping[int, Facts], nodes: Mapping[str, Node], launcher: str) -> list[Finding]:
    """`launcher`: what started the ranks (`coordinator.launch.Launch`)."""
    findings: list[Finding] = []
    for one in facts.values():
        node = nodes.get(one.host.hostname)
        findings += _variables(one, has_gpus=node is not None and _has_gpus(node))
        findings += _cpus_per_task(one, launcher)
    for host, node in nodes.items():
        if node.limits is not None and not node.limits.home_writable:
            findings.append(
                warning("home", f"{node.limits.home or 'the home directory'} cannot be written: the model store and "
                        "caches of drivers have no place",
                        "set LLMPI_HOME (model store) and XDG_CACHE_HOME to a folder that you may write to", host,
                        command='export LLMPI_HOME="$TMPDIR/llmpi" XDG_CACHE_HOME="$TMPDIR/cache"')
            )  # fmt: skip
    findings = merged(findings)
    return findings or [ok("environment", "no variable that gets in the way; home can be written")]


def _has_gpus(node: Node) -> bool:
    return bool(node.gpus or node.nvidia_devices or node.other_gpus)


def _variables(one: Facts, *, has_gpus: bool) -> list[Finding]:
    environ, host = one.environ, one.host.hostname
    findings = []
    for name in one.mask_variables or ("CUDA_VISIBLE_DEVICES",):
        mask = environ.get(name, "unset").strip()
        if has_gpus and mask in HIDING.get(name, ()):
            findings.append(
                error(name, f"it is {mask or 'empty'}: all GPUs of this host are hidden",
                      "unset it, or ask the scheduler for GPUs (srun --gpus-per-task=1)", host, command=f"unset {name}")
            )  # fmt: skip
    if "OMP_NUM_THREADS" in environ:
        value = environ["OMP_NUM_THREADS"]
        findings.append(
            ok("OMP_NUM_THREADS", f"{value}: engines do not go by it, they have the threads of their placement", host)
        )  # fmt: skip
    limit = environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and int(limit) < len(one.host.cpus):
        findings.append(
            warning("OMP_THREAD_LIMIT", f"{limit}: an engine cannot use more threads than this", "unset it", host,
                    command="unset OMP_THREAD_LIMIT")
        )  # fmt: skip
    if environ.get("OMP_PROC_BIND", "false").lower() not in ("false", ""):
        findings.append(
            warning("OMP_PROC_BIND", f"{environ['OMP_PROC_BIND']}: threads of several contexts may be bound to "
                    "the same processors", "unset it: ranks and engines are placed already", host,
                    command="unset OMP_PROC_BIND OMP_PLACES")
        )  # fmt: skip
    return findings


def _cpus_per_task(one: Facts, launcher: str) -> list[Finding]:
    """What --cpus-per-task of a job has come to. mpirun does not go by it."""
    asked = one.environ.get("SLURM_CPUS_PER_TASK", "")
    if not asked.isdigit() or "SRUN_CPUS_PER_TASK" in one.environ or launcher not in ("none", "slurm"):
        return []
    bound = one.bound_cpus if launcher == "slurm" else 1
    if not 0 < bound < int(asked):
        return []
    gets = "a task has" if launcher == "slurm" else "a task that srun starts may get"
    return [
        warning("SRUN_CPUS_PER_TASK", f"it is not set while SLURM_CPUS_PER_TASK is {asked}: since Slurm 22.05 srun "
                f"does not take over sbatch's --cpus-per-task, and {gets} {bound} processor{'s' if bound > 1 else ''}",
                "export it before srun", one.host.hostname,
                command="export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    ]  # fmt: skip
