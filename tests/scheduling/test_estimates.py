"""Estimates of output lengths: they start from the prior, follow what is observed, and stay sane."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.estimates import PRIOR_OUTPUT_SHARE, LengthEstimator

counts = st.integers(1, 10_000)


def test_before_any_answer_the_prior_holds() -> None:
    estimator = LengthEstimator(100)
    assert estimator.output_tokens(None) == pytest.approx(100 * PRIOR_OUTPUT_SHARE)
    assert estimator.output_tokens(10) == pytest.approx(10 * PRIOR_OUTPUT_SHARE)


def test_one_answer_moves_it_a_little_and_many_move_it_all_the_way() -> None:
    estimator = LengthEstimator(100)
    before = estimator.output_tokens(100)
    estimator.observe(100, 10)
    after_one = estimator.output_tokens(100)
    assert before * 0.85 < after_one < before
    for _ in range(5_000):
        estimator.observe(100, 10)
    assert estimator.output_tokens(100) == pytest.approx(10, rel=0.02)


def test_a_request_without_a_limit_counts_with_the_runs_default() -> None:
    one, other = LengthEstimator(64), LengthEstimator(64)
    one.observe(None, 7)
    other.observe(64, 7)
    assert one.output_tokens(None) == other.output_tokens(64)


def test_several_choices_may_exceed_the_limit() -> None:
    estimator = LengthEstimator(10)
    for _ in range(1_000):
        estimator.observe(10, 40)
    assert estimator.output_tokens(10) == pytest.approx(40, rel=0.05)


@settings(max_examples=40)
@given(counts, st.lists(st.tuples(counts, st.integers(0, 10_000))), st.integers(0, 10**6))
def test_an_estimate_is_at_least_one_token_and_within_what_was_seen(
    default: int, seen: list[tuple[int, int]], limit: int
) -> None:
    estimator = LengthEstimator(default)
    for observed_limit, output in seen:
        estimator.observe(observed_limit, output)
    shares = [PRIOR_OUTPUT_SHARE, *(output / observed_limit for observed_limit, output in seen)]
    estimate = estimator.output_tokens(limit)
    assert 1.0 <= estimate <= max(1.0, limit * max(shares) * (1 + 1e-9))
    assert estimate >= limit * min(shares) * (1 - 1e-9)
