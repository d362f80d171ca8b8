"""Vectors as bytes and as numbers: nothing is lost, and nothing is written that says nothing."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduling.vectors import from_base64, from_bytes, to_base64, to_bytes, to_numbers

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_written_numbers_are_read_as_the_same_float32(values: list[float]) -> None:
    vectors = np.array([values], np.float32)
    read = np.array(json.loads(json.dumps(to_numbers(vectors))), np.float32)
    assert read.tobytes() == vectors.tobytes()


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_no_number_of_a_unit_vector_has_more_than_nine_digits(values: list[float]) -> None:
    small = np.float32(1e-12)  # below it the scale is not exact
    kept = [value for value in values if value == 0 or abs(value) > small]
    for (number,) in to_numbers(np.array(kept, np.float32)[:, None]):
        digits = f"{number!r}".partition("e")[0].replace("-", "").replace(".", "").strip("0")
        assert len(digits) <= 9


def test_bytes_and_base64_are_little_endian_float32() -> None:
    vectors = np.array([[1, -2], [0.5, 3]], np.float32)
    assert to_bytes(vectors)[:4] == b"\x00\x00\x80\x3f"
    assert np.array_equal(from_bytes(to_bytes(vectors), 2), vectors)
    assert to_base64(vectors[0]) == "AACAPwAAAMA="
    assert np.array_equal(from_base64("AACAPwAAAMA="), vectors[0])
