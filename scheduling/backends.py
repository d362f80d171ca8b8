"""The backends of llama.cpp that compute on devices, and the variables that show a process some of them.

A mask is environment for the engine process. CUDA is told UUIDs. ROCm hides twice: ROCR_VISIBLE_DEVICES first, whose
entries count all devices, then HIP_VISIBLE_DEVICES (or CUDA_VISIBLE_DEVICES, where that is not set), which counts what
is left; so both are written, and none that a launcher has set counts twice. SYCL goes over Level Zero, which
ZE_AFFINITY_MASK narrows; ONEAPI_DEVICE_SELECTOR chooses among what is left. Vulkan's variable is ggml's own. Metal has
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduling.messages import Gpu


@dataclass(frozen=True, slots=True)
class Backend:
    """`variables` hide devices: first the one that names them, then those that would hide some of its choice."""

    name: str
    title: str
    variables: tuple[str, ...]


CUDA = Backend("cuda", "CUDA", ("CUDA_VISIBLE_DEVICES",))
HIP = Backend("hip", "ROCm (HIP)", ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
SYCL = Backend("sycl", "SYCL", ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"))
VULKAN = Backend("vulkan", "Vulkan", ("GGML_VK_VISIBLE_DEVICES",))
METAL = Backend("metal", "Metal", ())
CPU = Backend("cpu", "CPU", ())
BACKENDS = {backend.name: backend for backend in (CUDA, HIP, SYCL, METAL, VULKAN, CPU)}
"""By name; where a build has several, the first of them is used, the one made for the device before Vulkan."""

_HIDING = {"HIP_VISIBLE_DEVICES": "-1"}
"""Empty, it counts as not set."""


def of(names: Sequence[str]) -> Backend:
    """The one whose devices are used by a build with backends `names`; CUDA where there is none, so that GPUs which
    the build cannot use are still found."""
    return BACKENDS[names[0]] if names else CUDA


def mask_of(names: Sequence[str], gpus: Sequence[Gpu]) -> dict[str, str]:
    """What lets a process whose build has backends `names` see `gpus` (none: hides all) and no other devices.

    Of the first backend nothing is written where one of the devices has no name in its mask.
    """
    backend = of(names)
    hidden = {name: value for other in names[1:] for name, value in hiding_mask(BACKENDS[other]).items()}
    return hidden | (_showing(backend, gpus) if gpus else hiding_mask(backend))


def hiding_mask(backend: Backend) -> dict[str, str]:
    """What hides all devices of `backend` from a process."""
    return hide_all(dict.fromkeys(backend.variables, ""))


def hide_all(mask: Mapping[str, str]) -> dict[str, str]:
    """The variables of `mask`, so that they show nothing. SYCL's are left out: its runtime fails where there is no
    device at all, so an engine without devices is told in its config."""
    return {name: _HIDING.get(name, "") for name in mask if name not in SYCL.variables}


def shown(names: Sequence[str], mask: Mapping[str, str], gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those of `gpus` that a mask made by `mask_of` names."""
    entries = [entry for name in of(names).variables[:1] for entry in mask.get(name, "").split(",")]
    return [gpu for gpu in gpus if (gpu.mask_entry or gpu.uuid) in entries]


def _showing(backend: Backend, gpus: Sequence[Gpu]) -> dict[str, str]:
    entries = [gpu.uuid if gpu.mask_entry == "" else gpu.mask_entry for gpu in gpus]
    if not backend.variables or None in entries:
        return {}
    mask = {backend.variables[0]: ",".join(filter(None, entries))}
    if backend == HIP:
        mask["HIP_VISIBLE_DEVICES"] = ",".join(str(place) for place in range(len(entries)))
    if backend == SYCL:
        mask["ONEAPI_DEVICE_SELECTOR"] = "level_zero:gpu"
    return mask
