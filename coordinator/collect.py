"""The end of a session: every rank's counters, histograms and rows come together at rank 0 by collectives.

All ranks take part with whatever they have; a rank that hosts several workers, or none, contributes that many. Sums
are over everything the workers counted, the answers that rank 0 dropped as late included. If ranks die meanwhile and
MPI lets the others go on, these begin again among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scheduling.errors import RankFailedError, RankLostError
from scheduling.histogram import BUCKETS, LogHistogram
from scheduling.tables import RANK, REQUEST, TELEMETRY
from storage.summary import LATENCIES, Summary, Sums
from workers.metrics import HISTOGRAMS, RankMetrics

Rows = npt.NDArray[Any]

ATTEMPTS_MAX = 5
"""How often ranks may die while the others gather."""
COLLECTIVE_PATIENCE_S = 600.0
"""How long a rank waits in one collective for the others before it takes them for lost."""


class Blocks:
    """Rows that lie in several arrays of one type, as one long array of which only slices are ever made."""

    def __init__(self, dtype: np.dtype[Any], blocks: Sequence[Rows]) -> None:
        self.dtype = dtype
        self._blocks = blocks
        self._ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> Rows:
        start, stop, _ = part.indices(len(self))
        found = [np.zeros(0, self.dtype)]
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            block = self._blocks[place]
            first = start - int(self._ends[place] - len(block))
            found.append(block[first : first + stop - start])
            start += len(found[-1])
            place += 1
        return np.concatenate(found)


class Collecting(Protocol):
    """Those of `coordinator.mpi_collectives`: over MPI, or of a process that is alone.

    `ranks`: who takes part, by their numbers in the world. All but `agree` and `shrink` raise RankFailedError if a rank
    has died.
    """

    rank: int
    size: int

    @property
    def ranks(self) -> Collection[int]: ...

    def sum(self, values: Rows) -> Rows: ...
    def minimum(self, values: Rows) -> Rows: ...
    def maximum(self, values: Rows) -> Rows: ...
    def gather_rows(self, rows: Rows | Blocks, take: Callable[[Rows], None]) -> None: ...

    def agree(self, well: bool) -> bool:
        """Whether all got through, the same on every rank. Called by each, whatever came of the others."""

    def shrink(self) -> None:
        """From here on only the ranks that live take part. Raises RankLostError if rank 0 does not."""


@dataclass(slots=True)
class Gathered:
    """What rank 0 has afterwards.

    reduced: sums, extremes and histograms over all ranks, as their workers counted them. itl: gaps between tokens.
    rows: the same of the rows that came, of which none is kept. telemetry: what no interval has brought.
    present: the ranks that took part.
    """

    reduced: Summary
    itl: LogHistogram
    present: Collection[int]
    rows: Summary = field(default_factory=Summary)
    ranks: list[Rows] = field(default_factory=list)
    telemetry: list[Rows] = field(default_factory=list)


def collect(
    collectives: Collecting,
    hosted: list[RankMetrics],
    now: float,
    take: Callable[[Rows], None] = lambda rows: None,
    begin: Callable[[], None] = lambda: None,
    *,
    reduced: bool = False,
) -> Gathered:
    """Take part with the metrics of the workers that this rank hosts. The result is meaningful on rank 0.

    `take` is given every chunk of request rows on rank 0, `begin` is called before the first, and again if all begin
    again. `reduced`: some ranks are known to be gone. Takes memory for one chunk, whatever the number of rows.

    Raises:
        RankLostError: a rank is gone, and the others cannot go on without it.
    """
    if reduced:
        collectives.shrink()
    for _ in range(ATTEMPTS_MAX):
        gathered, failure = None, None
        begin()
        try:
            gathered = _gather(collectives, hosted, now, take)
        except RankFailedError as error:
            failure = error
        if collectives.agree(failure is None) and gathered is not None:
            return gathered
        collectives.shrink()
    raise RankLostError(f"ranks died in each of {ATTEMPTS_MAX} attempts to gather the metrics")


def _gather(collectives: Collecting, hosted: list[RankMetrics], now: float, take: Callable[[Rows], None]) -> Gathered:
    requests = Blocks(REQUEST, [block for metrics in hosted for block in metrics.requests.blocks()])
    counts = np.zeros(len(fields(Sums)), np.int64)
    histograms = np.zeros((len(HISTOGRAMS), BUCKETS), np.int64)
    for metrics in hosted:
        counts += (
            metrics.finished, metrics.failed, metrics.prompt_tokens, metrics.cached_tokens, metrics.output_tokens,
        )  # fmt: skip
        histograms += metrics.histograms()
    extremes_s = [metrics.extremes_s() for metrics in hosted]
    shortest = np.array([min((shortest_s for shortest_s, _ in extremes_s), default=np.inf)])
    longest = np.array([max((longest_s for _, longest_s in extremes_s), default=-np.inf)])

    sums = Sums(*collectives.sum(counts).tolist())
    merged = {name: LogHistogram(counts) for name, counts in zip(HISTOGRAMS, collectives.sum(histograms), strict=True)}
    [shortest_s], [longest_s] = collectives.minimum(shortest), collectives.maximum(longest)
    gathered = Gathered(
        Summary(
            sums,
            float(shortest_s) if np.isfinite(shortest_s) else math.nan,
            float(longest_s) if np.isfinite(longest_s) else math.nan,
            {name: merged[name.removesuffix("_s")] for name in LATENCIES},
        ),
        merged["itl"],
        tuple(collectives.ranks),
    )

    def count(rows: Rows) -> None:
        gathered.rows.add(rows)
        take(rows)

    collectives.gather_rows(requests, count)
    collectives.gather_rows(_joined([metrics.rank_row(now) for metrics in hosted], RANK), gathered.ranks.append)
    collectives.gather_rows(_joined([m.telemetry.rows() for m in hosted], TELEMETRY), gathered.telemetry.append)
    return gathered


def _joined(parts: list[Rows], dtype: np.dtype[Any]) -> Rows:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
