"""Intel's GPUs as Level Zero numbers them: `sycl-ls`, narrowed by ZE_AFFINITY_MASK and ONEAPI_DEVICE_SELECTOR.

A line is '[level_zero:gpu][level_zero:0] platform, name version [driver]'. It is asked for without the masks, which
are applied here, so that two ranks under different masks speak of the same devices. ZE_AFFINITY_MASK counts the
devices of Level Zero: the stacks of a card one by one, unless ZE_FLAT_DEVICE_HIERARCHY says otherwise; entries that
name nothing are passed over. The selector then chooses among what is left, and is understood where it is a plain list
for Level Zero. Anything else (parts of devices, '!', other backends) is not taken apart: the devices are unknown then.
Sources: 'Affinity Mask' in the Level Zero specification, EnvironmentVariables.md of intel/llvm, SYCL.md of llama.cpp.
sycl-ls tells no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from scheduling.messages import Gpu
from workers.devices.masks import by_index
from workers.gpus import GpuInventory

COMMAND = ("sycl-ls",)
MASK, SELECTOR = "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"

_LINE = re.compile(r"^\[(?:ext_oneapi_)?level_zero:gpu\]\[level_zero:([0-9]+)\]\s*(.*)$")
_VERSION = re.compile(r"\s+[0-9.]+\s*\[[^\]]*\]\s*$")
_SELECTED = re.compile(r"level_zero:([0-9*,]+|gpu)", re.IGNORECASE)


def unmasked(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which all devices are listed."""
    return {name: value for name, value in environ.items() if name not in (MASK, SELECTOR)}


def inventory(environ: Mapping[str, str], listing: str) -> GpuInventory:
    """GPUs that a process with `environ` may use, given what `COMMAND` prints without masks."""
    gpus = parse_listing(listing)
    remark = ""
    if mask := environ.get(MASK):
        if "." in mask:
            return GpuInventory(False, f"{MASK}={mask} names parts of devices", ())
        gpus, remark = affine(gpus, mask)
    if selector := environ.get(SELECTOR):
        chosen = selected(gpus, selector)
        if chosen is None:
            return GpuInventory(False, f"{SELECTOR}={selector} is no plain list of Level Zero's devices", ())
        gpus = chosen
    return GpuInventory(True, remark, tuple(gpus))


def parse_listing(text: str) -> list[Gpu]:
    """Level Zero's GPUs in the order of their index."""
    found = {}
    for line in text.splitlines():
        if match := _LINE.match(line.strip()):
            index, rest = int(match[1]), match[2]
            name = _VERSION.sub("", rest.partition(", ")[2] or rest)
            found[index] = Gpu(uuid=f"level_zero:{index}", name=name, index=index, mask_entry=str(index))
    return [found[index] for index in sorted(found)]


def affine(gpus: Sequence[Gpu], mask: str) -> tuple[list[Gpu], str]:
    """Those of `gpus` that ZE_AFFINITY_MASK shows: in their own order, whatever that of the mask is."""
    entries = [entry.strip() for entry in mask.split(",")]
    chosen = [by_index(gpus, entry) for entry in entries]
    wrong = [entry for entry, gpu in zip(entries, chosen, strict=True) if gpu is None]
    remark = f"{MASK}: {', '.join(map(repr, wrong))} names no device" if wrong else ""
    return [gpu for gpu in gpus if gpu in chosen], remark


def selected(gpus: Sequence[Gpu], selector: str) -> list[Gpu] | None:
    """Those of `gpus` that ONEAPI_DEVICE_SELECTOR leaves; None if it says more than can be told here."""
    chosen: list[Gpu | None] = []
    for term in filter(None, map(str.strip, selector.split(";"))):
        if (match := _SELECTED.fullmatch(term)) is None:
            return None
        if match[1].lower() in ("gpu", "*"):
            return list(gpus)
        if "*" in match[1]:
            return None
        chosen += [by_index(gpus, entry) for entry in match[1].split(",")]
    return [gpu for gpu in gpus if gpu in chosen]
