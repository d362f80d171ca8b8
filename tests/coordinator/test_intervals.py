"""What workers tell once an interval reaches the disk then, once, and without rank 0 waiting for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.collect import Gathered
from coordinator.intervals import GATHER_S, Intervals
from scheduling import messages as m
from scheduling.errors import RecordError
from scheduling.histogram import LogHistogram
from scheduling.tables import COPY, RANK, TELEMETRY
from storage.files import OsDisk
from storage.segments import latest, read_segments
from storage.summary import Summary
from tests.coordinator.fakes import FakeClock
from tests.storage.fake_disk import FakeDisk

FOLDER = Path("/run/metrics.d")


class Later(Executor):
    """What is submitted is done when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self.waiting.append(work)
        return future

    def work(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


class Stage:
    def __init__(self, folder: Path, disk: Any = None) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.later = Later()
        self.intervals = Intervals(disk or OsDisk(), folder, 2, self.filled, self.clock, self.later)

    def filled(self, ranks: Any) -> Any:
        ranks["stolen_in"] = 5
        return ranks

    def tell(self, worker: int, requests: int, samples: int = 2) -> None:
        row, telemetry = np.zeros(1, RANK), np.zeros(samples, TELEMETRY)
        row["rank"], row["requests"] = worker, requests
        telemetry["rank"], telemetry["t_s"] = worker, self.clock() + np.arange(samples)
        self.intervals.hear(
            worker,
            m.Counters(row=row.tobytes(), itl_buckets=[worker], itl_counts=[requests], telemetry=telemetry.tobytes()),
        )

    def pass_(self) -> None:
        self.clock.pass_(GATHER_S)
        self.intervals.tick()

    def written(self) -> tuple[list[int], int, int]:
        """Requests of each rank, all gaps between tokens, samples: as a reader finds them."""
        counters = latest(self.folder, ("ranks", "itl")).arrays
        ranks = [int(n) for rows in counters["ranks"] for n in rows["requests"]]
        gaps = sum(int(counts.sum()) for counts in counters["itl"])
        return ranks, gaps, sum(len(segment.array) for segment in read_segments(self.folder, "telemetry"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "metrics.d")


def test_those_that_tell_together_are_written_together_a_second_later(stage: Stage) -> None:
    stage.tell(2, 10)
    stage.tell(1, 20)
    stage.intervals.tick()
    assert not stage.later.waiting
    stage.pass_()
    stage.later.work()
    assert stage.written() == ([20, 10], 30, 4)
    [ranks] = latest(stage.folder, ("ranks",)).arrays["ranks"]
    assert ranks["stolen_in"].tolist() == [5, 5], "with what only rank 0 knows"


def test_copies_are_written_as_they_are_then_and_at_the_end(stage: Stage) -> None:
    copies = np.array([(7, 2, 2, 1, 3, 2.5, np.nan, -1)], COPY)
    stage.intervals = Intervals(
        OsDisk(), stage.folder, 2, stage.filled, stage.clock, stage.later, lambda: copies.copy()
    )  # fmt: skip
    stage.tell(1, 1)
    stage.pass_()
    copies["won"] = 1  # after it was asked for
    stage.later.work()
    [written] = latest(stage.folder, ("copies",)).arrays["copies"]
    assert written["won"].tolist() == [-1]
    stage.intervals.finish(None)
    [written] = latest(stage.folder, ("copies",)).arrays["copies"]
    assert written.tobytes() == copies.tobytes()
    assert stage.written() == ([1], 1, 2), "beside the other counters"


def test_later_counters_replace_earlier_ones_and_samples_are_added(stage: Stage) -> None:
    for requests in (1, 2, 3):
        stage.tell(1, requests)
        stage.pass_()
        stage.later.work()
        stage.intervals.tick()
    assert stage.written() == ([3], 3, 6)


def test_rank_0_does_not_wait_for_a_slow_disk_and_nothing_is_lost(stage: Stage) -> None:
    stage.tell(1, 1)
    stage.pass_()
    stage.tell(1, 2)
    stage.pass_()
    assert len(stage.later.waiting) == 1, "one write at a time"
    stage.later.work()
    stage.intervals.tick()
    stage.later.work()
    assert stage.written() == ([2], 2, 4)


def test_at_the_end_what_was_gathered_counts_and_the_last_samples_are_added(stage: Stage) -> None:
    stage.tell(1, 1)
    ranks, telemetry = np.zeros(2, RANK), np.zeros(3, TELEMETRY)
    ranks["requests"] = [7, 8]
    itl = LogHistogram()
    itl.add_sparse([0], [15])
    stage.intervals.finish(Gathered(Summary(), itl, range(3), ranks=[ranks], telemetry=[telemetry]))
    assert stage.written() == ([7, 8], 15, 5)


def test_what_those_told_last_that_were_not_asked_is_added(stage: Stage) -> None:
    stage.tell(1, 30)
    stage.tell(2, 4)
    ranks = np.zeros(1, RANK)
    ranks["rank"], ranks["requests"] = 1, 31
    itl = LogHistogram()
    itl.add_sparse([0], [100])
    seen: list[Any] = []

    def complete(rows: Any) -> Any:
        seen.extend(rows["rank"].tolist())
        rows["requests"][rows["rank"] == 2] += 1
        return rows

    stage.intervals.finish(Gathered(Summary(), itl, (0, 1), ranks=[ranks]), complete)
    assert sorted(seen) == [1, 2]
    requests, gaps, _ = stage.written()
    assert sorted(requests) == [5, 31]
    assert gaps == 104


def test_without_a_gather_the_last_interval_stands(stage: Stage) -> None:
    stage.tell(1, 4)
    stage.intervals.finish(None)
    assert stage.written() == ([4], 4, 2)


def test_a_write_that_fails_is_told_at_the_next_turn() -> None:
    stage = Stage(FOLDER, FakeDisk(fail={"sync": errno.EIO}))
    stage.tell(1, 1)
    stage.pass_()
    stage.later.work()
    with pytest.raises(RecordError, match="Input/output error"):
        stage.intervals.tick()
