"""The inventory: what NVML says, narrowed by CUDA_VISIBLE_DEVICES as CUDA itself reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.gpus import inventory

A = "GPU-d514e13a-44b4-5091-6060-ffd3b086b3a1"
B = "GPU-72726adf-6fd1-dd58-010e-3c4044fcae9b"
PAIR = [FakeGpu(A, bus="00000000:06:00.0"), FakeGpu(B, bus="00000000:07:00.0")]


def _seen(nvml: FakeNvml, **environ: str) -> list[str]:
    return [gpu.uuid for gpu in inventory(environ, nvml=nvml, sysfs=Path("/nowhere")).gpus]


def test_machine_without_the_package_is_missing_not_none() -> None:
    found = inventory({}, nvml=None)
    assert not found.known
    assert "nvidia-ml-py" in found.reason
    assert found.gpus == ()


def test_machine_without_a_driver_is_missing_with_the_drivers_reason() -> None:
    found = inventory({}, nvml=FakeNvml([], no_driver=True))
    assert not found.known
    assert "Driver Not Loaded" in found.reason


def test_machine_with_a_driver_and_no_gpu_is_known_to_have_none() -> None:
    found = inventory({}, nvml=FakeNvml([]))
    assert found.known
    assert found.gpus == ()


def test_library_that_breaks_in_an_unforeseen_way_is_missing() -> None:
    nvml = FakeNvml(PAIR)
    nvml.nvmlDeviceGetCount = lambda: 1 // 0  # type: ignore[method-assign]
    found = inventory({}, nvml=nvml)
    assert not found.known
    assert "NVML failed" in found.reason
    assert nvml.open == 0


@pytest.mark.parametrize("text_as_bytes", [False, True])
def test_gpus_carry_what_placement_needs(tmp_path: Path, text_as_bytes: bool) -> None:
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    nvml = FakeNvml([FakeGpu(A, bus="00000000:3B:00.0")], text_as_bytes=text_as_bytes)
    (gpu,) = inventory({}, nvml=nvml, sysfs=tmp_path).gpus
    assert (gpu.uuid, gpu.name, gpu.index) == (A, "NVIDIA H200", 0)
    assert (gpu.pci_bus_id, gpu.numa_node, gpu.compute_capability) == ("0000:3b:00.0", 1, "9.0")
    assert gpu.memory_bytes == 143_771 << 20
    assert gpu.free_bytes == (143_771 << 20) - (1 << 30)
    assert nvml.open == 0


@pytest.mark.parametrize("content", ["-1\n", "odd", None])
def test_numa_node_that_the_kernel_does_not_say_is_missing(tmp_path: Path, content: str | None) -> None:
    device = tmp_path / "bus/pci/devices/0000:06:00.0"
    device.mkdir(parents=True)
    if content is not None:
        (device / "numa_node").write_text(content)
    assert inventory({}, nvml=FakeNvml(PAIR), sysfs=tmp_path).gpus[0].numa_node is None


# Seen from cuInit and cuDeviceGetCount on two GPUs, driver 580.
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [A, B]),
        ("", []),
        ("-1", []),
        ("0", [A]),
        ("1", [B]),
        ("1,0", [B, A]),
        ("0,-1,1", [A]),
        ("7", []),
        ("0,7,1", [A]),
        ("7,0", []),
        ("0,0", []),
        ("0,1,0", []),
        ("abc", []),
        ("0,abc,1", [A]),
        ("NoDevFiles", []),
        (A, [A]),
        (B, [B]),
        (f"{B},{A}", [B, A]),
        (A[:12], [A]),
        (A.upper(), [A]),
        ("GPU-", []),
        ("G", []),
        (A[4:], []),
        (f"{A},1", [A]),
        (f"1,{A}", [B]),
        (f"{A},{A}", []),
        (f"{A},GPU-ffffffff,{B}", [A]),
        (f"{A} ", [A]),
        (f" {A}", []),
        (" 0", [A]),
        ("0 ,1", [A, B]),
        ("0, 1", [A, B]),
        ("\t1", [B]),
        ("00", [A]),
        ("01", [B]),
        ("0x1", [A]),
        ("+1", [B]),
        ("1.5", [B]),
        ("1abc", [B]),
        ("0,,1", [A]),
        (",0", []),
        ("0,", [A]),
        ("0;1", [A]),
        ("0 1", [A]),
        ("MIG-xyz", []),
        ("2147483648", []),
        ("18446744073709551616", []),
    ],
)
def test_mask_hides_what_cuda_hides(mask: str | None, expected: list[str]) -> None:
    assert _seen(FakeNvml(PAIR), **({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})) == expected


@pytest.mark.parametrize(
    ("mask", "remark"),
    [("0,7", "'7' names no GPU"), ("0,0", "twice"), ("-1", ""), ("", ""), ("1", "")],
)
def test_a_mask_that_looks_mistaken_is_remarked(mask: str, remark: str) -> None:
    found = inventory({"CUDA_VISIBLE_DEVICES": mask}, nvml=FakeNvml(PAIR))
    assert found.known
    assert remark in found.reason
    assert bool(found.reason) == bool(remark)


UNLIKE = [
    FakeGpu(A, name="NVIDIA T400", bus="00000000:06:00.0", cores=384, clock_mhz=1_425),
    FakeGpu(B, name="NVIDIA H200", bus="00000000:07:00.0"),
]


def test_unlike_gpus_are_numbered_fastest_first_and_the_guess_is_said() -> None:
    found = inventory({"CUDA_VISIBLE_DEVICES": "0"}, nvml=FakeNvml(UNLIKE))
    assert [gpu.uuid for gpu in found.gpus] == [B]
    assert "PCI_BUS_ID" in found.reason


def test_unlike_gpus_are_numbered_by_bus_if_the_environment_says_so() -> None:
    found = inventory({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, nvml=FakeNvml(UNLIKE))
    assert [gpu.uuid for gpu in found.gpus] == [A]
    assert found.reason == ""


def test_unlike_gpus_masked_by_uuid_need_no_guess() -> None:
    assert inventory({"CUDA_VISIBLE_DEVICES": A}, nvml=FakeNvml(UNLIKE)).reason == ""


def test_a_gpu_that_a_device_cgroup_hides_is_left_out_and_said() -> None:
    nvml = FakeNvml([FakeGpu(A, broken="Insufficient Permissions"), PAIR[1]])
    found = inventory({}, nvml=nvml)
    assert [gpu.uuid for gpu in found.gpus] == [B]
    assert "Insufficient Permissions" in found.reason


M0, M1 = "MIG-11111111-aaaa-5555-8888-000000000000", "MIG-22222222-bbbb-5555-8888-000000000000"
CUT = [FakeGpu(A, parts=[FakeGpu(M0, instance=(1, 0)), FakeGpu(M1, instance=(2, 0))]), PAIR[1]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [M0, M1, B]),
        (M1, [M1]),
        ("MIG-2222", [M1]),
        ("MIG-", []),
        (f"MIG-{A}/2/0", [M1]),
        (f"MIG-{A}/3/0", []),
        ("0", [M0]),
        ("1", [B]),
        (A, [M0]),
    ],
)
def test_a_gpu_cut_into_mig_devices_is_replaced_by_them(mask: str | None, expected: list[str]) -> None:
    assert _seen(FakeNvml(CUT), **({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})) == expected
