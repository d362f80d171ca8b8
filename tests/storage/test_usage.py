"""Devices over time and their energy: a GPU counts once, missing stays missing, long series are thinned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scheduling.tables import RANK, TELEMETRY
from storage.summary import Rows
from storage.usage import POINTS, devices, energy


def samples(
    count: int, rank: int, gpu: int = 0, session: int = 0, watts: float = 200.0, counter: float = math.nan
) -> Rows:
    """One a second; the energy counter, if it is there, begins at `counter` and runs at `watts`."""
    table = np.zeros(count, TELEMETRY)
    table["t_s"] = np.arange(count)
    table["rank"], table["gpu"], table["session"] = rank, gpu, session
    table["utilization"], table["power_w"], table["memory_used_bytes"] = 90.0, watts, 1 << 30
    table["energy_j"] = counter + watts * np.arange(count)
    table["cpu_percent"], table["rss_bytes"] = 50.0, 1 << 20
    return table


def on(*hosts: str) -> Rows:
    """Rank 1 and so on, on these hosts."""
    table = np.zeros(len(hosts), RANK)
    table["rank"], table["host"] = np.arange(1, len(hosts) + 1), [host.encode() for host in hosts]
    return table


def test_energy_is_the_difference_of_the_counter_not_its_value() -> None:
    used = energy(samples(11, 1, counter=5e6), on("a"), {0: 400})
    assert used is not None
    assert used.joules == pytest.approx(2000.0)
    assert (used.gpus, used.from_power) == (1, False)
    assert used.joules_per_output_token == pytest.approx(5.0)


def test_without_a_counter_power_over_time_counts() -> None:
    used = energy(samples(11, 1), on("a"), {0: 400})
    assert used is not None
    assert used.joules == pytest.approx(2000.0)
    assert used.from_power


def test_a_gpu_that_ranks_share_counts_once_and_those_of_other_hosts_apart() -> None:
    table = np.concatenate([samples(11, rank, counter=0.0) for rank in (1, 2, 3)])
    used = energy(table, on("a", "a", "b"), {0: 1})
    assert used is not None
    assert used.joules == pytest.approx(4000.0)
    assert used.gpus == 2
    names = [device.name for device in devices(table, on("a", "a", "b"))]
    assert names == ["a GPU 0", "b GPU 0", "rank 1", "rank 2", "rank 3"]


def test_sessions_add_up_and_tokens_are_those_of_measured_ones_alone() -> None:
    table = np.concatenate([samples(11, 1, session=0, counter=9.0), samples(6, 1, session=2, counter=0.0)])
    used = energy(table, on("a"), {0: 100, 1: 7_000, 2: 50})
    assert used is not None
    assert used.joules == pytest.approx(3000.0)
    assert used.output_tokens == 150


def test_nothing_measured_is_none_and_no_tokens_are_no_ratio() -> None:
    nothing = samples(5, 1, watts=math.nan)
    assert energy(nothing, on("a"), {0: 100}) is None
    assert energy(samples(5, 1, gpu=-1), on("a"), {0: 100}) is None
    assert energy(samples(1, 1, counter=0.0), on("a"), {0: 100}) is None, "one sample is no difference"
    used = energy(samples(5, 1), on("a"), {})
    assert used is not None
    assert math.isnan(used.joules_per_output_token)


def test_missing_is_never_0() -> None:
    table = samples(5, 1)
    table["memory_used_bytes"], table["power_w"] = -1, np.nan
    device = devices(table, on("a"))[0]
    assert (device.name, device.has("memory_used_bytes"), device.has("power_w")) == ("GPU 0", False, False)
    assert math.isnan(device.mean("power_w"))
    assert device.mean("utilization") == pytest.approx(90.0)


def test_series_are_thinned_by_means_and_sessions_follow_one_another() -> None:
    table = np.concatenate([samples(3_000, 1), samples(10, 1, session=1)])
    table["utilization"] = np.arange(len(table)) % 2 * 100
    device = devices(table, on("a"), {1: 5_000.0})[0]
    assert len(device.t_s) <= POINTS
    assert device.t_s[-1] > 5_000
    assert device.series["utilization"][:-2] == pytest.approx(50.0, abs=10)
    assert (np.diff(device.t_s) > 0).all()


def test_no_samples_are_no_devices() -> None:
    assert devices(np.zeros(0, TELEMETRY), on("a")) == []
