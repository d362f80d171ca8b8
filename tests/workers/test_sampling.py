"""Random numbers, penalties, and what a row needs. Choosing itself is in `test_choosing.py`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.requests import Sampling
from workers.sampling import RowSampler, penalise, stream_key, typical, uniforms

MASK = 2**64 - 1


def split_mix(key: int, step: int) -> float:
    """Number `step` of SplitMix64 from state `key`, in Python's integers."""
    z = (key + (step + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 2**31)), min_size=1, max_size=9))
def test_numbers_in_arrays_are_those_of_the_plain_generator(pairs: list[tuple[int, int]]) -> None:
    keys, steps = zip(*pairs, strict=True)
    numbers = uniforms(np.array(keys, np.uint64), np.array(steps))
    assert numbers.tolist() == [split_mix(key, step) for key, step in pairs]


def test_choices_and_seeds_have_numbers_of_their_own() -> None:
    keys = [stream_key(seed, choice) for seed in range(20) for choice in range(5)]
    numbers = uniforms(np.repeat(np.array(keys, np.uint64), 20), np.tile(np.arange(20), 100))
    assert np.unique(numbers).size == 2000
    assert 0.45 < numbers.mean() < 0.55
    assert ((numbers >= 0.0) & (numbers < 1.0)).all()


@pytest.mark.parametrize(
    ("sampling", "plain"),
    [
        (Sampling(temperature=0.0), True),
        (Sampling(temperature=1e-300, top_p=0.5), True),
        (Sampling(temperature=0.0, ignore_eos=True), True),
        (Sampling(temperature=0.0, logit_bias={9: 1.0}), True),
        (Sampling(temperature=0.0, logit_bias={3: 1.0}), False),
        (Sampling(temperature=0.0, presence_penalty=1.0), False),
        (Sampling(temperature=0.0, presence_penalty=1.0, repeat_last_n=0), True),
        (Sampling(temperature=0.5), False),
    ],
)
def test_only_argmax_over_the_untouched_row_is_plain(sampling: Sampling, plain: bool) -> None:
    assert RowSampler(sampling, 1, 0, 9).plain == plain


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_penalties_of_many_rows_are_those_of_each_row(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count + 2, 30)).astype(np.float32)
    rows = np.sort(rng.permutation(count + 2)[:count])
    recent = [rng.integers(0, 30, rng.integers(0, 40)).astype(np.int32) for _ in range(count)]
    penalties = np.column_stack([rng.uniform(0.5, 2, count), rng.normal(size=count), rng.normal(size=count)])
    expected = logits.astype(np.float64)
    for row, tokens, (repeat, frequency, presence) in zip(rows, recent, penalties, strict=True):
        for token in set(tokens.tolist()):
            value = expected[row, token]
            value = value * repeat if value <= 0 else value / repeat
            expected[row, token] = value - tokens.tolist().count(token) * frequency - presence
    penalise(logits, rows, recent, penalties)
    assert np.allclose(logits, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32), st.integers(1, 200), st.sampled_from([0.9, 0.5, 0.01]))
def test_typical_keeps_the_least_surprising_surprises(seed: int, size: int, share: float) -> None:
    logits = -np.sort(-np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)
    kept = typical(logits, share)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
    dropped = np.setdiff1d(np.arange(size), kept)
    assert (np.diff(kept) > 0).all()
    assert p[kept].sum() > share - 1e-9
    assert p[kept].sum() - p[kept[np.argmax(distance[kept])]] <= share + 1e-9
    assert not dropped.size or distance[dropped].min() >= distance[kept].max() - 1e-9
