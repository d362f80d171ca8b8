"""What NVML tells of GPUs beyond what placing ranks needs: who uses them, how they are linked, whether they are sound.

Nothing here raises: what a driver does not tell is None, and 'not told' is never 'none'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

NVLINKS_MAX = 36
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
SLOWED = {0x08: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake"}
"""Of NVML's reasons for lower clocks, those that tell of trouble. A power cap (0x04) is normal under load."""


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A process with memory on a GPU. `name` '' where it is another container's or user's."""

    pid: int
    memory_bytes: int | None = None
    name: str = ""


class GpuDetails(msgspec.Struct, frozen=True, kw_only=True):
    """One physical GPU, whatever masks hide."""

    index: int
    uuid: str
    name: str = ""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: str | None = None
    numa_node: int | None = None
    near_cpus: str = ""
    """Processors next to it, '0-31'."""
    users: tuple[User, ...] | None = None
    nvlinks: int | None = None
    """Links that are up."""
    peers: dict[str, str] = {}
    """How it reaches the others, by UUID: 'NVLink', 'PCIe', or 'no' where there is no peer access."""
    ecc_uncorrected: int | None = None
    """Errors since the driver was loaded."""
    retired_pages: int | None = None
    """Rows that were remapped after uncorrectable errors, or pages retired."""
    retirement_pending: bool | None = None
    remap_failed: bool | None = None
    slowed: tuple[str, ...] = ()
    compute_mode: str = ""
    mig: bool = False
    problem: str = ""
    """Why it cannot be asked."""


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    driver: str = ""
    cuda_driver: str = ""
    gpus: tuple[GpuDetails, ...] = ()


def survey(nvml: Any | None, sysfs: Path = Path("/sys")) -> Survey:
    """All GPUs of this machine that NVML shows; empty where it cannot be asked (`workers.gpus` says why)."""
    if nvml is None:
        return Survey()
    try:
        nvml.nvmlInit()
    except Exception:  # no driver, or a broken one
        return Survey()
    try:
        version = _or(0, lambda: nvml.nvmlSystemGetCudaDriverVersion())
        handles = [_or(None, nvml.nvmlDeviceGetHandleByIndex, k) for k in range(_or(0, nvml.nvmlDeviceGetCount))]
        return Survey(
            driver=_text(_or("", lambda: nvml.nvmlSystemGetDriverVersion())),
            cuda_driver=f"{version // 1000}.{version % 1000 // 10}" if version else "",
            gpus=tuple(_details(nvml, handles, index, sysfs) for index in range(len(handles))),
        )
    except Exception:
        return Survey()
    finally:
        _or(None, nvml.nvmlShutdown)


def _details(nvml: Any, handles: list[Any], index: int, sysfs: Path) -> GpuDetails:
    handle = handles[index]
    if handle is None:
        return GpuDetails(index=index, uuid="", problem="NVML shows it and gives no access to it")
    try:
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    except Exception as error:
        return GpuDetails(index=index, uuid="", problem=str(error))

    def ask(function: str, *arguments: Any) -> Any:
        return _or(None, lambda: getattr(nvml, function)(handle, *arguments))

    memory, capability, bus = (
        ask("nvmlDeviceGetMemoryInfo"),
        ask("nvmlDeviceGetCudaComputeCapability"),
        _bus(nvml, handle),
    )
    folder = None if bus is None else sysfs / "bus/pci/devices" / bus
    remapped = ask("nvmlDeviceGetRemappedRows")
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return GpuDetails(
        index=index, uuid=uuid, name=_text(ask("nvmlDeviceGetName") or ""),
        memory_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else "{}.{}".format(*capability),
        numa_node=_node(folder), near_cpus=_read(folder, "local_cpulist"),
        users=_users(ask("nvmlDeviceGetComputeRunningProcesses")), nvlinks=_nvlinks(nvml, handle),
        peers=_peers(nvml, handles, index),
        ecc_uncorrected=ask("nvmlDeviceGetTotalEccErrors", 1, 0),  # nvml.h: uncorrected, volatile
        retired_pages=int(remapped[1]) if remapped is not None else _retired(nvml, handle),
        retirement_pending=_flag(remapped[2] if remapped else ask("nvmlDeviceGetRetiredPagesPendingStatus")),
        remap_failed=_flag(remapped[3]) if remapped else None,
        slowed=tuple(text for bit, text in SLOWED.items() if reasons & bit),
        compute_mode=COMPUTE_MODES.get(ask("nvmlDeviceGetComputeMode"), ""),
        mig=bool((ask("nvmlDeviceGetMigMode") or (0,))[0]),
    )  # fmt: skip


def _users(running: Any) -> tuple[User, ...] | None:
    if running is None:
        return None
    return tuple(
        User(
            pid=int(one.pid),
            memory_bytes=None if one.usedGpuMemory is None else int(one.usedGpuMemory),
            name=_or("", lambda one=one: psutil.Process(one.pid).name()),
        )
        for one in running
    )


def _nvlinks(nvml: Any, handle: Any) -> int | None:
    states = [_or(None, nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(NVLINKS_MAX)] if hasattr(
        nvml, "nvmlDeviceGetNvLinkState"
    ) else []  # fmt: skip
    told = [state for state in states if state is not None]
    return sum(map(bool, told)) if told else None


def _peers(nvml: Any, handles: list[Any], index: int) -> dict[str, str]:
    """nvml.h: capability 0 is reading, 2 NVLink; status 0 is that it works."""
    found = {}
    for other, handle in enumerate(handles):
        uuid = None if handle is None or other == index else _or(None, nvml.nvmlDeviceGetUUID, handle)
        if uuid is None:
            continue
        read = _or(None, lambda handle=handle: nvml.nvmlDeviceGetP2PStatus(handles[index], handle, 0))
        link = _or(None, lambda handle=handle: nvml.nvmlDeviceGetP2PStatus(handles[index], handle, 2))
        if read is not None:
            found[_text(uuid)] = "NVLink" if link == 0 else "PCIe" if read == 0 else "no"
    return found


def _retired(nvml: Any, handle: Any) -> int | None:
    """nvml.h: cause 1 is a double bit error."""
    pages = _or(None, lambda: nvml.nvmlDeviceGetRetiredPages(handle, 1))
    return None if pages is None else len(pages)


def _bus(nvml: Any, handle: Any) -> str | None:
    """As sysfs writes it: '0000:3b:00.0'."""
    bus = _or(None, lambda: _text(nvml.nvmlDeviceGetPciInfo(handle).busId).lower())
    domain, _, rest = (bus or "").partition(":")
    return f"{int(domain, 16):04x}:{rest}" if rest else None


def _node(folder: Path | None) -> int | None:
    text = _read(folder, "numa_node")
    return int(text) if text.isdigit() else None


def _read(folder: Path | None, name: str) -> str:
    return "" if folder is None else _or("", lambda: (folder / name).read_text().strip())


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _text(value: str | bytes) -> str:
    """Older releases of nvidia-ml-py return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _or(otherwise: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """What cannot be asked is not told, and no reason to fail."""
    try:
        return ask(*arguments)
    except Exception:
        return otherwise
