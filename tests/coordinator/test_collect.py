"""The end of a session: what all ranks counted comes together, by collectives that every rank enters alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.collect import collect
from coordinator.mpi_collectives import SoloCollectives
from scheduling.errors import BugError, RankFailedError, RankLostError
from scheduling.tables import RANK, REQUEST, TELEMETRY
from storage.summary import Sums, check_reduced, summarise
from tests.coordinator.fakes import Contribution, FakeCollectives
from workers.metrics import RankMetrics


def metrics_of(rank: int, latencies_s: list[float], failed: int = 0) -> RankMetrics:
    metrics = RankMetrics(rank, 0, f"node{rank}")
    metrics.engine_ready(2, 0.0)
    for k, e2e_s in enumerate(latencies_s):
        ok = int(k >= failed)
        times = (0.0, 0.1, 0.01, e2e_s, 9.0)
        metrics.requests.append((100 * rank + k, rank, 1, 0, 5, 2, 3 * ok, *times, -1, 0 if ok else 2, ok))
        metrics.finished += 1
        metrics.failed += 1 - ok
        metrics.prompt_tokens += 5
        metrics.cached_tokens += 2
        metrics.output_tokens += 3 * ok
    metrics.telemetry.append((1.0, rank, 0, -1, 1.0, 2, 3.0, 4.0, 5.0, 6.0, 7))
    metrics.itl.add_sparse([rank], [1])
    return metrics


def contributions(*hosted: list[RankMetrics]) -> list[list[Any]]:
    given = []
    for metrics in hosted:
        rank = Contribution()
        collect(rank, metrics, 10.0)
        given.append(rank.given)
    return given


def test_counters_histograms_and_rows_of_all_ranks_come_together() -> None:
    others = contributions([metrics_of(1, [1.0, 2.0])], [metrics_of(2, [9.0, 0.5, 3.0], failed=1)])
    came: list[Any] = []
    gathered = collect(FakeCollectives(others), [], 10.0, came.append)
    assert gathered.reduced.sums == Sums(5, 1, 25, 10, 12)
    assert gathered.present == (0, 1, 2)
    assert sorted(np.concatenate(came)["index"]) == [100, 101, 200, 201, 202]
    assert sorted(np.concatenate(gathered.ranks)["rank"]) == [1, 2]
    assert sorted(np.concatenate(gathered.telemetry)["rank"]) == [1, 2]
    assert {name: histogram.count for name, histogram in gathered.reduced.histograms.items()} == {
        "queue_s": 4, "ttft_s": 4, "tpot_s": 4, "e2e_s": 4,
    }  # fmt: skip
    assert gathered.itl.count == 2
    check_reduced(gathered.reduced, gathered.rows)


def test_extremes_leave_failed_requests_out() -> None:
    others = contributions([metrics_of(1, [1.0, 2.0])], [metrics_of(2, [9.0, 0.5, 3.0], failed=1)])
    gathered = collect(FakeCollectives(others), [], 10.0)
    assert (gathered.reduced.shortest_s, gathered.reduced.longest_s) == (0.5, 3.0)


def test_without_a_request_extremes_are_missing_not_zero() -> None:
    gathered = collect(FakeCollectives(contributions([metrics_of(1, [])])), [], 10.0)
    assert np.isnan([gathered.reduced.shortest_s, gathered.reduced.longest_s]).all()
    assert gathered.reduced.sums == Sums()
    check_reduced(gathered.reduced, gathered.rows)
    assert gathered.rows.sums.requests == 0


def test_a_row_lost_between_a_rank_and_rank_0_is_found_out() -> None:
    came: list[Any] = []
    gathered = collect(FakeCollectives(contributions([metrics_of(1, [1.0, 2.0, 4.0])])), [], 10.0, came.append)
    lost = np.concatenate(came)[:-1]
    with pytest.raises(BugError, match=r"requests: 3 reduced, 2 gathered; .*longest_s: 4\.0 reduced, 2\.0 gathered"):
        check_reduced(gathered.reduced, summarise([lost]))


def test_a_rank_may_host_several_workers_or_none() -> None:
    one_by_one = collect(FakeCollectives(contributions([metrics_of(1, [1.0])], [metrics_of(2, [2.0])])), [], 10.0)
    together = collect(FakeCollectives(contributions([], [])), [metrics_of(1, [1.0]), metrics_of(2, [2.0])], 10.0)
    check_reduced(together.reduced, one_by_one.reduced)
    assert np.concatenate(together.ranks)["rank"].tolist() == [1, 2]


def test_all_ranks_enter_the_same_collectives_in_the_same_order() -> None:
    """Whatever they host: otherwise the job hangs."""
    calls = []
    for hosted in ([], [metrics_of(1, [1.0])], [metrics_of(1, []), metrics_of(2, [3.0, 4.0])]):
        rank = FakeCollectives([])
        collect(rank, hosted, 10.0)
        calls.append([call.split()[0] for call in rank.calls])
    assert calls[0] == calls[1] == calls[2]
    assert calls[0] == ["sum", "sum", "minimum", "maximum", "gather", "gather", "gather"]


def test_contributions_have_one_type_and_shape_on_every_rank() -> None:
    for a, b in zip(*contributions([], [metrics_of(1, [1.0, 2.0])]), strict=True):
        assert a.dtype == b.dtype
        assert a.ndim == b.ndim
        if a.dtype not in (REQUEST, RANK, TELEMETRY):
            assert a.shape == b.shape


def test_alone_collectives_give_back_what_they_are_given() -> None:
    gathered = collect(SoloCollectives(), [metrics_of(1, [1.0, 2.0])], 10.0)
    assert gathered.reduced.sums == Sums(2, 0, 10, 4, 6)
    assert (gathered.reduced.shortest_s, gathered.reduced.longest_s) == (1.0, 2.0)
    assert gathered.present == (0,)
    [ranks] = gathered.ranks
    assert ranks["wall_s"].tolist() == [10.0]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_solo_rows_come_in_chunks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.mpi_collectives.GATHER_CHUNK_BYTES", 2 * 8)
    taken: list[Any] = []
    SoloCollectives().gather_rows(np.arange(count), taken.append)
    assert [value for chunk in taken for value in chunk] == list(range(count))
    assert all(len(chunk) <= 2 for chunk in taken)


class Dying(FakeCollectives):
    """Two others, of which one dies in the middle of a gather, in each of the first `deaths` attempts."""

    def __init__(self, others: list[list[Any]], deaths: int) -> None:
        super().__init__(others + others)
        self.deaths = deaths
        self._whole = others

    def gather_rows(self, rows: Any, take: Any) -> None:
        if self.deaths:
            self.deaths -= 1
            take(np.zeros(3, REQUEST))  # what came until then
            raise RankFailedError("a collective failed: process failure")
        super().gather_rows(rows, take)

    def shrink(self) -> None:
        self.calls.append("shrink")
        FakeCollectives.__init__(self, self._whole)
        self.calls.append("shrunk")


def test_when_a_rank_dies_meanwhile_the_others_begin_again_and_count_nothing_twice() -> None:
    came: list[Any] = []
    collectives = Dying(contributions([metrics_of(1, [1.0, 2.0])]), deaths=1)
    gathered = collect(collectives, [], 10.0, came.append, came.clear)
    assert gathered.present == (0, 1)
    assert sum(map(len, came)) == gathered.rows.sums.requests == gathered.reduced.sums.requests == 2
    check_reduced(gathered.reduced, gathered.rows)


def test_ranks_that_are_known_to_be_gone_are_left_out_before_anything_is_gathered() -> None:
    collectives = Dying(contributions([metrics_of(1, [1.0])]), deaths=0)
    collect(collectives, [], 10.0, reduced=True)
    assert collectives.calls[:2] == ["shrunk", "sum"]


def test_when_another_rank_did_not_get_through_nobody_takes_what_it_has() -> None:
    class Apart(Dying):
        def agree(self, well: bool) -> bool:
            assert well
            return "shrunk" in self.calls

    came: list[Any] = []
    gathered = collect(Apart(contributions([metrics_of(1, [1.0])]), deaths=0), [], 10.0, came.append, came.clear)
    assert gathered.present == (0, 1)
    assert sum(map(len, came)) == 1


def test_ranks_that_die_again_and_again_end_it() -> None:
    with pytest.raises(RankLostError, match="in each of 5 attempts"):
        collect(Dying(contributions([metrics_of(1, [1.0])]), deaths=9), [], 10.0)


def test_a_rank_that_says_nothing_is_not_waited_for_again() -> None:
    class Silent(FakeCollectives):
        def sum(self, values: Any) -> Any:
            raise RankLostError("a collective did not end within 70 s")

        def agree(self, well: bool) -> bool:
            raise AssertionError("this would wait for it once more")

    with pytest.raises(RankLostError, match="70 s"):
        collect(Silent([]), [], 10.0)
