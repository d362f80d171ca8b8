"""The end of a session: every rank's counters, histograms and rows come together at rank 0 by collectives.

All ranks of the world take part with whatever they have; a rank that hosts several workers, or none, contributes that
many. Sums are over everything the workers counted, so rank 0 subtracts what it dropped as late before comparing them
with the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scheduling.histogram import BUCKETS, LogHistogram
from scheduling.tables import RANK, REQUEST, TELEMETRY
from workers.metrics import HISTOGRAMS, RankMetrics

Rows = npt.NDArray[Any]


class Collecting(Protocol):
    """`coordinator.mpi.Collectives`, or the one for a process that is alone."""

    rank: int
    size: int

    def sum(self, values: Rows) -> Rows: ...
    def minimum(self, values: Rows) -> Rows: ...
    def maximum(self, values: Rows) -> Rows: ...
    def gather_rows(self, rows: Rows, take: Callable[[Rows], None]) -> None: ...


@dataclass(slots=True)
class Gathered:
    """What rank 0 has afterwards.

    counters: requests, failed, prompt tokens, output tokens over all ranks, int64 (4,). extremes: smallest and largest
    end-to-end time in seconds, (2,), NaN without requests.
    """

    counters: npt.NDArray[np.int64]
    histograms: dict[str, LogHistogram]
    extremes_s: npt.NDArray[np.float64]
    ranks_in: int
    requests: list[Rows] = field(default_factory=list)
    ranks: list[Rows] = field(default_factory=list)
    telemetry: list[Rows] = field(default_factory=list)


def collect(collectives: Collecting, hosted: list[RankMetrics], now: float) -> Gathered:
    """Take part with the metrics of the workers that this rank hosts. The result is meaningful on rank 0."""
    requests = _joined([metrics.requests.rows() for metrics in hosted], REQUEST)
    counts = np.zeros(4, np.int64)
    histograms = np.zeros((len(HISTOGRAMS), BUCKETS), np.int64)
    for metrics in hosted:
        counts += (metrics.finished, metrics.failed, metrics.prompt_tokens, metrics.output_tokens)
        histograms += metrics.histograms()
    ended_well = requests["e2e_s"][requests["ok"] == 1]
    shortest = np.array([ended_well.min() if ended_well.size else np.inf])
    longest = np.array([ended_well.max() if ended_well.size else -np.inf])

    counters = collectives.sum(counts)
    merged = collectives.sum(histograms)
    extremes = np.concatenate([collectives.minimum(shortest), collectives.maximum(longest)])
    extremes[~np.isfinite(extremes)] = np.nan
    gathered = Gathered(
        counters,
        {name: LogHistogram(merged[k]) for k, name in enumerate(HISTOGRAMS)},
        extremes,
        collectives.size,
    )
    collectives.gather_rows(requests, gathered.requests.append)
    collectives.gather_rows(_joined([metrics.rank_row(now) for metrics in hosted], RANK), gathered.ranks.append)
    collectives.gather_rows(_joined([m.telemetry.rows() for m in hosted], TELEMETRY), gathered.telemetry.append)
    return gathered


def _joined(parts: list[Rows], dtype: np.dtype[Any]) -> Rows:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
