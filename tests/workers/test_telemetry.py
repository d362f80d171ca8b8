"""Samples: what is measured, and that what cannot be measured is missing, not 0."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scheduling.tables import TELEMETRY
from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.telemetry import Sample, Telemetry

ENGINE = 4242


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Processes:
    """Stands in for psutil.Process: processor seconds and resident bytes by pid; who is not there is gone."""

    def __init__(self) -> None:
        self.cpu_s: dict[int, float] = {os.getpid(): 10.0, ENGINE: 50.0}
        self.rss: dict[int, int] = {os.getpid(): 100, ENGINE: 1_000}

    def __call__(self, pid: int) -> Any:
        def alive() -> int:
            if pid not in self.cpu_s:
                raise psutil.NoSuchProcess(pid)
            return pid

        return SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=self.cpu_s[alive()] - 1.0, system=1.0),
            memory_info=lambda: SimpleNamespace(rss=self.rss[alive()]),
        )


def _telemetry(
    clock: Clock, processes: Processes, gpus: list[FakeGpu], uuids: list[str], pid: int | None = ENGINE
) -> Telemetry:
    return Telemetry(clock, FakeNvml(gpus), uuids, lambda: pid, process_of=processes)


def _only(rows: list[Sample]) -> Sample:
    (row,) = rows
    return row


def test_a_gpus_figures_are_read_by_uuid() -> None:
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b", utilization=42)]
    row = _only(_telemetry(Clock(), Processes(), gpus, ["GPU-b"]).sample())
    assert (row.t_s, row.gpu, row.utilization_percent) == (100.0, 1, 42.0)
    assert (row.memory_used_bytes, row.power_w, row.temperature_c) == (1 << 30, 431.5, 61.0)
    assert row.energy_j == pytest.approx(3431.906)


def test_what_a_device_does_not_support_is_missing() -> None:
    mig = FakeGpu("MIG-a", missing=frozenset({"utilization", "power", "temperature", "energy", "memory"}))
    row = _only(_telemetry(Clock(), Processes(), [mig], ["MIG-a"]).sample())
    assert row.memory_used_bytes == -1
    assert all(map(math.isnan, (row.utilization_percent, row.power_w, row.temperature_c, row.energy_j)))


@pytest.mark.parametrize("nvml", [None, FakeNvml([], no_driver=True), FakeNvml([])])
def test_a_gpu_that_nvml_cannot_find_is_missing(nvml: Any) -> None:
    row = _only(Telemetry(Clock(), nvml, ["GPU-a"], lambda: None, process_of=Processes()).sample())
    assert (row.gpu, row.memory_used_bytes) == (-1, -1)
    assert math.isnan(row.utilization_percent)
    assert row.rss_bytes == 100


def test_without_gpus_there_is_one_row_for_the_processes() -> None:
    row = _only(_telemetry(Clock(), Processes(), [], []).sample())
    assert (row.gpu, row.memory_used_bytes, row.rss_bytes) == (-1, -1, 1_100)


def test_processor_use_is_time_spent_by_rank_and_engine_over_wall_time() -> None:
    clock, processes = Clock(), Processes()
    telemetry = _telemetry(clock, processes, [], [])
    assert math.isnan(_only(telemetry.sample()).cpu_percent)
    clock.now_s += 2.0
    processes.cpu_s[os.getpid()] += 0.5
    processes.cpu_s[ENGINE] += 3.0
    assert _only(telemetry.sample()).cpu_percent == pytest.approx(175.0)


def test_figures_of_the_processes_are_in_the_first_row_only() -> None:
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
    first, second = _telemetry(Clock(), Processes(), gpus, ["GPU-a", "GPU-b"]).sample()
    assert (first.gpu, first.rss_bytes) == (0, 1_100)
    assert (second.gpu, second.rss_bytes) == (1, -1)
    assert math.isnan(second.cpu_percent)


def test_an_engine_that_died_is_not_counted_and_spoils_nothing() -> None:
    clock, processes = Clock(), Processes()
    telemetry = _telemetry(clock, processes, [], [])
    telemetry.sample()
    clock.now_s += 1.0
    del processes.cpu_s[ENGINE]
    processes.cpu_s[os.getpid()] += 0.25
    row = _only(telemetry.sample())
    assert row.rss_bytes == 100
    assert row.cpu_percent == pytest.approx(25.0)


def test_a_new_engine_counts_from_its_second_sample_on() -> None:
    clock, processes = Clock(), Processes()
    pid: list[int | None] = [None]
    telemetry = Telemetry(clock, None, [], lambda: pid[0], process_of=processes)
    telemetry.sample()
    pid[0] = ENGINE
    clock.now_s += 1.0
    assert _only(telemetry.sample()).cpu_percent == 0.0
    clock.now_s += 1.0
    processes.cpu_s[ENGINE] += 1.0
    assert _only(telemetry.sample()).cpu_percent == pytest.approx(100.0)


def test_rows_fit_the_table_behind_time_rank_and_session() -> None:
    names = TELEMETRY.names
    assert names is not None
    row = _only(_telemetry(Clock(), Processes(), [FakeGpu("GPU-a")], ["GPU-a"]).sample())[1:]
    assert len(row) == len(names) - 3
    for name, value in (("gpu", 0), ("utilization", 97), ("power_w", 431.5), ("rss_bytes", 1_100)):
        assert row[names.index(name) - 3] == value


def test_this_process_can_be_sampled() -> None:
    telemetry = Telemetry(Clock(), None, [], lambda: None)
    assert _only(telemetry.sample()).rss_bytes > 1_000_000
