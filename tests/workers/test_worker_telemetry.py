"""What a worker tells of itself while it works: starved slots, telemetry, counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scheduling import messages as m
from scheduling.tables import RANK, TELEMETRY
from tests.workers.worker_bench import RANK_NUMBER, SEED, Bench
from workers.protocol import Stats

# ---------------------------------------------------------------- telemetry and starved slots


def test_slots_are_starved_only_while_work_exists_elsewhere() -> None:
    bench = Bench().ready(slots=2)
    bench.pass_(1.0)
    bench.assign(5)
    bench.pass_(2.0)
    bench.assign(6)
    bench.pass_(4.0)
    metrics = bench.worker.metrics
    assert metrics.starved_slot_s == pytest.approx(2 * 1.0 + 1 * 2.0)
    bench.hear(m.Exhausted(True))
    bench.engine.finish(5, 6)
    bench.pass_(8.0)
    bench.pass_(8.0)
    assert metrics.starved_slot_s == pytest.approx(4.0)
    bench.hear(m.Exhausted(False))
    bench.pass_(1.0)
    assert metrics.starved_slot_s == pytest.approx(6.0)


def test_no_slot_is_starved_without_an_engine() -> None:
    bench = Bench().ready(slots=2)
    bench.engine.die()
    bench.step()
    bench.pass_(100.0)
    assert bench.worker.metrics.starved_slot_s == 0.0


def test_telemetry_is_sampled_once_an_interval_while_an_engine_lives() -> None:
    asked: list[tuple[m.Placement, int | None]] = []

    def factory(placement: m.Placement, pid: int | None) -> Callable[[], list[tuple[Any, ...]]]:
        asked.append((placement, pid))
        return lambda: [(0, 50.0, 10, 100.0, 40.0, 5.0, 1.0, 77)]

    bench = Bench(telemetry_factory=factory, telemetry_interval_s=1.0)
    bench.ready()
    assert asked == [(m.Placement(note="CPU"), 4711)]
    for _ in range(10):
        bench.pass_(0.25)
    rows = bench.worker.metrics.telemetry.rows()
    assert len(rows) == 3
    assert rows["rss_bytes"].tolist() == [77] * 3
    assert rows["session"].tolist() == [4] * 3
    bench.engine.die()
    bench.step()
    bench.pass_(0.4)
    count = len(bench.worker.metrics.telemetry.rows())
    bench.pass_(0.05)
    assert len(bench.worker.metrics.telemetry.rows()) == count


# ---------------------------------------------------------------- intervals


def counters_of(messages: list[Any]) -> list[m.Counters]:
    return [message for message in messages if isinstance(message, m.Counters)]


def test_once_an_interval_rank_0_is_told_all_counters_and_the_new_telemetry() -> None:
    bench = Bench(
        telemetry_factory=lambda placement, pid: lambda: [(0, 50.0, 10, 100.0, 40.0, 5.0, 1.0, 77)],
        telemetry_interval_s=1.0, metrics_interval_s=3.0,
    ).ready()  # fmt: skip
    stats = Stats(
        interval_s=1.0, steps=5, prompt_tokens=0, output_tokens=9, busy_s=1.0, slot_s=1.5, decode_s=0.0, sample_s=0.0,
        itl_buckets=[7, 9], itl_counts=[2, 1],
    )  # fmt: skip
    bench.engine.say(stats)
    told = counters_of([message for _ in range(10) for message in bench.pass_(0.75)])
    assert len(told) == 2
    samples = [np.frombuffer(message.telemetry, TELEMETRY) for message in told]
    assert len(np.unique(np.concatenate(samples)["t_s"])) == sum(map(len, samples)) > 4, "each sample is told once"
    assert len(bench.worker.metrics.telemetry) < 3, "and forgotten then"
    for message in told:
        [row] = np.frombuffer(message.row, RANK)
        assert (row["rank"], row["session"], row["steps"]) == (RANK_NUMBER, 4, 5), "sums since the session's start"
        assert (message.itl_buckets, message.itl_counts) == ([7, 9], [2, 1])


def test_telemetry_is_told_earlier_where_much_of_it_has_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gauges.TELEMETRY_ROWS_MAX", 5)
    bench = Bench(
        telemetry_factory=lambda placement, pid: lambda: [(gpu, 50.0, 1, 1.0, 1.0, 1.0, 1.0, 1) for gpu in range(2)],
        telemetry_interval_s=1.0, metrics_interval_s=1e6,
    ).ready()  # fmt: skip
    told = counters_of([message for _ in range(9) for message in bench.pass_(1.0)])
    assert [len(np.frombuffer(message.telemetry, TELEMETRY)) for message in told] == [6, 6, 6]


def test_nothing_is_told_before_the_engine_is_ready() -> None:
    bench = Bench(metrics_interval_s=1.0)
    bench.hear(m.Welcome(placement=m.Placement(note="CPU"), run_seed=SEED, session=4))
    assert not counters_of([message for _ in range(5) for message in bench.pass_(1.0)])
