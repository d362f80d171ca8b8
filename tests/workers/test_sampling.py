"""Sampling against a slow, obvious reference: Python lists, full sorts, probabilities made anew at each filter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.requests import Sampling
from workers.sampling import NOT_FINITE, RowSampler, draw, draw_from_all, stream_key, uniform

NONE = np.empty(0, np.int64)
NO_HISTORY = np.empty(0, np.int32)


def sampler(sampling: Sampling, seed: int = 1, choice: int = 0, vocab: int = 1000) -> RowSampler:
    return RowSampler(sampling, seed, choice, NONE, vocab)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / sum(weights) for weight in weights]


def reference_kept(row: list[float], s: Sampling) -> list[int]:
    """Token ids that the filters leave."""
    ids = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if s.top_k > 0:
        ids = ids[: s.top_k]
    if s.typical_p < 1.0:
        p = softmax([row[token] for token in ids])
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        order = sorted(range(len(ids)), key=lambda place: abs(-math.log(p[place]) - entropy))
        total, kept = 0.0, []
        for place in order:
            kept.append(place)
            total += p[place]
            if total > s.typical_p:
                break
        ids = [ids[place] for place in sorted(kept)]
    if s.top_p < 1.0:
        p = softmax([row[token] for token in ids])
        total, count = 0.0, 0
        for x in p:
            count += 1
            total += x
            if total >= s.top_p:
                break
        ids = ids[:count]
    if s.min_p > 0.0:
        p = softmax([row[token] for token in ids])
        ids = [token for token, x in zip(ids, p, strict=True) if x >= s.min_p * p[0]]
    return ids


filters = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
)


@given(filters, st.integers(0, 2**32), st.sampled_from([0.5, 3.0, 8.0]), st.integers(1, 300))
def test_filters_keep_what_the_reference_keeps(s: Sampling, seed: int, scale: float, size: int) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    ids, logits = sampler(s)._candidates(row, float(row.max()))
    kept = list(range(size)) if ids is None else ids.tolist()
    assert sorted(kept) == sorted(reference_kept(row.tolist(), s))
    assert np.array_equal(logits, row[kept])


@given(filters, st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_a_draw_depends_on_seed_step_and_logits_alone(s: Sampling, seed: int, step: int) -> None:
    row = (np.random.default_rng(seed).standard_normal(200) * 4).astype(np.float32)
    first = sampler(s, seed).choose(row.copy(), NO_HISTORY, step)
    other = sampler(s, seed)
    other.choose(row[::-1].copy(), NO_HISTORY, 7)
    assert other.choose(row.copy(), NO_HISTORY, step) == first


def test_draws_follow_the_distribution() -> None:
    row = np.array([2.0, 1.0, 0.0, -1.0, -9.0, -np.inf], np.float32)
    s = Sampling(temperature=0.7)
    one = sampler(s, seed=42)
    count = 20_000
    counts = np.bincount([one.choose(row.copy(), NO_HISTORY, step) for step in range(count)], minlength=6)
    weights = np.exp(row.astype(np.float64) / 0.7)
    expected = weights / weights.sum() * count
    assert counts[5] == 0
    chi_square = float(((counts[:4] - expected[:4]) ** 2 / expected[:4]).sum())
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_choices_and_seeds_have_numbers_of_their_own() -> None:
    numbers = {
        uniform(stream_key(seed, choice), step) for seed in range(20) for choice in range(5) for step in range(20)
    }
    assert len(numbers) == 2000
    assert 0.45 < sum(numbers) / 2000 < 0.55
    assert all(0.0 <= number < 1.0 for number in numbers)


@pytest.mark.parametrize("temperature", [0.0, 1e-300])
def test_temperature_zero_is_the_largest_logit(temperature: float) -> None:
    row = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    s = sampler(Sampling(temperature=temperature))
    assert s.plain
    assert s.choose(row, NO_HISTORY, 0) == 1


def test_bias_and_penalties_come_before_the_choice() -> None:
    history = np.array([1, 1, 2], np.int32)
    row = np.array([1.0, 4.0, -1.0, 0.5], np.float32)
    s = sampler(
        Sampling(temperature=0.0, repeat_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, logit_bias={3: 1})
    )
    assert not s.plain
    assert s.choose(row, history, 0) == 3
    assert row.tolist() == [1.0, 4.0 / 2 - 2 * 0.25 - 0.5, -1.0 * 2 - 0.25 - 0.5, 1.5]


def test_penalties_look_at_the_last_tokens_only() -> None:
    history = np.array([0, 1, 2], np.int32)
    for last_n, expected in (
        (1, [9.0, 9.0, 8.0]),
        (2, [9.0, 8.0, 8.0]),
        (0, [9.0, 9.0, 9.0]),
        (-1, [8.0, 8.0, 8.0]),
    ):
        row = np.full(3, 9.0, np.float32)
        sampler(Sampling(temperature=0.0, presence_penalty=1.0, repeat_last_n=last_n)).choose(row, history, 0)
        assert row.tolist() == expected


def test_bias_is_clipped_to_a_hundred() -> None:
    row = np.array([0.0, 150.0], np.float32)
    assert sampler(Sampling(temperature=0.0, logit_bias={0: 1e9})).choose(row, NO_HISTORY, 0) == 1


def test_banned_tokens_are_never_chosen() -> None:
    s = RowSampler(Sampling(temperature=2.0), 1, 0, np.array([1, 2]), 4)
    for step in range(200):
        assert s.choose(np.array([0, 9, 9, 0], np.float32), NO_HISTORY, step) in (0, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_row_is_noticed(value: float, temperature: float) -> None:
    row = np.array([0.0, value, 1.0], np.float32)
    assert sampler(Sampling(temperature=temperature)).choose(row, NO_HISTORY, 0) == NOT_FINITE
    nothing = np.full(3, -np.inf, np.float32)
    assert sampler(Sampling(temperature=temperature)).choose(nothing, NO_HISTORY, 0) == NOT_FINITE


@given(st.integers(0, 2**32), st.integers(1, 2000), st.floats(0.0, 1.0, exclude_max=True))
def test_a_draw_from_all_falls_where_the_slow_sum_does(seed: int, size: int, number: float) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)
    row[:: 1 + seed % 7] = -np.inf
    row[size // 2] = 1.0
    token = draw_from_all(row, float(row.max()), 0.8, number)
    weights = np.exp((row.astype(np.float64) - row.max()) / 0.8)
    edges = np.cumsum(weights) / weights.sum()
    assert weights[token] > 0
    assert edges[token] - weights[token] / weights.sum() - 1e-5 <= number <= edges[token] + 1e-5


def test_a_draw_at_the_edge_falls_on_the_last_place() -> None:
    row = np.full(600, -np.inf, np.float32)
    row[3] = row[4] = 0.0
    assert draw_from_all(row, 0.0, 1.0, 1.0 - 2**-53) == 4
    assert draw_from_all(row, 0.0, 1.0, 0.0) == 3
    assert draw(np.array([1.0, 1.0]), 1.0 - 2**-53) == 1
    assert draw(np.array([1.0, 1.0]), 0.5) == 1
    assert draw(np.array([1.0, 1.0]), 0.0) == 0
