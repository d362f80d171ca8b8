"""Service times: what a pass takes never shrinks with what is in it, and nonsense is refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.calibration import rising
from scheduling.errors import ConfigError
from scheduling.servicetime import EXAMPLE, ServiceTimes, parse_service_times, service_times_json

MEASURED = EXAMPLE.measured


def times(**changes: Any) -> ServiceTimes:
    options: dict[str, Any] = {
        "measured": MEASURED, "decode_rows": (1, 4, 8), "decode_s": (1.0, 4.0, 6.0), "read_pass_s": 10.0,
        "read_token_s": 0.5, "decode_cell_s": 0.01, "read_cell_s": 0.002, "choose_row_s": 0.25,
    }  # fmt: skip
    return ServiceTimes(**options | changes)


seconds = st.floats(0.0, 10.0)


@st.composite
def any_times(draw: st.DrawFn) -> ServiceTimes:
    rows = (1, *sorted(draw(st.sets(st.integers(2, 256), max_size=6))))
    points = draw(st.lists(seconds, min_size=len(rows), max_size=len(rows)))
    return times(
        decode_rows=rows, decode_s=tuple(rising(points).tolist()), read_pass_s=draw(seconds),
        read_token_s=draw(seconds), decode_cell_s=draw(seconds), read_cell_s=draw(seconds), choose_row_s=draw(seconds),
    )  # fmt: skip


passes = st.fixed_dictionaries(
    dict.fromkeys(("decode_rows", "decode_cells", "read_tokens", "read_cells", "chosen"), st.integers(0, 1000))
)


@given(any_times(), passes, passes)
def test_a_pass_with_more_in_it_never_takes_less(
    given_times: ServiceTimes, some: dict[str, int], more: dict[str, int]
) -> None:
    both = {name: some[name] + more[name] for name in some}
    assert given_times.pass_s(**both) >= given_times.pass_s(**some) * (1 - 1e-9)


@given(any_times(), passes)
def test_json_brings_back_the_same_times(given_times: ServiceTimes, some: dict[str, int]) -> None:
    again = parse_service_times(service_times_json(given_times), "here")
    assert again == given_times
    assert again.pass_s(**some) == given_times.pass_s(**some)


@given(any_times(), passes, st.floats(0.0, 100.0))
def test_scaling_scales_everything(given_times: ServiceTimes, some: dict[str, int], factor: float) -> None:
    expected = factor * given_times.pass_s(**some)
    assert given_times.scaled(factor).pass_s(**some) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert given_times.scaled(factor).measured == MEASURED


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 0.0), (1, 1.0), (2, 2.0), (4, 4.0), (6, 5.0), (8, 6.0), (12, 8.0), (16, 10.0)]
)
def test_rows_between_points_are_on_the_line_and_beyond_them_go_on(rows: int, expected: float) -> None:
    assert times().rows_s(rows) == pytest.approx(expected)


def test_one_point_alone_says_that_rows_do_not_help_each_other() -> None:
    assert times(decode_rows=(1,), decode_s=(2.0,)).rows_s(3) == 6.0


def test_what_a_request_takes_is_the_sum_of_its_passes() -> None:
    read_s = 10.0 + 0.5 * 20 + 0.002 * 210 + 0.25
    assert times().prefill_s(20) == pytest.approx(read_s)
    assert times().decode_step_s(4, cells=100) == pytest.approx(4.0 + 4 * 100 * 0.01 + 4 * 0.25)
    assert times().request_s(20, 11, 4) == pytest.approx(4 * read_s + 10 * times().decode_step_s(4, 25))
    assert times().request_s(20, 1) == pytest.approx(read_s)
    assert times().prefill_tokens_per_s == 2.0
    assert times(read_token_s=0.0).prefill_tokens_per_s == float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_rows": (), "decode_s": ()}, "one at least"),
        ({"decode_rows": (1, 2)}, "as many of both"),
        ({"decode_rows": (2, 4, 8)}, "begin with 1"),
        ({"decode_rows": (1, 8, 4)}, "rise"),
        ({"decode_s": (1.0, 5.0, 4.0)}, "must not take less time"),
        ({"decode_s": (-1.0, 5.0, 6.0)}, "decode_s is -1.0"),
        ({"read_pass_s": -0.1}, "read_pass_s is -0.1"),
        ({"read_token_s": float("nan")}, "read_token_s is nan"),
        ({"choose_row_s": float("inf")}, "choose_row_s is inf"),
        ({"version": 2}, "--calibrate"),
    ],
)
def test_what_cannot_be_times_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        times(**changes)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_what_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="factor of time"):
        EXAMPLE.scaled(factor)


def changed(**fields: Any) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(EXAMPLE) | fields)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "times.json does not hold service times"),
        (b"[1, 2]", "object"),
        (changed(decode_ms=[1]), "decode_ms"),
        (changed(read_pass_s="fast"), "read_pass_s"),
        (changed(decode_s=[3.0, 2.0, 1.0, 0.5]), "must not take less time"),
    ],
)
def test_a_file_that_holds_no_times_is_refused_with_its_name_and_the_way_out(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_service_times(data, "times.json")
    assert "times.json" in str(refused.value)
    assert "bench engine --calibrate" in str(refused.value)
