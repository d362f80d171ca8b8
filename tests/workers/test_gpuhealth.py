"""Whether a GPU is still there, asked of a stand-in for NVML."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.gpuhealth import GpuHealth

ONE, TWO = "GPU-1111", "GPU-2222"


@pytest.fixture(params=[False, True], ids=["text", "bytes"])
def nvml(request: pytest.FixtureRequest) -> FakeNvml:
    return FakeNvml([FakeGpu(ONE), FakeGpu(TWO)], text_as_bytes=request.param)


def test_healthy_gpus_are_no_trouble(nvml: FakeNvml) -> None:
    health = GpuHealth(nvml, [ONE, TWO])
    assert health.trouble() == ""
    assert health.free() == "free on its GPU now: 139.4 of 140.4 GiB, 139.4 of 140.4 GiB"


def test_a_gpu_that_is_lost_is_named(nvml: FakeNvml) -> None:
    health = GpuHealth(nvml, [ONE, TWO])
    nvml.gpus[1].lost = True
    assert health.trouble() == "GPU-2222: GPU is lost"
    assert GpuHealth(nvml, [ONE]).trouble() == "", "that of another worker is none of ours"


def test_an_xid_after_which_a_gpu_computes_no_more_is_told(nvml: FakeNvml) -> None:
    health = GpuHealth(nvml, [ONE])
    nvml.events = [(nvml.gpus[0], 31), (nvml.gpus[1], 48), (nvml.gpus[0], 79), (nvml.gpus[0], 45)]
    assert health.trouble() == "GPU-1111: Xid 79, the GPU has fallen off the bus"
    assert health.trouble() == "GPU-1111: Xid 79, the GPU has fallen off the bus", "it does not recover"


def test_an_xid_of_a_programs_mistake_is_no_trouble(nvml: FakeNvml) -> None:
    health = GpuHealth(nvml, [ONE])
    nvml.events = [(nvml.gpus[0], 13), (nvml.gpus[0], 31), (nvml.gpus[0], 43)]
    assert health.trouble() == ""


def test_a_gpu_without_events_is_still_asked_whether_it_is_there() -> None:
    nvml = FakeNvml([FakeGpu(ONE, missing=frozenset({"events", "memory"}))])
    health = GpuHealth(nvml, [ONE])
    assert (health.trouble(), health.free()) == ("", "")
    nvml.gpus[0].lost = True
    assert "lost" in health.trouble()


@pytest.mark.parametrize("nvml", [None, FakeNvml([FakeGpu(ONE)], no_driver=True), FakeNvml([])])
def test_where_nobody_can_be_asked_nothing_is_said(nvml: Any) -> None:
    health = GpuHealth(nvml, [ONE])
    assert (health.trouble(), health.free()) == ("", "")
