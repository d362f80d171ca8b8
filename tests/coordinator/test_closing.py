"""What there is time for at a bounded end, by the size of the record."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.closing import GOODBYE_S, Closing, Size, closing_in, gather_s, metrics_s, reserve_s

SMALL, MILLIONS = Size(1000, 700_000), Size(10_000_000, 7_000_000_000)
sizes = st.builds(Size, st.integers(0, 10**8), st.integers(0, 10**11))


@given(st.floats(0.01, 1e5), sizes)
def test_at_most_half_of_the_bound_is_reserved_and_never_less_than_the_goodbye_needs(
    bound_s: float, size: Size
) -> None:
    reserved_s = reserve_s(bound_s, size)
    assert min(GOODBYE_S, bound_s / 2) <= reserved_s <= bound_s / 2


@given(st.floats(0.0, 1e5), sizes)
def test_what_is_begun_fits_into_half_of_what_is_left(left_s: float, size: Size) -> None:
    closing = closing_in(left_s, size)
    needed_s = closing.metrics * metrics_s(size) + closing.gather * gather_s(size)
    assert needed_s <= left_s / 2
    assert closing.metrics or not closing.gather


def test_a_small_record_has_time_for_all_and_ten_million_rows_in_twenty_seconds_for_nothing() -> None:
    assert closing_in(reserve_s(20.0, SMALL), SMALL) == Closing(gather=True, metrics=True)
    assert reserve_s(20.0, MILLIONS) == GOODBYE_S
    assert closing_in(GOODBYE_S, MILLIONS) == Closing(gather=False, metrics=False)
    assert closing_in(7200.0, MILLIONS) == Closing(gather=True, metrics=True)


def test_there_is_a_size_of_which_metrics_can_be_made_and_rows_not_gathered() -> None:
    assert closing_in(3.4, Size(10_000, 0)) == Closing(gather=False, metrics=True)
