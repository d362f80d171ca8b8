"""AMD's GPUs as ROCm numbers them: from the kernel's topology, narrowed by the masks as the runtimes read them.

/sys/class/kfd/kfd/topology/nodes/N/properties has a name and a number in each line; nodes with `simd_count` are GPUs,
in ROCm's order. What a device cgroup hides cannot be read, and is not counted by ROCm either. `unique_id` makes the
UUID ('GPU-' and 16 hexadecimal digits); it is 0 on many cards for desktops, and one for all partitions of a card that
is cut up: such devices are named by index.

ROCR_VISIBLE_DEVICES takes indexes and beginnings of UUIDs; an entry that is wrong, or named before, ends the list.
Sources: ROCR-Runtime's amd_filter_device.cpp, ROCm's page 'GPU isolation techniques', the kernel's kfd_topology.c.
HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES where that is not set, then counts what is left. Slurm writes the same list
into all of them: a list that is the same as ROCR_VISIBLE_DEVICES is taken as said once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from scheduling.messages import Gpu
from workers.devices.masks import by_index, cut_off
from workers.gpus import GpuInventory

UUID_CHARACTERS = 20


def inventory(environ: Mapping[str, str], sysfs: Path = Path("/sys")) -> GpuInventory:
    """GPUs that a process with `environ` may use, in the order in which HIP would number them."""
    nodes = sysfs / "class/kfd/kfd/topology/nodes"
    try:
        folders = sorted((path for path in nodes.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    except OSError as error:
        # ROCm reaches GPUs through this driver alone, except under WSL.
        if isinstance(error, FileNotFoundError) and not (sysfs.parent / "dev/dxg").exists():
            return GpuInventory(True, f"there is no {nodes}: no AMD GPU, or its driver (amdgpu) is not loaded", ())
        return GpuInventory(False, f"{nodes} cannot be read: {error.strerror}", ())
    found = [gpu for folder in folders if (gpu := _gpu(folder, sysfs)) is not None]
    gpus, remark = visible(name_each(found), environ)
    return GpuInventory(True, remark, tuple(gpus))


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[list[Gpu], str]:
    """What the masks of `environ` leave of `gpus`, and a remark for people."""
    left, remarks = list(gpus), []
    rocr = environ.get("ROCR_VISIBLE_DEVICES")
    if rocr is not None:
        left, remark = cut_off(left, "ROCR_VISIBLE_DEVICES", rocr, _named)
        remarks.append(remark)
    for variable in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        mask = environ.get(variable, "")
        if mask:
            if mask != rocr:
                left, remark = cut_off(left, variable, mask, _named)
                remarks.append(remark)
            break
    return left, "; ".join(filter(None, remarks))


def name_each(gpus: Sequence[Gpu]) -> list[Gpu]:
    """`gpus` (all that ROCm counts), each with an identity of its own and what ROCR_VISIBLE_DEVICES calls it."""
    times = Counter(gpu.uuid for gpu in gpus)
    named = []
    for index, gpu in enumerate(gpus):
        own = gpu.uuid and times[gpu.uuid] == 1
        uuid = gpu.uuid if own else f"AMD-{gpu.pci_bus_id or index}"
        named.append(msgspec.structs.replace(gpu, uuid=uuid, index=index, mask_entry="" if own else str(index)))
    return named


def parse_properties(text: str) -> dict[str, int]:
    """The numbers of a `properties` file by name."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isascii() and pair[1].isdigit()}


def architecture(version: int) -> str:
    """90402 is 'gfx942', 90010 'gfx90a': two decimal digits each for minor and stepping, written as one hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _gpu(folder: Path, sysfs: Path) -> Gpu | None:
    """The GPU of a node of the topology: its `uuid` is empty where it has none of its own."""
    node = parse_properties(_read(folder / "properties"))
    if not node.get("simd_count"):
        return None
    unique, place = node.get("unique_id", 0), node.get("location_id")
    bus = None if place is None else _bus_id(node.get("domain", 0), place)
    device = sysfs / "bus/pci/devices" / (bus or "none")
    # The kernel's own account of the card; a partition has no such files.
    total, used = _number(device / "mem_info_vram_total"), _number(device / "mem_info_vram_used")
    numa = _number(device / "numa_node")
    return Gpu(
        uuid=f"GPU-{unique:016x}" if unique else "",
        name=_read(device / "product_name") or f"AMD GPU ({architecture(node.get('gfx_target_version', 0))})",
        index=0,
        memory_bytes=_bank_bytes(folder) if total is None else total,
        free_bytes=None if total is None or used is None else max(0, total - used),
        pci_bus_id=bus,
        numa_node=numa,
    )


def _bank_bytes(folder: Path) -> int | None:
    """Memory of the node itself: heaps 1 and 2 of its banks (public, private); 0 is the host's."""
    banks = [parse_properties(_read(bank / "properties")) for bank in (folder / "mem_banks").glob("[0-9]*")]
    return sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2)) or None


def _bus_id(domain: int, location: int) -> str:
    """29952 is 0x7500: bus 75, device 0, function 0."""
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry[:1].lower() != "g":
        return by_index(gpus, entry)
    if not 5 <= len(entry) <= UUID_CHARACTERS:
        return None
    matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    return matches[0] if len(matches) == 1 else None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isascii() and text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
