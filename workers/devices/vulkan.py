"""GPUs as Vulkan numbers them: `vulkaninfo --summary`, narrowed by ggml's GGML_VK_VISIBLE_DEVICES.

The index of the mask is that of all physical devices, software ones included, which is also vulkaninfo's. Without a
mask ggml takes every discrete and integrated GPU, one driver for each (those of one deviceUUID are one GPU: RADV before
AMD's own, NVIDIA's own before NVK), and llama.cpp uses integrated ones only where there are no others. An index that
does not exist makes ggml refuse the whole list. Source: ggml-vulkan.cpp of llama.cpp. The summary tells no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduling.messages import Gpu
from workers.gpus import GpuInventory

COMMAND = ("vulkaninfo", "--summary")
VARIABLE = "GGML_VK_VISIBLE_DEVICES"

_HEAD = re.compile(r"^GPU([0-9]+):\s*$")
_PREFERRED = ("DRIVER_ID_MESA_RADV", "DRIVER_ID_AMD_OPEN_SOURCE", "DRIVER_ID_NVIDIA_PROPRIETARY")


@dataclass(frozen=True, slots=True)
class _Physical:
    gpu: Gpu
    kind: str
    """'DISCRETE_GPU', 'INTEGRATED_GPU', 'CPU', …"""
    driver: str


def inventory(environ: Mapping[str, str], summary: str) -> GpuInventory:
    """GPUs that ggml would use in a process with `environ`, given what `COMMAND` prints."""
    devices = parse_summary(summary)
    if not devices:
        return GpuInventory(False, f"{COMMAND[0]} lists no devices in a form that is known", ())
    mask = environ.get(VARIABLE)
    if mask is None:
        return GpuInventory(True, "", tuple(device.gpu for device in _by_default(devices)))
    gpus, remark = visible([device.gpu for device in devices], mask)
    return GpuInventory(True, remark, tuple(gpus))


def parse_summary(text: str) -> list[_Physical]:
    """The devices of `vulkaninfo --summary`, in Vulkan's order."""
    devices: list[tuple[int, dict[str, str]]] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            devices.append((int(head[1]), {}))
        elif devices and "=" in line:
            name, _, value = line.partition("=")
            devices[-1][1].setdefault(name.strip(), value.strip())
    return [_physical(index, facts) for index, facts in devices]


def visible(gpus: Sequence[Gpu], mask: str) -> tuple[list[Gpu], str]:
    """Those of `gpus` (all physical devices) that `mask` shows, and a remark for people."""
    by_index = {gpu.index: gpu for gpu in gpus}
    chosen: list[Gpu] = []
    for entry in mask.replace(",", " ").split():
        if not (entry.isascii() and entry.isdigit()):
            # Read as numbers until something is none; a minus is a number that no device has.
            refused = entry.startswith("-")
            return ([] if refused else chosen), f"{VARIABLE}: {entry!r} is no index"
        gpu = by_index.get(int(entry))
        if gpu is None:
            return [], f"{VARIABLE}: there is no device {entry}, so ggml refuses all of it"
        if gpu not in chosen:
            chosen.append(gpu)
    return chosen, ""


def _physical(index: int, facts: Mapping[str, str]) -> _Physical:
    gpu = Gpu(
        uuid=facts.get("deviceUUID") or f"vulkan-{index}",
        name=facts.get("deviceName", "unknown GPU"),
        index=index,
        mask_entry=str(index),
    )
    kind = facts.get("deviceType", "").removeprefix("PHYSICAL_DEVICE_TYPE_")
    return _Physical(gpu, kind, facts.get("driverID", ""))


def _by_default(devices: Sequence[_Physical]) -> list[_Physical]:
    one_each: dict[str, _Physical] = {}
    for device in devices:
        if device.kind in ("DISCRETE_GPU", "INTEGRATED_GPU"):
            other = one_each.setdefault(device.gpu.uuid, device)
            if _rank(device.driver) < _rank(other.driver):
                one_each[device.gpu.uuid] = device
    gpus = list(one_each.values())
    return [device for device in gpus if device.kind == "DISCRETE_GPU"] or gpus


def _rank(driver: str) -> int:
    return _PREFERRED.index(driver) if driver in _PREFERRED else len(_PREFERRED)
