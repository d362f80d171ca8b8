"""Which GPUs this rank may use: asked of NVML, without waking CUDA, and narrowed by the mask as CUDA reads it.

NVML lists every GPU of the machine (those that a device cgroup hides left out), in PCI order, whatever
CUDA_VISIBLE_DEVICES says. So the mask is applied here, by CUDA's rules as observed on driver 580:

- an entry is an index ('1', also ' 1' or '01'; what follows the digits is ignored) in CUDA's order of devices,
  or a prefix of exactly one UUID ('GPU-3f…', 'MIG-…', any case, no space before it);
- the first entry that names nothing hides itself and all that follow, so '-1' and '' hide everything;
- the kind of the first entry binds: an index after a UUID, or the reverse, names nothing;
- a device named twice makes CUDA refuse the whole list.

A GPU cut into MIG devices is replaced by them: each can be given to a process of its own by its UUID.
Nothing here raises: a machine without NVML gives `known=False` and the reason. 'Missing' is never 'none'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduling.messages import Gpu
from scheduling.placement import DEVICE_MASK

_INDEX = re.compile(r"\s*([+-]?[0-9]+)")
_OLD_MIG = re.compile(r"MIG-(GPU-[0-9a-f-]+)/([0-9]+)/([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """`known` False: nobody could be asked, and `reason` says why. Else `reason` is a remark, mostly empty."""

    known: bool
    reason: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU or MIG device with what only the mask's rules need. `mig` is (GPU instance, compute instance)."""

    gpu: Gpu
    parent_uuid: str
    mig: tuple[int, int] | None = None
    speed: int = 0
    """Cores times clock: CUDA's default order puts the fastest first."""


