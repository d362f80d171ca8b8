"""What a worker measures of itself, an interval each: samples of its GPUs and processes, counters for rank 0.

Samples are kept until rank 0 has been told of them. What it is told are sums since the session's start, so that a job
that is killed has lost no more than an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from scheduling.messages import Counters
from workers.metrics import RankMetrics

TELEMETRY_ROWS_MAX = 4096
"""Rows of telemetry that a worker keeps: rank 0 gets them earlier than after an interval then."""

Sampler = Callable[[], list[tuple[Any, ...]]]
"""Each call gives rows of scheduling.tables.TELEMETRY without t_s, rank and session, one for each GPU."""


class Gauges:
    """Of one worker. Nothing is measured before its first engine has loaded, and no sample taken without one."""

    def __init__(self, metrics: RankMetrics, telemetry_interval_s: float, metrics_interval_s: float) -> None:
        self._metrics = metrics
        self._telemetry_interval_s = telemetry_interval_s
        self._metrics_interval_s = metrics_interval_s
        self._sample: Sampler | None = None
        self._sample_at = 0.0
        self._counters_at = math.inf

    def engine_loaded(self, sample: Sampler | None, now: float) -> None:
        self._counters_at = min(self._counters_at, now + self._metrics_interval_s)
        if sample is not None:
            self._sample, self._sample_at = sample, now

    def engine_gone(self) -> None:
        self._sample = None

    def take(self, now: float, born: float) -> None:
        """Take a sample, if one is due. Its time is told in seconds since `born`."""
        if self._sample is None or now < self._sample_at:
            return
        self._sample_at = now + self._telemetry_interval_s
        rank, session = self._metrics.rank, self._metrics.session
        for row in self._sample():
            self._metrics.telemetry.append((now - born, rank, session, *row))

    def counters(self, now: float) -> Counters | None:
        """What rank 0 is to be told, if that is due; samples are forgotten with it."""
        metrics = self._metrics
        if now < self._counters_at and len(metrics.telemetry) < TELEMETRY_ROWS_MAX:
            return None
        self._counters_at = now + self._metrics_interval_s
        buckets = np.flatnonzero(metrics.itl.counts)
        told = Counters(
            row=metrics.rank_row(now).tobytes(), itl_buckets=buckets.tolist(),
            itl_counts=metrics.itl.counts[buckets].tolist(), telemetry=metrics.telemetry.rows().tobytes(),
        )  # fmt: skip
        metrics.telemetry.clear()
        return told
