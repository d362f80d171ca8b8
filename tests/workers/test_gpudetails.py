"""What NVML tells of each GPU, with the stand-in for NVML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.gpudetails import COMPUTE_MODES, NVLINKS_MAX, SLOWED, survey


class Telling(FakeNvml):
    """Has what only the survey asks. Pairs in `joined` have NVLink, others peer access over PCIe."""

    joined = True

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802
        return self._text("580.95")

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 12_080

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=1, usedGpuMemory=3 << 30), SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)]

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:  # noqa: N802
        return int(link < 12)

    def nvmlDeviceGetP2PStatus(self, gpu: FakeGpu, other: FakeGpu, capability: int) -> int:  # noqa: N802
        return 0 if self.joined or capability == 0 else 1

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:  # noqa: N802
        assert (kind, counter) == (1, 0)
        return 3

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> tuple[int, int, int, int]:  # noqa: N802
        return (5, 2, 1, 0)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> int:  # noqa: N802
        return 0x04 | 0x40

    def nvmlDeviceGetComputeMode(self, gpu: FakeGpu) -> int:  # noqa: N802
        return 3


def test_numbers_are_those_of_nvml() -> None:
    pynvml: Any = pytest.importorskip("pynvml")
    assert {pynvml.NVML_COMPUTEMODE_DEFAULT: "default", pynvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
            pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive process",
            pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "exclusive thread"} == COMPUTE_MODES  # fmt: skip
    assert set(SLOWED) == {
        pynvml.nvmlClocksThrottleReasonHwSlowdown, pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }  # fmt: skip
    assert (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC) == (1, 0)
    assert (pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK) == (2, 0)  # of READ it makes a tuple
    assert pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR == 1
    assert pynvml.NVML_NVLINK_MAX_LINKS <= NVLINKS_MAX
    for name in ("nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion", "nvmlDeviceGetRemappedRows",
                 "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetNvLinkState", "nvmlDeviceGetP2PStatus",
                 "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetRetiredPages", "nvmlDeviceGetRetiredPagesPendingStatus",
                 "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetComputeMode"):  # fmt: skip
        assert callable(getattr(pynvml, name)), name


def two(**more: Any) -> list[FakeGpu]:
    return [FakeGpu("GPU-a", **more), FakeGpu("GPU-b", bus="00000000:07:00.0")]


@pytest.mark.parametrize("text_as_bytes", [False, True])
def test_all_that_is_told_is_taken(tmp_path: Path, text_as_bytes: bool) -> None:
    folder = tmp_path / "bus/pci/devices/0000:06:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    (folder / "local_cpulist").write_text("32-63\n")
    nvml = Telling(two(), text_as_bytes=text_as_bytes)
    found = survey(nvml, tmp_path)
    assert (found.driver, found.cuda_driver) == ("580.95", "12.8")
    first, second = found.gpus
    assert (first.uuid, first.name, first.compute_capability) == ("GPU-a", "NVIDIA H200", "9.0")
    assert (first.numa_node, first.near_cpus, first.nvlinks) == (1, "32-63", 12)
    assert first.peers == {"GPU-b": "NVLink"}
    assert (first.ecc_uncorrected, first.retired_pages, first.retirement_pending, first.remap_failed) == (
        3,
        2,
        True,
        False,
    )
    assert first.slowed == ("thermal (hardware)",)
    assert first.compute_mode == "exclusive process"
    assert first.users is not None
    assert [(user.memory_bytes, bool(user.name)) for user in first.users] == [(3 << 30, True), (None, False)]
    assert (second.numa_node, second.near_cpus) == (None, "")
    assert nvml.open == 0


def test_peer_access_without_nvlink_is_over_pcie() -> None:
    nvml = Telling(two())
    nvml.joined = False
    assert survey(nvml).gpus[0].peers == {"GPU-b": "PCIe"}


def test_what_is_not_told_is_none() -> None:
    [gpu] = survey(FakeNvml([FakeGpu("GPU-a", missing=frozenset({"memory"}))])).gpus
    told = (gpu.memory_bytes, gpu.users, gpu.nvlinks, gpu.ecc_uncorrected, gpu.retired_pages, gpu.retirement_pending)
    assert told == (None,) * 6
    assert gpu.peers == {}


def test_a_gpu_that_is_lost_or_hidden_leaves_the_others() -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", lost=True), FakeGpu("GPU-b", broken="No Permission"), FakeGpu("GPU-c")])
    lost, hidden, good = survey(nvml).gpus
    assert lost.problem == "GPU is lost"
    assert hidden.problem
    assert (good.uuid, good.problem) == ("GPU-c", "")


@pytest.mark.parametrize("nvml", [None, FakeNvml([], no_driver=True)])
def test_without_nvml_there_is_nothing_to_tell(nvml: FakeNvml | None) -> None:
    found = survey(nvml)
    assert found.gpus == ()
    assert found.driver == ""
