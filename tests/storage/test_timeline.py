"""Requests laid out over time: nothing is lost between bins, sessions follow, what has no time is counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduling.tables import COPY, REQUEST
from storage import timeline as module
from storage.summary import Rows
from storage.timeline import BINS, SHORTEST_S, Timeline, coarser, timeline


def request(
    end_s: float, e2e_s: float = 1.0, queue_s: float = 0.0, ttft_s: float = 0.0, tokens: int = 4, **other: int
) -> Rows:
    row = np.zeros(1, REQUEST)
    row["end_s"], row["e2e_s"], row["queue_s"], row["ttft_s"], row["output_tokens"] = (
        end_s,
        e2e_s,
        queue_s,
        ttft_s,
        tokens,
    )
    row["rank"], row["stolen_from"], row["ok"] = 1, -1, 1
    for name, value in other.items():
        row[name] = value
    return row


def drawn(*rows: Rows) -> Timeline:
    found = timeline(lambda: rows)
    assert found is not None
    return found


def test_a_request_runs_from_its_first_step_to_its_end() -> None:
    line = drawn(request(10.0, e2e_s=6.0, queue_s=1.0, ttft_s=3.0, tokens=30))
    lane = line.lanes[1]
    assert line.length_s == 10.0
    assert lane.running[: BINS // 2].max() == pytest.approx(0.0, abs=1e-9)
    assert lane.running[BINS // 2 :].min() == pytest.approx(1.0)
    rates = coarser(lane.tokens, BINS // 10)
    assert rates == pytest.approx([0.0] * 7 + [10.0] * 3, abs=1e-6)


times = st.floats(0.0, 1000.0)
shares = st.floats(0.0, 1.0)


@pytest.mark.slow
@settings(deadline=None)
@example([(0.0, 5e-324, 0.0, 0.0, 1, 0)])
@given(
    st.lists(
        st.tuples(times, st.floats(0, 500), shares, shares, st.integers(0, 500), st.integers(0, 3)),
        min_size=1, max_size=40,
    )
)  # fmt: skip
def test_sums_over_bins_are_those_over_requests(given_rows: list[tuple[float, float, float, float, int, int]]) -> None:
    rows = []
    for begin, took, queued, first, tokens, rank in given_rows:
        rows.append(request(begin + took, took, queued * took, first * took, tokens, rank=rank))
    found = timeline(lambda: [np.concatenate(rows)])
    if found is None:
        assert all(begin + took < SHORTEST_S for begin, took, *_ in given_rows)
        return
    ran_s = sum(took * (1 - queued) for _, took, queued, *_ in given_rows)
    assert found.tokens.sum() == pytest.approx(sum(row[4] for row in given_rows), abs=1e-3)
    # Less than a thousandth of a bin is not told from nothing.
    assert found.running.sum() * found.bin_s == pytest.approx(ran_s, rel=1e-4, abs=40 * found.bin_s)
    assert sum(lane.requests for lane in found.lanes.values()) == len(rows)


def test_a_late_end_does_not_make_a_lane_look_half_empty() -> None:
    rows = [request(float(k + 1)) for k in range(200)]
    late = request(100.0, e2e_s=1.0)
    assert drawn(*rows, late).lanes[1].full == pytest.approx(1.0)
    assert drawn(*rows, late).lanes[1].running.max() == pytest.approx(2.0)
    assert drawn(request(3.0, e2e_s=0.0)).lanes[1].full == 0.0


def test_chunks_make_no_difference() -> None:
    rows = [request(1.0 + k / 7, rank=k % 3, tokens=k) for k in range(50)]
    whole, pieces = drawn(np.concatenate(rows)), drawn(*rows)
    assert list(whole.lanes) == [0, 1, 2]
    for rank, lane in whole.lanes.items():
        assert lane.running == pytest.approx(pieces.lanes[rank].running, abs=1e-6)
        assert lane.tokens == pytest.approx(pieces.lanes[rank].tokens, abs=1e-6)


def test_sessions_stand_one_behind_the_other() -> None:
    line = drawn(request(4.0), request(6.0, session=2), request(5.0))
    assert (line.length_s, line.breaks_s) == (11.0, {2: 5.0})
    assert line.lanes[1].running[BINS * 21 // 22 :].min() == pytest.approx(1.0)


def test_what_has_no_point_in_time_is_counted_and_not_drawn() -> None:
    assert timeline(lambda: [request(np.nan)]) is None
    assert timeline(lambda: iter(())) is None
    older = REQUEST.descr
    without = np.zeros(3, [field for field in older if field[0] not in ("end_s", "stolen_from")])
    assert timeline(lambda: [without]) is None
    line = drawn(request(2.0), request(np.nan), without)
    assert (line.untimed, line.lanes[1].requests) == (4, 1)


def test_steals_are_marked_where_they_arrived_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARKS_MAX", 3)
    line = drawn(*(request(10.0 - k, e2e_s=1.0, stolen_from=2) for k in range(5)), request(12.0))
    assert line.lanes[1].steals == [(7.0, 2), (8.0, 2), (9.0, 2)]
    assert line.lanes[1].stolen_in == 5


def copy(start_s: float, session: int = 0, rank: int = 1, won: int = 1) -> Rows:
    return np.array([(7, 2, session, rank, 3, start_s, np.nan, won)], COPY)


def test_copies_are_marked_where_they_were_started_in_the_time_of_their_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MARKS_MAX", 2)
    copies = [copy(3.0), copy(1.0, won=0), copy(2.0), copy(2.5, session=1, rank=2, won=-1), copy(9.0, rank=2)]
    line = timeline(lambda: [request(4.0), request(6.0, session=1)], np.concatenate(copies))
    assert line is not None
    assert line.lanes[1].copies == [(1.0, 3, False), (2.0, 3, True)], "so many are kept"
    assert (line.lanes[1].copied_in, line.lanes[1].copies_won) == (3, 2)
    second = line.lanes[2]
    assert second.copies == [(6.5, 3, False)], "the one after the last end that is recorded has no place in time"
    assert (second.copied_in, second.copies_won, second.requests) == (2, 1, 0)
    assert not second.running.any()


def test_rows_are_gone_through_twice_and_never_kept() -> None:
    passes = 0

    def rows() -> Iterator[Rows]:
        nonlocal passes
        passes += 1
        yield request(3.0)

    assert timeline(rows) is not None
    assert passes == 2
