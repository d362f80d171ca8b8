"""One look at a rank's hardware: its GPUs through NVML, its own and its engine's processes through psutil.

`sample` returns plain rows; who calls it how often, and where rows go, is decided elsewhere. What cannot be
read is missing: NaN where a number could be a fraction, -1 for counts and bytes. It is never 0, which would be
a measurement. A GPU that several ranks share reports the same figures, the whole GPU's, in each rank's rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil

MISSING = -1


class Sample(NamedTuple):
    """One row, in the order of `scheduling.tables.TELEMETRY` without rank and session.

    A rank with K GPUs gives K rows a sample; the processes' figures are in the first one only, so that sums over
    rows are right. Without a GPU there is one row with `gpu` -1.
    """

    t_s: float
    """The caller's clock."""
    gpu: int
    """As NVML numbers the host's GPUs."""
    utilization_percent: float
    """Share of the last sampling period (NVML's, up to 1 s) in which a kernel ran."""
    memory_used_bytes: int
    """On the whole GPU, by all processes."""
    power_w: float
    temperature_c: float
    energy_j: float
    """The GPU's own counter, since its driver was loaded: what was used is the difference of two samples."""
    cpu_percent: float
    """Processor time of rank and engine since the last sample over wall time: 200 is two whole processors."""
    rss_bytes: int
    """Resident memory of rank and engine; pages that both share count twice."""


class Telemetry:
    """Samples for one rank. `gpu_uuids` as in its placement; `pid_of_engine` says None while there is none.

    `nvml` is the module pynvml, or None. `process_of` makes something like psutil.Process of a pid.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        nvml: Any | None,
        gpu_uuids: Sequence[str],
        pid_of_engine: Callable[[], int | None],
        *,
        process_of: Callable[[int], Any] = psutil.Process,
    ) -> None:
        self._clock = clock
        self._pid_of_engine = pid_of_engine
        self._process_of = process_of
        self._processes: dict[int, Any] = {}
        self._cpu_s: dict[int, float] = {}
        self._last_s = math.nan
        self._nvml = nvml
        self._handles = _handles(nvml, gpu_uuids)
        self._indexes = [_index(nvml, handle) for handle in self._handles]

    def sample(self) -> list[Sample]:
        """Look once. Never raises for hardware or processes that cannot be read."""
        now_s = self._clock()
        cpu_percent, rss_bytes = self._sample_processes(now_s)
        if not self._handles:
            return [Sample(now_s, MISSING, *_NO_GPU, cpu_percent, rss_bytes)]
        rows = []
        for index, handle in zip(self._indexes, self._handles, strict=True):
            rows.append(Sample(now_s, index, *self._sample_gpu(handle), cpu_percent, rss_bytes))
            cpu_percent, rss_bytes = math.nan, MISSING
        return rows

    def _sample_gpu(self, handle: Any | None) -> tuple[float, int, float, float, float]:
        nvml = self._nvml
        if handle is None or nvml is None:
            return _NO_GPU
        used = _number(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return (
            _number(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            MISSING if math.isnan(used) else int(used),
            _number(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            _number(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            _number(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
        )

    def _sample_processes(self, now_s: float) -> tuple[float, int]:
        """Processor use since the last sample and resident bytes now, over this rank and its engine."""
        engine = self._pid_of_engine()
        pids = [os.getpid()] if engine is None else [os.getpid(), engine]
        spent_s = 0.0
        rss_bytes = 0
        cpu_s: dict[int, float] = {}
        for pid in pids:
            try:
                process = self._processes.get(pid) or self._process_of(pid)
                times, memory = process.cpu_times(), process.memory_info()
            except (psutil.Error, OSError):
                self._processes.pop(pid, None)  # gone; a later process may get its number
                continue
            self._processes[pid] = process
            cpu_s[pid] = times.user + times.system
            # A process seen for the first time has no earlier reading: it counts from the next sample on.
            spent_s += max(0.0, cpu_s[pid] - self._cpu_s.get(pid, cpu_s[pid]))
            rss_bytes += memory.rss
        elapsed_s = now_s - self._last_s
        known_before = any(pid in self._cpu_s for pid in cpu_s)
        self._cpu_s, self._last_s = cpu_s, now_s
        self._processes = {pid: self._processes[pid] for pid in cpu_s}
        percent = 100 * spent_s / elapsed_s if known_before and elapsed_s > 0 else math.nan
        return percent, rss_bytes if cpu_s else MISSING


_NO_GPU = (math.nan, MISSING, math.nan, math.nan, math.nan)


def _handles(nvml: Any | None, uuids: Sequence[str]) -> list[Any]:
    """One NVML handle per UUID, None for those that cannot be had."""
    if nvml is None or not uuids:
        return [None] * len(uuids)
    try:
        nvml.nvmlInit()
    except Exception:  # no driver, or a broken one: everything about its GPUs is missing
        return [None] * len(uuids)
    handles = []
    for uuid in uuids:
        try:
            handles.append(nvml.nvmlDeviceGetHandleByUUID(uuid))
        except Exception:
            handles.append(None)
    return handles


def _index(nvml: Any | None, handle: Any | None) -> int:
    index = math.nan if nvml is None or handle is None else _number(lambda: nvml.nvmlDeviceGetIndex(handle))
    return MISSING if math.isnan(index) else int(index)


def _number(ask: Callable[[], float]) -> float:
    """NaN where the driver cannot say (MIG devices, older cards), or the GPU is lost."""
    try:
        return float(ask())
    except Exception:
        return math.nan
