"""The end of a session: every rank's counters, histograms and rows come together at rank 0 by collectives.

All ranks of the world take part with whatever they have; a rank that hosts several workers, or none, contributes that
many. Sums are over everything the workers counted, the answers that rank 0 dropped as late included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scheduling.histogram import BUCKETS, LogHistogram
from scheduling.tables import RANK, REQUEST, TELEMETRY
from storage.summary import LATENCIES, Summary, Sums
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

    reduced: sums, extremes and histograms over all ranks, as their workers counted them. itl: gaps between tokens.
    """

    reduced: Summary
    itl: LogHistogram
    ranks_in: int
    requests: list[Rows] = field(default_factory=list)
    ranks: list[Rows] = field(default_factory=list)
    telemetry: list[Rows] = field(default_factory=list)


def collect(collectives: Collecting, hosted: list[RankMetrics], now: float) -> Gathered:
    """Take part with the metrics of the workers that this rank hosts. The result is meaningful on rank 0."""
    requests = _joined([metrics.requests.rows() for metrics in hosted], REQUEST)
    counts = np.zeros(len(fields(Sums)), np.int64)
    histograms = np.zeros((len(HISTOGRAMS), BUCKETS), np.int64)
    for metrics in hosted:
        counts += (
            metrics.finished, metrics.failed, metrics.prompt_tokens, metrics.cached_tokens, metrics.output_tokens,
        )  # fmt: skip
        histograms += metrics.histograms()
    ended_well = requests["e2e_s"][requests["ok"] == 1]
    shortest = np.array([ended_well.min() if ended_well.size else np.inf])
    longest = np.array([ended_well.max() if ended_well.size else -np.inf])

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
        collectives.size,
    )
    collectives.gather_rows(requests, gathered.requests.append)
    collectives.gather_rows(_joined([metrics.rank_row(now) for metrics in hosted], RANK), gathered.ranks.append)
    collectives.gather_rows(_joined([m.telemetry.rows() for m in hosted], TELEMETRY), gathered.telemetry.append)
    return gathered


def _joined(parts: list[Rows], dtype: np.dtype[Any]) -> Rows:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
