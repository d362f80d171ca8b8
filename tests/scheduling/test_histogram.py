"""Log-bucket histograms: percentiles of merged counts are those of the merged values, to within a bucket."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scheduling.histogram import BUCKETS, BUCKETS_PER_OCTAVE, MIN_S, LogHistogram, bucket_of, edges_s

TOLERANCE = 2.0 ** (0.5 / BUCKETS_PER_OCTAVE) - 1 + 1e-9
times = hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(1e-5, 1e5))


def of(values: np.ndarray) -> LogHistogram:
    histogram = LogHistogram()
    histogram.add(values)
    return histogram


def test_every_bucket_holds_its_lower_edge_and_not_its_upper_one() -> None:
    edges = edges_s()
    assert edges.shape == (BUCKETS + 1,)
    middles = np.sqrt(edges[:-1] * edges[1:])
    assert (bucket_of(middles) == np.arange(BUCKETS)).all()
    assert (bucket_of(edges[:-1] * (1 + 1e-9)) == np.arange(BUCKETS)).all()
    assert (bucket_of(edges[1:-1] * (1 - 1e-9)) == np.arange(BUCKETS - 1)).all()


def test_what_does_not_fit_goes_to_the_ends() -> None:
    assert bucket_of(np.array([0.0, -1.0, MIN_S / 2, 1e12])).tolist() == [0, 0, 0, BUCKETS - 1]


def test_the_range_reaches_a_day_and_a_half() -> None:
    assert edges_s()[-1] > 1.5 * 86_400


def test_an_empty_histogram_has_no_percentile() -> None:
    assert math.isnan(LogHistogram().percentile(0.5))
    assert of(np.array([])).count == 0


@settings(max_examples=40)
@given(times, st.floats(0.0, 1.0))
def test_a_percentile_is_the_ranked_value_to_within_half_a_bucket(values: np.ndarray, q: float) -> None:
    exact = np.sort(values)[max(1, math.ceil(q * len(values))) - 1]
    assert of(values).percentile(q) == pytest.approx(exact, rel=TOLERANCE)


@settings(max_examples=40)
@given(times, times)
def test_merged_counts_are_the_counts_of_everything(one: np.ndarray, other: np.ndarray) -> None:
    together = of(np.concatenate([one, other]))
    first, second = of(one), of(other)
    merged = LogHistogram(first.counts + second.counts, first.sum_s + second.sum_s)
    assert (merged.counts == together.counts).all()
    assert merged.sum_s == pytest.approx(together.sum_s)
    assert merged.count == len(one) + len(other)
    assert merged.percentile(0.99) == together.percentile(0.99)


def test_sparse_counts_add_up_also_when_a_bucket_comes_twice() -> None:
    histogram = LogHistogram()
    histogram.add_sparse([3, 5, 3], [1, 2, 4])
    histogram.add_sparse([], [])
    assert histogram.counts[[3, 4, 5]].tolist() == [5, 0, 2]
    assert histogram.count == 7
