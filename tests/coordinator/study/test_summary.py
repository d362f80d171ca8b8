"""Speed-up and what comes with it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.study.summary import doubts, karp_flatt, summarise, without_nan
from tests.coordinator.study.cells import cell, cells

seconds = st.floats(0.01, 1e5)
walls = st.lists(seconds, min_size=1, max_size=5)
studies = st.fixed_dictionaries({1: walls}, optional={2: walls, 3: walls, 8: walls})


def test_figures_by_hand() -> None:
    one, four = summarise(cells({1: [10.0, 12.0, 11.0], 4: [3.0, 4.0, 5.0]}), 1)
    assert (one.median_s, one.min_s, one.max_s, one.repeats) == (11.0, 10.0, 12.0, 3)
    assert (one.speedup, one.efficiency) == (1.0, 1.0)
    assert math.isnan(one.serial_fraction)
    assert four.speedup == 11 / 4
    assert (four.speedup_min, four.speedup_max) == (10 / 5, 12 / 3)
    assert four.efficiency == 11 / 16
    assert four.serial_fraction == pytest.approx((4 / 11 - 1 / 4) / (3 / 4))
    assert four.output_tokens_per_s == 25.0


@given(studies)
def test_a_speed_up_lies_within_its_spread(times: dict[int, list[float]]) -> None:
    for row in summarise(cells(times), 1):
        assert row.min_s <= row.median_s <= row.max_s
        assert row.speedup_min <= row.speedup <= row.speedup_max
        assert row.efficiency * row.workers == pytest.approx(row.speedup)


@given(studies, st.floats(0.1, 10))
def test_another_unit_of_time_changes_no_speed_up(times: dict[int, list[float]], factor: float) -> None:
    scaled = {k: [factor * wall_s for wall_s in walls] for k, walls in times.items()}
    for one, other in zip(summarise(cells(times), 1), summarise(cells(scaled), 1), strict=True):
        assert other.speedup == pytest.approx(one.speedup)


@given(st.floats(0, 1), st.integers(2, 512), seconds)
def test_the_serial_share_of_work_that_follows_amdahl_is_found(serial: float, workers: int, base_s: float) -> None:
    time_s = base_s * (serial + (1 - serial) / workers)
    row = summarise(cells({1: [base_s], workers: [time_s]}), 1)[1]
    assert row.serial_fraction == pytest.approx(serial, abs=1e-9)
    assert karp_flatt(row.speedup, workers) == row.serial_fraction


def test_against_several_workers_efficiency_counts_from_them() -> None:
    two, eight = summarise(cells({2: [8.0], 8: [2.0]}), 2)
    assert (two.efficiency, eight.speedup, eight.efficiency) == (1.0, 4.0, 1.0)
    assert math.isnan(eight.serial_fraction)


def test_without_a_base_there_are_times_and_no_speed_up() -> None:
    (four,) = summarise(cells({4: [3.0]}), 1)
    assert four.median_s == 3.0
    assert math.isnan(four.speedup)
    assert without_nan({"speedup": four.speedup, "repeats": 1}) == {"speedup": None, "repeats": 1}


def test_shares_and_energy_are_medians_of_what_is_known() -> None:
    nan = float("nan")
    known = [cell(2, 1, 1.0, idle_share=0.1, energy_j=nan), cell(2, 2, 1.0, idle_share=nan, energy_j=30.0)]
    (two,) = summarise(known, 1)
    assert (two.idle_share, two.energy_j) == (0.1, 30.0)


def test_cells_that_did_other_work_are_doubted() -> None:
    assert doubts([cell(1, 1, 1.0), cell(2, 1, 1.0)]) == []
    found = doubts([cell(1, 1, 1.0), cell(2, 1, 1.0, output_tokens=90, failed=2)])
    assert "between 90 and 100 output tokens" in found[0]
    assert "2 requests failed" in found[1]
