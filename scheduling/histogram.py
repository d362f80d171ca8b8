"""Log-bucket histograms that ranks can add together.

Bucket k holds values in [MIN_S * 2**(k/32), MIN_S * 2**((k+1)/32)), so a percentile read from merged counts is
within 1.1 % of the true value wherever it lies between 1 microsecond and a day and a half. Percentiles of a
whole job always come from the merged counts: percentiles of ranks cannot be averaged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MIN_S = 1e-6
BUCKETS_PER_OCTAVE = 32
OCTAVES = 37
BUCKETS = BUCKETS_PER_OCTAVE * OCTAVES
"""Number of buckets: 1,184. Smaller values fall into the first, larger ones into the last."""


def bucket_of(values_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Bucket numbers of `values_s` (any shape), clipped to [0, BUCKETS)."""
    positive = np.maximum(values_s, MIN_S)
    return np.clip((np.log2(positive / MIN_S) * BUCKETS_PER_OCTAVE).astype(np.int64), 0, BUCKETS - 1)


def edges_s() -> npt.NDArray[np.float64]:
    """The BUCKETS + 1 edges between buckets, in seconds."""
    edges: npt.NDArray[np.float64] = MIN_S * 2.0 ** (np.arange(BUCKETS + 1) / BUCKETS_PER_OCTAVE)
    return edges


class LogHistogram:
    """Counts per bucket, exact count and sum. Adding two histograms is adding their arrays."""

    __slots__ = ("counts", "sum_s")

    def __init__(self, counts: npt.NDArray[np.int64] | None = None, sum_s: float = 0.0) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BUCKETS, np.int64) if counts is None else counts
        self.sum_s = sum_s

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def add(self, values_s: npt.NDArray[np.float64]) -> None:
        """Count each of `values_s` (1-D, seconds)."""
        if values_s.size:
            self.counts += np.bincount(bucket_of(values_s), minlength=BUCKETS)
            self.sum_s += float(values_s.sum())

    def add_sparse(self, buckets: list[int], counts: list[int]) -> None:
        """Add counts given as pairs of lists, as `Stats` frames carry them. The sum is not known then."""
        if buckets:
            np.add.at(self.counts, np.asarray(buckets), np.asarray(counts))

    def percentile(self, q: float) -> float:
        """The value in seconds below which a share `q` (0 to 1) of the counts lies; NaN if there are none.

        The geometric middle of the bucket in which the ceil(q * count)-th smallest value lies.
        """
        total = self.count
        if total == 0:
            return float("nan")
        place = max(1, int(np.ceil(q * total)))
        bucket = int(np.searchsorted(np.cumsum(self.counts), place))
        return float(MIN_S * 2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))
