"""What the record says of ranks that were not there to be asked, and that only that is compared which was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest

from coordinator.collect import Gathered
from coordinator.rundata import OwnRows, check_gathered, completed, copy_rows, make_metrics
from scheduling.copies import Copied
from scheduling.errors import BugError
from scheduling.histogram import LogHistogram
from scheduling.recordline import encode_failure, encode_result
from scheduling.requests import Request
from scheduling.tables import COPY, RANK
from storage.files import OsDisk
from storage.metrics import read_summary
from storage.recovery import rows as record_rows
from storage.rundir import METRICS_NAME, SEGMENTS_NAME, RunDir
from storage.summary import Summary
from tests.coordinator.runs import make_run


def test_copies_count_their_time_from_the_welcome_and_say_who_was_first() -> None:
    told = [Copied(7, 2, 1, 3, 12.5, 14.0, True), Copied(8, 2, 1, 3, 12.5, 15.0, False), Copied(9, 3, 2, 3, 13.0)]
    coordinator = SimpleNamespace(plane=SimpleNamespace(copies=told))
    rows = copy_rows(coordinator, 4, 10.0)  # type: ignore[arg-type]
    assert rows.dtype == COPY
    assert rows.tolist()[:2] == [(7, 2, 4, 1, 3, 2.5, 4.0, 1), (8, 2, 4, 1, 3, 2.5, 5.0, 0)]
    assert rows["won"][2] == -1
    assert np.isnan(rows["answered_s"][2])
    assert len(copy_rows(SimpleNamespace(plane=SimpleNamespace(copies=[])), 4, 10.0)) == 0  # type: ignore[arg-type]


class NothingDropped:
    """As much of a coordinator as is asked."""

    def __init__(self) -> None:
        self.dropped: set[tuple[int, int, int]] = set()
        self.failures: list[Any] = []


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """Ranks 1, 2 and 3 have answered 3, 2 and 1 requests, of which one each has failed."""
    with RunDir.create_or_resume(tmp_path / "run", {"model": "m"}, {}) as made:
        lines = []
        for rank, count in ((1, 3), (2, 2), (3, 1)):
            for k in range(count):
                index = 10 * rank + k
                if k == 0:
                    lines.append(encode_failure(f"id-{index}", index, 1, rank, made.session, "x", "why", 4))
                    continue
                request = Request(custom_id=f"id-{index}", kind="completion", prompt="x")
                choices = [("text", "stop", 5)]
                lines.append(
                    encode_result(request, index, 1, rank, made.session, choices, 7, 5, 0.1, 0.2, 0.3, 0, "m", 2)
                )
        made.record_path.write_bytes(b"".join(lines))
        yield made


def gathered_of(run: RunDir, *ranks: int) -> tuple[Gathered, OwnRows]:
    own, summary = OwnRows(NothingDropped()), Summary()  # type: ignore[arg-type]
    for rows in record_rows(run.record_path, OsDisk(), session=run.session):
        rows = rows[np.isin(rows["rank"], ranks)]
        own(rows)
        summary.add(rows)
    return Gathered(summary, LogHistogram(), (0, *ranks), rows=summary), own


def test_survivors_are_compared_with_what_the_record_has_of_them(run: RunDir) -> None:
    gathered, own = gathered_of(run, 1, 3)
    check_gathered(run, gathered, own, NothingDropped(), OsDisk(), {2})  # type: ignore[arg-type]
    with pytest.raises(BugError, match="requests: 6 recorded, 4 gathered"):
        check_gathered(run, gathered, own, NothingDropped(), OsDisk())  # type: ignore[arg-type]


def test_rows_that_come_again_count_once(run: RunDir) -> None:
    gathered, own = gathered_of(run, 1, 2, 3)
    own.begin()
    for rows in record_rows(run.record_path, OsDisk(), session=run.session):
        own(rows)
    check_gathered(run, gathered, own, NothingDropped(), OsDisk())  # type: ignore[arg-type]


def test_rows_of_absent_workers_have_times_as_told_and_counts_as_recorded(run: RunDir) -> None:
    told = np.zeros(2, RANK)
    told["rank"], told["session"], told["requests"], told["busy_s"] = [3, 1], run.session, [99, 3], [1.5, 2.5]
    ranks = completed(told, {2: ("node2", "GPU-2"), 3: ("node3", "GPU-3")}, run, OsDisk())
    assert ranks["rank"].tolist() == [1, 2, 3]
    assert ranks["requests"].tolist() == [3, 2, 1]
    assert ranks["failed"].tolist() == [0, 1, 1], "who was asked is not corrected"
    assert ranks["prompt_tokens"].tolist()[1:] == [11, 4]
    assert ranks["cached_tokens"].tolist()[1:] == [2, 0]
    assert ranks["output_tokens"].tolist()[1:] == [5, 0]
    assert ranks["host"][1] == b"node2"
    assert ranks["device"][1] == b"GPU-2"
    assert np.isnan(ranks["busy_s"][1]), "it told nothing"
    assert ranks["busy_s"][[0, 2]].tolist() == [2.5, 1.5]
    assert ranks["session"].tolist() == [run.session] * 3


def test_where_nobody_is_absent_rows_stay_as_they_are(run: RunDir) -> None:
    told = np.zeros(1, RANK)
    assert completed(told, {}, run, OsDisk()) is told


def test_each_file_of_segments_is_read_twice_at_most(tmp_path: Path) -> None:
    """Once for counters and for what cannot be read, once for the samples, which may be too many for memory."""
    path = make_run(tmp_path / "run")
    opened: Counter[str] = Counter()

    class Counting(OsDisk):
        def open_read(self, path: Path) -> BinaryIO:
            opened[path.name] += 1
            return super().open_read(path)

    segments = path / SEGMENTS_NAME / "session-0000.seg"
    with segments.open("ab") as file:
        file.write(b"torn")
    make_metrics(path, Counting())
    assert opened[segments.name] == 2
    found = read_summary(path / METRICS_NAME)
    assert found.attributes["unread_segment_bytes"] == 4
    assert found.telemetry_samples > 0
