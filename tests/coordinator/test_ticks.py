"""Times as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.page.ticks import duration_ticks, log_ticks, time_text


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(1e-6, "1 µs"), (8.5e-4, "850 µs"), (0.0125, "12.5 ms"), (0.9, "900 ms"), (0.99999, "1 s"), (3.21, "3.21 s"),
     (299, "299 s"), (300, "5 min"), (9000, "2.5 h")],
)  # fmt: skip
def test_a_time_has_three_digits_and_a_unit_that_suits_it(value_s: float, text: str) -> None:
    assert time_text(value_s) == text


@pytest.mark.slow
@given(st.floats(1e-6, 1e5), st.floats(1.5, 1e9))
def test_places_on_a_logarithmic_axis_are_few_rising_inside_and_told_apart(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 5
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert len({time_text(tick) for tick in ticks}) == len(ticks)


@given(st.floats(1e-3, 1e7))
def test_places_on_an_axis_of_time_begin_at_0_and_stay_inside(length_s: float) -> None:
    ticks, texts, unit = duration_ticks(length_s)
    assert ticks[0] == 0
    assert ticks[-1] <= length_s * 1.0001
    assert 3 <= len(ticks) == len(set(texts)) <= 9
    assert unit in ("seconds", "minutes", "hours")