def load_nvml() -> Any | None:
    """The module `pynvml` of nvidia-ml-py, or None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def inventory(environ: Mapping[str, str], *, nvml: Any | None, sysfs: Path = Path("/sys")) -> GpuInventory:
    """GPUs that a process with `environ` may use, in the order in which CUDA would number them."""
    if nvml is None:
        return GpuInventory(False, "nvidia-ml-py is not installed", ())
    try:
        nvml.nvmlInit()
    except Exception as error:  # NVMLError, or whatever a broken driver library raises
        return GpuInventory(False, f"NVML cannot be asked: {error}", ())
    try:
        devices, remarks = _all_devices(nvml, sysfs)
    except Exception as error:
        return GpuInventory(False, f"NVML failed: {error}", ())
    finally:
        _or_none(nvml.nvmlShutdown)
    mask = environ.get(DEVICE_MASK)
    if mask is None:
        return GpuInventory(True, "; ".join(remarks), tuple(device.gpu for device in devices))
    ordered, guessed = _cuda_order(devices, environ)
    chosen, remark, by_index = visible(ordered, mask)
    if guessed and by_index:
        remarks.append("unlike GPUs are masked by index: set CUDA_DEVICE_ORDER=PCI_BUS_ID or use UUIDs to be sure")
    return GpuInventory(True, "; ".join([*remarks, remark] if remark else remarks), tuple(d.gpu for d in chosen))


def visible(devices: Sequence[_Device], mask: str) -> tuple[list[_Device], str, bool]:
    """Apply `mask` to `devices` (in CUDA's order): what is left, a remark for people, and if it went by index."""
    chosen: list[_Device] = []
    by_index = _INDEX.match(mask) is not None
    for entry in mask.split(","):
        device = _by_index(devices, entry) if by_index else _by_uuid(devices, entry)
        if device is None:
            meant = entry.strip() in ("", "-1")
            remark = "" if meant else f"{DEVICE_MASK}: {entry!r} names no GPU, so it hides the rest"
            return chosen, remark, by_index
        if device in chosen:
            return [], f"{DEVICE_MASK} names {device.gpu.uuid} twice, so CUDA refuses all of it", by_index
        chosen.append(device)
    return chosen, "", by_index


def _by_index(devices: Sequence[_Device], entry: str) -> _Device | None:
    found = _INDEX.match(entry)
    # CUDA counts physical GPUs; of one that is cut up it uses the first MIG device.
    first = {device.parent_uuid: device for device in reversed(devices)}
    physical = list(dict.fromkeys(device.parent_uuid for device in devices))
    if found is None or not 0 <= int(found[1]) < len(physical):
        return None
    return first[physical[int(found[1])]]


def _by_uuid(devices: Sequence[_Device], entry: str) -> _Device | None:
    entry = entry.rstrip()
    old = _OLD_MIG.fullmatch(entry)
    if old is not None:
        instance = int(old[2]), int(old[3])
        matches = [d for d in devices if d.parent_uuid.lower() == old[1].lower() and d.mig == instance]
        return matches[0] if matches else None
    prefix = entry.lower()
    if prefix.startswith("mig-"):
        matches = [device for device in devices if device.gpu.uuid.lower().startswith(prefix)]
        return matches[0] if len(matches) == 1 else None
    if not prefix.startswith("gpu-"):
        return None
    matches = [device for device in devices if device.parent_uuid.lower().startswith(prefix)]
    return matches[0] if len({device.parent_uuid for device in matches}) == 1 else None


def _cuda_order(devices: Sequence[_Device], environ: Mapping[str, str]) -> tuple[list[_Device], bool]:
    """`devices` as CUDA numbers them; True if that is a guess: unlike GPUs in CUDA's 'fastest first' order."""
    unlike = len({device.gpu.name for device in devices if device.mig is None}) > 1
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or not unlike:
        return list(devices), False
    return sorted(devices, key=lambda device: -device.speed), True


def _all_devices(nvml: Any, sysfs: Path) -> tuple[list[_Device], list[str]]:
    devices: list[_Device] = []
    remarks: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            devices += _physical(nvml, handle, index, sysfs)
        except nvml.NVMLError as error:
            # A device cgroup hides it ('no permission'), or it is lost: either way it is not ours to use.
            remarks.append(f"GPU {index} cannot be used: {error}")
    devices.sort(key=lambda device: (device.gpu.pci_bus_id or "~", device.gpu.index))
    return devices, remarks


def _physical(nvml: Any, handle: Any, index: int, sysfs: Path) -> list[_Device]:
    """One GPU, or the MIG devices that it is cut into."""
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    bus = _or_none(lambda: _sysfs_bus_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)))
    node = _numa_node(bus, sysfs)
    capability = _or_none(lambda: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    cores = _or_none(lambda: int(nvml.nvmlDeviceGetNumGpuCores(handle))) or 0
    clock = _or_none(lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))) or 0

    def device(part: Any, part_uuid: str, mig: tuple[int, int] | None) -> _Device:
        gpu = Gpu(
            uuid=part_uuid,
            name=_or_none(lambda: _text(nvml.nvmlDeviceGetName(part))) or "unknown GPU",
            index=index,
            memory_bytes=_or_none(lambda: int(nvml.nvmlDeviceGetMemoryInfo(part).total)),
            free_bytes=_or_none(lambda: int(nvml.nvmlDeviceGetMemoryInfo(part).free)),
            pci_bus_id=bus,
            numa_node=node,
            compute_capability=capability,
        )
        return _Device(gpu, uuid, mig, cores * clock)

    if (_or_none(lambda: nvml.nvmlDeviceGetMigMode(handle)[0]) or 0) != 1:
        return [device(handle, uuid, None)]
    parts = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        part = _or_none(lambda slot=slot: nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))  # type: ignore[misc]
        if part is None:
            continue
        instance = _or_none(
            lambda part=part: (  # type: ignore[misc]
                int(nvml.nvmlDeviceGetGpuInstanceId(part)),
                int(nvml.nvmlDeviceGetComputeInstanceId(part)),
            )
        )
        parts.append(device(part, _text(nvml.nvmlDeviceGetUUID(part)), instance or (-1, -1)))
    return parts


def _numa_node(bus: str | None, sysfs: Path) -> int | None:
    """The kernel's NUMA node of a PCI device; None where it has none (-1) or does not say."""
    if bus is None:
        return None
    try:
        node = int((sysfs / "bus/pci/devices" / bus / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _sysfs_bus_id(bus: str) -> str:
    """NVML writes '00000000:3B:00.0', sysfs '0000:3b:00.0'."""
    domain, _, rest = bus.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _text(value: str | bytes) -> str:
    """Older releases of nvidia-ml-py return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _or_none(ask: Callable[[], Any]) -> Any:
    """What a driver does not support is missing, and no reason to fail."""
    try:
        return ask()
    except Exception:
        return None
