"""MPI as this process has it: the library, and the signs of what it sends over."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from coordinator.doctor.about_mpi import LAYERS, THREAD_LEVELS, MpiFacts, Traffic

if TYPE_CHECKING:
    from coordinator.mpi import World

VERSION_S = 10.0
DEVICES = {"/dev/infiniband/": "RDMA", "/dev/cxi": "Slingshot", "/dev/hfi1": "Omni-Path", "/dev/knem": "knem"}
SEGMENTS = re.compile(r"^/dev/shm/|sm_segment|vader_segment|shmem|^/SYSV|ucx_shm|mpich_shm|^/memfd:.*(ucx|mpi)")


def look_at_world(world: World, launcher: str, singleton: str) -> MpiFacts:
    """Of MPI that was started."""
    MPI = world.MPI
    return MpiFacts(
        library=" ".join(world.library().split()), vendor=str(MPI.get_vendor()[0]),
        standard=".".join(map(str, MPI.Get_version())),
        thread_level=_level(MPI), fault_tolerant=world.fault_tolerant, launcher=launcher, size=world.size,
        singleton=singleton,
    )  # fmt: skip


def _level(MPI: Any) -> str:
    names = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    told = dict(zip(names, THREAD_LEVELS, strict=True))
    return str(told.get(MPI.Query_thread(), ""))


def look_at_library() -> MpiFacts:
    """Of MPI that is there, without starting it."""
    from coordinator.mpi import library_facts

    mpirun = shutil.which("mpirun") or ""
    try:
        library, standard, vendor = library_facts()
    except (ImportError, OSError, RuntimeError) as error:
        return MpiFacts(problem=str(error).splitlines()[0], mpirun=mpirun)
    return MpiFacts(
        library=" ".join(library.split()), vendor=vendor, standard=standard, mpirun=mpirun,
        mpirun_version=_version(mpirun) if mpirun else "",
    )  # fmt: skip


def _version(mpirun: str) -> str:
    try:
        done = subprocess.run(
            [mpirun, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VERSION_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    version = next((line for line in lines if line.lower().startswith("version")), "")
    return " ".join(" ".join([*lines[:1], version]).split())


def look_at_traffic(process: Path = Path("/proc/self"), sysfs: Path = Path("/sys")) -> Traffic:
    """Of this process, now."""
    try:
        lines = (process / "maps").read_text(errors="replace").splitlines()
        opened = {os.readlink(link) for link in (process / "fd").iterdir() if link.is_symlink()}
    except OSError:
        return Traffic()
    mapped = {fields[5] for fields in (line.split(None, 5) for line in lines) if len(fields) > 5}
    names = {Path(file).name for file in mapped}
    devices: dict[str, tuple[str, ...]] = {}
    for file in sorted(opened):
        kind = next((kind for start, kind in DEVICES.items() if file.startswith(start)), None)
        if kind is not None:
            devices[kind] = (*devices.get(kind, ()), file)
    return Traffic(
        libraries=tuple(name for name in LAYERS if any(one.startswith(name) for one in names)),
        devices=devices,
        cards=tuple(sorted(card.name for card in (sysfs / "class/infiniband").glob("*"))),
        shared=tuple(sorted(file for file in mapped if SEGMENTS.search(file))),
        tcp_peers=_peers(),
    )


def _peers() -> tuple[str, ...] | None:
    """What stays on this host is left out: that is how some launchers talk to their ranks."""
    try:
        process = psutil.Process()
        ask = getattr(process, "net_connections", None) or process.connections
        both = [(one.laddr.ip, one.raddr.ip) for one in ask(kind="tcp") if one.status == psutil.CONN_ESTABLISHED]
    except (psutil.Error, OSError):
        return None
    return tuple(sorted({theirs for ours, theirs in both if ours != theirs}))
