"""A stand-in for the module pynvml: GPUs that are described in a list, and everything else 'not supported'."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As nvidia-ml-py's: the base of all that the library raises. `value`: the library's number for what it is."""

    def __init__(self, text: str, value: int = 999) -> None:
        super().__init__(text)
        self.value = value


@dataclass
class FakeGpu:
    """One GPU, or with `parts` one that is cut into MIG devices. `broken`: its handle cannot be had. `lost`: it has
    left the bus, and nothing can be asked of it."""

    uuid: str
    name: str = "NVIDIA H200"
    bus: str = "00000000:06:00.0"
    memory_bytes: int = 143_771 << 20
    capability: tuple[int, int] = (9, 0)
    cores: int = 16_896
    clock_mhz: int = 1_980
    parts: list[FakeGpu] = field(default_factory=list)
    instance: tuple[int, int] = (0, 0)
    broken: str = ""
    lost: bool = False
    missing: frozenset[str] = frozenset()
    """Names of functions that this device does not support."""
    used_bytes: int = 1 << 30
    utilization: int = 97
    power_mw: int = 431_500
    temperature_c: int = 61
    energy_mj: int = 3_431_906


class FakeNvml:
    """Has the functions that the project calls; `text_as_bytes` answers as older releases did."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_GPU_IS_LOST = 15
    nvmlEventTypeXidCriticalError = 8  # noqa: N815

    def __init__(self, gpus: list[FakeGpu], *, no_driver: bool = False, text_as_bytes: bool = False) -> None:
        self.gpus = gpus
        self.no_driver = no_driver
        self.text_as_bytes = text_as_bytes
        self.open = 0
        self.events: list[tuple[FakeGpu, int]] = []
        """(GPU, Xid) that the driver has logged; told of GPUs that are registered."""
        self.registered: list[FakeGpu] = []

    def _text(self, value: str) -> Any:
        return value.encode() if self.text_as_bytes else value

    def _asked(self, function: str, gpu: FakeGpu) -> FakeGpu:
        if function in gpu.missing:
            raise NVMLError("Not Supported")
        return gpu

    def nvmlInit(self) -> None:  # noqa: N802
        if self.no_driver:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if self.gpus[index].broken:
            raise NVMLError(self.gpus[index].broken)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        for gpu in (part for whole in self.gpus for part in (whole, *whole.parts)):
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError("Not Found")

    def nvmlDeviceGetIndex(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self.gpus.index(gpu)

    def nvmlEventSetCreate(self) -> list[FakeGpu]:  # noqa: N802
        return self.registered

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, kinds: int, events: list[FakeGpu]) -> None:  # noqa: N802
        assert kinds == self.nvmlEventTypeXidCriticalError
        events.append(self._asked("events", gpu))

    def nvmlEventSetWait_v2(self, events: list[FakeGpu], timeout_ms: int) -> Any:  # noqa: N802
        while self.events:
            gpu, xid = self.events.pop(0)
            if gpu in events:
                return SimpleNamespace(device=gpu, eventData=xid)
        raise NVMLError("Timeout", 10)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> Any:  # noqa: N802
        if gpu.lost:
            raise NVMLError("GPU is lost", self.NVML_ERROR_GPU_IS_LOST)
        return self._text(gpu.uuid)

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return self._text(gpu.name)

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return SimpleNamespace(busId=self._text(gpu.bus))

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        asked = self._asked("memory", gpu)
        return SimpleNamespace(
            total=asked.memory_bytes, used=asked.used_bytes, free=asked.memory_bytes - asked.used_bytes
        )

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        return gpu.capability

    def nvmlDeviceGetNumGpuCores(self, gpu: FakeGpu) -> int:  # noqa: N802
        return gpu.cores

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, kind: int) -> int:  # noqa: N802
        return gpu.clock_mhz

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        if not gpu.parts:
            raise NVMLError("Not Supported")
        return (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, slot: int) -> FakeGpu:  # noqa: N802
        if slot >= len(gpu.parts):
            raise NVMLError("Not Found")
        return gpu.parts[slot]

    def nvmlDeviceGetGpuInstanceId(self, part: FakeGpu) -> int:  # noqa: N802
        return part.instance[0]

    def nvmlDeviceGetComputeInstanceId(self, part: FakeGpu) -> int:  # noqa: N802
        return part.instance[1]

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self._asked("utilization", gpu).utilization)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._asked("power", gpu).power_mw

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, kind: int) -> int:  # noqa: N802
        return self._asked("temperature", gpu).temperature_c

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._asked("energy", gpu).energy_mj
