"""Tables: device lists and masks of ROCm, Vulkan and SYCL, and what their runtimes would make of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.workers import device_lists as lists
from workers.devices import rocm, sycl, vulkan

A, B, C = "GPU-21b6d61638a86f8c", "GPU-1f9de0957d137942", "GPU-00000000deadbeef"


# ---------------------------------------------------------------- ROCm


def _rocm(sysfs: Path, **environ: str) -> tuple[list[str], str]:
    found = rocm.inventory(environ, sysfs)
    return [gpu.uuid for gpu in found.gpus], found.reason


def test_gpus_of_the_kernels_topology_carry_what_placement_needs(tmp_path: Path) -> None:
    lists.write_kfd(tmp_path, lists.KFD_MI300X)
    device = tmp_path / "bus/pci/devices/0000:75:00.0"
    device.mkdir(parents=True)
    for name, text in {"mem_info_vram_total": 1000, "mem_info_vram_used": 300, "numa_node": 1}.items():
        (device / name).write_text(f"{text}\n")
    (device / "product_name").write_text("AMD Instinct MI300X OAM\n")
    found = rocm.inventory({}, tmp_path)
    assert found.known
    assert [gpu.uuid for gpu in found.gpus] == [A, B, C]
    assert [gpu.pci_bus_id for gpu in found.gpus] == ["0000:75:00.0", "0000:05:00.0", "0001:23:00.0"]
    first, second, _ = found.gpus
    assert (first.name, first.memory_bytes, first.free_bytes, first.numa_node) == (
        "AMD Instinct MI300X OAM", 1000, 700, 1,
    )  # fmt: skip
    # Nobody says what is free of the second: the bank's size is all that is known.
    assert (second.name, second.memory_bytes, second.free_bytes, second.numa_node) == (
        "AMD GPU (gfx942)", 206_141_652_992, None, None,
    )  # fmt: skip


def test_what_a_cgroup_hides_is_not_counted(tmp_path: Path) -> None:
    cpu, _, first, second, third = lists.KFD_MI300X
    lists.write_kfd(tmp_path, (cpu, cpu, None, second, third))
    assert _rocm(tmp_path, ROCR_VISIBLE_DEVICES="0")[0] == [B]
    assert first


def test_nodes_are_counted_by_number(tmp_path: Path) -> None:
    nodes = [lists.KFD_CPU] * 2 + [lists.kfd_gpu(90402, 256 * k, 1000 + k) for k in range(12)]
    lists.write_kfd(tmp_path, nodes)
    assert [gpu.uuid for gpu in rocm.inventory({}, tmp_path).gpus] == [f"GPU-{1000 + k:016x}" for k in range(12)]


@pytest.mark.parametrize(
    ("masks", "seen", "said"),
    [
        ({}, [A, B, C], ""),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [C, A], ""),
        ({"ROCR_VISIBLE_DEVICES": f"{B},0"}, [B, A], ""),
        ({"ROCR_VISIBLE_DEVICES": "GPU-21B6"}, [A], ""),
        ({"ROCR_VISIBLE_DEVICES": " 1 , 2"}, [B, C], ""),
        ({"ROCR_VISIBLE_DEVICES": ""}, [], ""),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, [], ""),
        ({"ROCR_VISIBLE_DEVICES": "1,7,0"}, [B], "'7' names no device"),
        ({"ROCR_VISIBLE_DEVICES": "1,1,0"}, [B], "'1' is named twice"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-"}, [], "names no device"),
        ({"HIP_VISIBLE_DEVICES": "1"}, [B], ""),
        ({"HIP_VISIBLE_DEVICES": "-1"}, [], ""),
        # Empty is not set, and then CUDA's variable is HIP's.
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "2"}, [C], ""),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "2"}, [A], ""),
        # The second counts what the first leaves.
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [C], ""),
        ({"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "1"}, [], "names no device"),
        # Slurm says the same in all of them, and means it once.
        ({"ROCR_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"}, [C], ""),
    ],
)
def test_masks_are_read_as_rocm_reads_them(masks: dict[str, str], seen: list[str], said: str, tmp_path: Path) -> None:
    lists.write_kfd(tmp_path, lists.KFD_MI300X)
    found, reason = _rocm(tmp_path, **masks)
    assert found == seen
    assert said in reason
    assert bool(said) == bool(reason)


@pytest.mark.parametrize(
    ("nodes", "uuids", "entries"),
    [
        (lists.KFD_DESKTOP, ["GPU-9246000000000001", "AMD-0000:17:00.0"], ["", "1"]),
        # The partitions of a card have its unique_id.
        (lists.KFD_PARTITIONS, ["AMD-0000:75:00.0", "AMD-0000:75:00.1"], ["0", "1"]),
    ],
)
def test_a_gpu_without_a_uuid_of_its_own_is_named_by_index(
    nodes: tuple[str, ...], uuids: list[str], entries: list[str], tmp_path: Path
) -> None:
    lists.write_kfd(tmp_path, nodes)
    found = rocm.inventory({}, tmp_path).gpus
    assert [gpu.uuid for gpu in found] == uuids
    assert [gpu.mask_entry for gpu in found] == entries
    assert rocm.inventory({"ROCR_VISIBLE_DEVICES": "1"}, tmp_path).gpus == found[1:]


def test_a_machine_without_amds_driver_has_no_gpus_and_says_why(tmp_path: Path) -> None:
    found = rocm.inventory({}, tmp_path / "sys")
    assert (found.known, found.gpus) == (True, ())
    assert "amdgpu" in found.reason


def test_where_rocm_goes_another_way_its_gpus_are_missing_not_none(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    found = rocm.inventory({}, tmp_path / "sys")
    assert (found.known, found.gpus) == (False, ())
    assert os.strerror(2) in found.reason


@pytest.mark.parametrize(
    ("version", "name"), [(90402, "gfx942"), (90010, "gfx90a"), (110501, "gfx1151"), (100306, "gfx1036")]
)
def test_architectures_are_named_as_compilers_name_them(version: int, name: str) -> None:
    assert rocm.architecture(version) == name


# ---------------------------------------------------------------- Vulkan


@pytest.mark.parametrize(
    ("summary", "mask", "entries", "said"),
    [
        (lists.VULKAN_LAPTOP, None, ["1"], ""),
        (lists.VULKAN_LAPTOP, "0", ["0"], ""),
        (lists.VULKAN_LAPTOP, "1,0", ["1", "0"], ""),
        (lists.VULKAN_LAPTOP, "1 0 1", ["1", "0"], ""),
        (lists.VULKAN_LAPTOP, "", [], ""),
        (lists.VULKAN_LAPTOP, "1,3", [], "no device 3"),
        (lists.VULKAN_LAPTOP, "-1", [], "no index"),
        (lists.VULKAN_LAPTOP, "1,x,0", ["1"], "no index"),
        (lists.VULKAN_TWO_DRIVERS, None, ["2"], ""),
        (lists.VULKAN_TWO_DRIVERS, "1", ["1"], ""),
        (lists.VULKAN_ONLY_INTEGRATED, None, ["0"], ""),
        (lists.VULKAN_ONLY_SOFTWARE, None, [], ""),
    ],
)
def test_vulkans_devices_are_those_that_ggml_takes(
    summary: str, mask: str | None, entries: list[str], said: str
) -> None:
    found = vulkan.inventory({} if mask is None else {"GGML_VK_VISIBLE_DEVICES": mask}, summary)
    assert found.known
    assert [gpu.mask_entry for gpu in found.gpus] == entries
    assert said in found.reason
    assert bool(said) == bool(found.reason)


def test_a_vulkan_gpu_has_its_uuid_and_no_memory_that_nobody_told() -> None:
    (gpu,) = vulkan.inventory({}, lists.VULKAN_LAPTOP).gpus
    assert (gpu.uuid, gpu.name) == (lists.GEFORCE, "NVIDIA GeForce RTX 4070 Laptop GPU")
    assert (gpu.memory_bytes, gpu.free_bytes) == (None, None)


def test_a_summary_that_is_none_is_unknown() -> None:
    assert not vulkan.inventory({}, "Cannot create Vulkan instance.\n").known


# ---------------------------------------------------------------- SYCL


@pytest.mark.parametrize(
    ("listing", "masks", "seen", "said"),
    [
        (lists.SYCL_ARC, {}, [0, 1], ""),
        (lists.SYCL_2024, {}, [0], ""),
        (lists.SYCL_MAX, {}, [0, 1, 2, 3], ""),
        (lists.SYCL_NO_GPU, {}, [], ""),
        (lists.SYCL_MAX, {"ZE_AFFINITY_MASK": "2"}, [2], ""),
        (lists.SYCL_MAX, {"ZE_AFFINITY_MASK": "3,1"}, [1, 3], ""),
        (lists.SYCL_MAX, {"ZE_AFFINITY_MASK": "3,9"}, [3], "'9' names no device"),
        (lists.SYCL_MAX, {"ONEAPI_DEVICE_SELECTOR": "level_zero:1"}, [1], ""),
        (lists.SYCL_MAX, {"ONEAPI_DEVICE_SELECTOR": "level_zero:0,2"}, [0, 2], ""),
        (lists.SYCL_MAX, {"ONEAPI_DEVICE_SELECTOR": "level_zero:0;level_zero:2"}, [0, 2], ""),
        (lists.SYCL_MAX, {"ONEAPI_DEVICE_SELECTOR": "level_zero:gpu"}, [0, 1, 2, 3], ""),
        # The selector counts what the mask leaves.
        (lists.SYCL_MAX, {"ZE_AFFINITY_MASK": "2,3", "ONEAPI_DEVICE_SELECTOR": "level_zero:1"}, [3], ""),
    ],
)
def test_masks_are_read_as_level_zero_reads_them(
    listing: str, masks: dict[str, str], seen: list[int], said: str
) -> None:
    found = sycl.inventory(masks, listing)
    assert found.known
    assert [gpu.index for gpu in found.gpus] == seen
    assert said in found.reason


@pytest.mark.parametrize(
    "masks",
    [
        {"ZE_AFFINITY_MASK": "0.1"},
        {"ONEAPI_DEVICE_SELECTOR": "level_zero:0.1"},
        {"ONEAPI_DEVICE_SELECTOR": "!level_zero:0"},
        {"ONEAPI_DEVICE_SELECTOR": "opencl:gpu"},
        {"ONEAPI_DEVICE_SELECTOR": "*:0"},
    ],
)
def test_what_is_more_than_a_list_is_not_guessed(masks: dict[str, str]) -> None:
    found = sycl.inventory(masks, lists.SYCL_MAX)
    assert (found.known, found.gpus) == (False, ())
    assert next(iter(masks)) in found.reason
