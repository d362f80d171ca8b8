"""What a rank counts: rows, histograms, and slots that had nothing to do."""

from __future__ import annotations

import numpy as np
import pytest

from scheduling.histogram import BUCKETS, bucket_of
from scheduling.tables import REQUEST, TELEMETRY
from workers.metrics import HISTOGRAMS, RankMetrics, RowBuffer

NAN = float("nan")


def row(index: int, *, ok: int = 1, e2e_s: float = 1.0, tpot_s: float = 0.1) -> tuple[float, ...]:
    return (index, 1, 1, 0, 5, 0, 3, 0.01, 0.2, tpot_s, e2e_s, 1.0, -1, 0, ok)


def test_rows_come_back_in_order_however_many_there_are() -> None:
    rows = RowBuffer(REQUEST)
    for index in range(10_000):
        rows.append(row(index))
        if index == 5_000:
            assert len(rows.rows()) == 5_001
    found = rows.rows()
    assert found.dtype == REQUEST
    assert found["index"].tolist() == list(range(10_000))
    assert found["e2e_s"][9_999] == 1.0


def test_no_rows_are_an_empty_table_of_the_right_type() -> None:
    rows = RowBuffer(TELEMETRY).rows()
    assert rows.shape == (0,)
    assert rows.dtype == TELEMETRY


def test_starved_slots_are_free_ones_while_work_exists() -> None:
    metrics = RankMetrics(1, 0, "host")
    metrics.pass_time(0, True, 5.0)  # no engine yet: no slots
    metrics.engine_ready(4, 10.0)
    metrics.pass_time(1, True, 12.0)
    assert metrics.starved_slot_s == pytest.approx(6.0)
    metrics.pass_time(9, True, 20.0)  # all slots taken, and more waiting
    assert metrics.starved_slot_s == pytest.approx(6.0)
    metrics.pass_time(0, False, 30.0)  # nothing to do anywhere
    assert metrics.starved_slot_s == pytest.approx(6.0)


def test_time_without_an_engine_is_not_starved() -> None:
    metrics = RankMetrics(1, 0, "host")
    metrics.engine_ready(2, 0.0)
    metrics.engine_gone(0, True, 1.0)
    metrics.pass_time(0, True, 50.0)
    metrics.engine_ready(2, 60.0)
    metrics.pass_time(0, True, 61.0)
    assert metrics.starved_slot_s == pytest.approx(4.0)
    assert metrics.ready_at == 0.0


def test_histograms_hold_what_ended_well_and_is_defined() -> None:
    metrics = RankMetrics(1, 0, "host")
    metrics.requests.append(row(0, e2e_s=2.0))
    metrics.requests.append(row(1, e2e_s=2.0, tpot_s=NAN))
    metrics.requests.append(row(2, ok=0, e2e_s=1_000.0))
    metrics.itl.add_sparse([4], [9])
    counts = dict(zip(HISTOGRAMS, metrics.histograms(), strict=True))
    assert all(count.shape == (BUCKETS,) for count in counts.values())
    assert {name: int(count.sum()) for name, count in counts.items()} == {
        "queue": 2, "ttft": 2, "tpot": 1, "itl": 9, "e2e": 2,
    }  # fmt: skip
    assert counts["e2e"][int(bucket_of(np.array([2.0]))[0])] == 2
    assert counts["itl"][4] == 9


def test_rank_row_says_what_was_counted() -> None:
    metrics = RankMetrics(3, 2, "node7")
    metrics.device = "CPU, 2 threads of 8"
    metrics.engine_ready(4, 100.0)
    metrics.finished, metrics.failed, metrics.prompt_tokens, metrics.output_tokens = 9, 2, 40, 70
    metrics.cached_tokens = 30
    metrics.busy_s, metrics.slot_s, metrics.steps = 1.5, 2.5, 12
    metrics.drafted_tokens, metrics.accepted_tokens = 30, 20
    [found] = metrics.rank_row(110.0)
    assert (found["rank"], found["session"], found["host"], found["device"]) == (3, 2, b"node7", b"CPU, 2 threads of 8")
    assert (found["requests"], found["failed"], found["prompt_tokens"], found["output_tokens"]) == (9, 2, 40, 70)
    assert found["cached_tokens"] == 30
    assert (found["busy_s"], found["slot_s"], found["wall_s"], found["steps"]) == (1.5, 2.5, 10.0, 12)
    assert (found["drafted_tokens"], found["accepted_tokens"]) == (30, 20)


def test_rank_whose_engine_never_loaded_has_a_row_of_zeros() -> None:
    [found] = RankMetrics(3, 0, "node7").rank_row(110.0)
    assert (found["requests"], found["wall_s"]) == (0, 0.0)
