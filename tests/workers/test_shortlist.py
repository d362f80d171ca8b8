"""Choosing from a shortlist against choosing from all logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduling.requests import Sampling
from workers.choosing import choose
from workers.groups import group_tokens
from workers.parameters import Parameters
from workers.sampling import NOT_FINITE, RowSampler
from workers.shortlist import GROUPS, Shortlist, Sums

TOKENS = 13
VOCAB = TOKENS * 257
"""Primes: so `group_tokens` cuts it, too."""
EOG = np.array([7, 1000])


def listed(logits: np.ndarray, groups: int, at: float = 1.0, ends: np.ndarray = EOG) -> Shortlist:
    """What the device gives, made with numpy."""
    rows, every = len(logits), np.arange(len(logits))[:, None]
    logits = logits.copy()
    by_group = logits.reshape(rows, -1, TOKENS)
    peaks = by_group.max(axis=2)
    order = np.argsort(-peaks, axis=1, kind="stable")[:, :groups]
    room = np.full_like(logits, 1e9)
    room[:, : groups * TOKENS] = by_group[every, order].reshape(rows, -1)
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1).astype(np.float64)
    weights = np.exp((logits - top[:, None]) * np.float32(1.0 / at)).reshape(rows, -1, TOKENS).sum(axis=2)
    sums = Sums(at, weights, logits[:, ends], lambda row, group: by_group[row, group])
    return Shortlist(order.astype(np.int32), peaks[every, order], room, TOKENS, top, total, sums)


filters = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 3.0),
        "top_k": st.sampled_from([0, 0, 1, 5, 40, 64, 500]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.05]),
        "min_p": st.sampled_from([0.0, 0.05, 0.3]),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(filters, min_size=1, max_size=6),
    st.sampled_from([0.0, 1.0, 8.0, 30.0]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_what_is_decided_is_what_all_logits_say(
    given_filters: list[dict[str, float]], scale: float, seed: int, ends: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(10, len(given_filters), replace=False))
    logits = (rng.standard_normal((10, VOCAB)) * scale).astype(np.float32)
    if ends:
        logits[:, 7] = logits.max(axis=1) + 1
    samplers = [RowSampler(Sampling(**one), int(rng.integers(1 << 60)), 0, VOCAB) for one in given_filters]  # type: ignore[arg-type]
    some = [place for place, sampler in enumerate(samplers) if sampler.listable]
    assume(some)
    rows, samplers = rows[some], [samplers[place] for place in some]
    steps = rng.integers(0, 1000, rows.size)
    short = listed(logits, GROUPS, max(sampler.whole_at for sampler in samplers) or 1.0)
    silenced = np.full(rows.size, ends)
    tokens, undecided = short.choose(rows, Parameters(samplers, steps, VOCAB), silenced, EOG)
    if ends:
        logits[:, EOG] = -np.inf
    expected = choose(logits, rows, Parameters(samplers, steps, VOCAB), lambda place: np.empty(0, np.int32))
    assert (tokens[~undecided] == expected[~undecided]).all()
    for place in np.flatnonzero(undecided):
        _, top_p, log_min_p, _, top_k = samplers[place].numbers
        # Never where few tokens weigh nearly all there is.
        assert ends or not 0 < top_k <= GROUPS
        assert ends or scale < 30.0 or top_k > GROUPS or (top_p == 1.0 and log_min_p == -np.inf)


@settings(max_examples=60, deadline=None)
@given(filters, st.integers(0, 2**32), st.floats(0.0, 60.0))
def test_an_end_of_a_listed_group_does_not_come_however_likely_it_is(
    one: dict[str, float], seed: int, below: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((2, VOCAB)) * 8).astype(np.float32)
    logits[:, 7 + 1] = logits.max(axis=1) + 1
    logits[:, 7] = logits[:, 8] - below
    sampler = RowSampler(Sampling(**one), int(rng.integers(1 << 60)), 0, VOCAB)  # type: ignore[arg-type]
    assume(sampler.listable)
    rows, parameters = np.arange(2), Parameters([sampler, sampler], [3, 4], VOCAB)
    # One row may end: it is as if the other were not there.
    short = listed(logits, GROUPS, sampler.whole_at or 1.0, EOG[:1])
    tokens, undecided = short.choose(rows, parameters, np.array([True, False]), EOG[:1])
    logits[0, 7] = -np.inf
    expected = choose(logits, rows, parameters, lambda place: np.empty(0, np.int32))
    assert (tokens[~undecided] == expected[~undecided]).all()


@pytest.mark.parametrize("silenced", [False, True])
@pytest.mark.parametrize("cut", [3, 10, 25])
def test_a_cut_that_hangs_on_what_is_not_listed_is_left_open(cut: int, silenced: bool) -> None:
    """The end weighs something and is in no listed group: with it and without it, top_p keeps another number."""
    rng = np.random.default_rng(cut)
    logits = rng.uniform(-8.0, -6.0, (1, VOCAB)).astype(np.float32)
    logits[0, rng.permutation(VOCAB)[:200]] = rng.uniform(-0.5, 0.0, 200)
    by_group = np.argsort(-logits.reshape(-1, TOKENS).max(axis=1))
    end = int(by_group[GROUPS + 5]) * TOKENS
    logits[0, end] = logits.reshape(-1, TOKENS)[by_group[GROUPS - 1]].max() - 1e-3
    ordered = np.sort(np.exp(logits[0].astype(np.float64) - float(logits.max())))[::-1]
    total, mass = ordered.sum(), np.cumsum(ordered)[cut]
    without = total - float(np.exp(logits[0, end] - logits.max()))
    sampler = RowSampler(Sampling(temperature=1.0, top_p=float(2 * mass / (total + without))), 3, 0, VOCAB)
    one = np.arange(1)
    found = listed(logits, GROUPS).choose(
        one, Parameters([sampler], one, VOCAB), np.array([silenced]), np.array([end])
    )  # fmt: skip
    assert found[1].tolist() == [silenced]


@pytest.mark.parametrize(
    ("sampling", "decided"),
    [
        (Sampling(temperature=0.8, top_p=0.95, min_p=0.05), True),
        (Sampling(temperature=0.8, top_k=40), True),
        (Sampling(temperature=0.8, top_p=0.9), True),
        (Sampling(temperature=1.0), True),
        (Sampling(temperature=0.7), True),
        (Sampling(temperature=1.6), True),
        (Sampling(temperature=0.8, min_p=1e-30), False),
        (Sampling(temperature=0.8, top_k=3000), False),
    ],
)
def test_the_usual_filters_are_decided_where_logits_are_a_models(sampling: Sampling, decided: bool) -> None:
    logits = (np.random.default_rng(1).standard_normal((50, VOCAB)) * 8).astype(np.float32)
    samplers = [RowSampler(sampling, seed, 0, VOCAB) for seed in range(50)]
    assert all(sampler.listable for sampler in samplers)
    every = np.arange(50)
    short = listed(logits, GROUPS, samplers[0].whole_at or 1.0)
    _, undecided = short.choose(every, Parameters(samplers, every, VOCAB), np.zeros(50, np.bool_), EOG)
    assert undecided.mean() < 0.1 if decided else undecided.all()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=0.8, top_k=40, typical_p=0.9),
        Sampling(temperature=0.8, top_k=40, repeat_penalty=1.1),
        Sampling(temperature=0.8, top_k=40, logit_bias={5: 1.0}),
    ],
)
def test_what_needs_all_logits_is_not_chosen_from_a_list(sampling: Sampling) -> None:
    assert not RowSampler(sampling, 0, 0, VOCAB).listable


def test_a_row_without_a_finite_logit_is_damaged() -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    sampler = RowSampler(Sampling(temperature=1.0, top_k=5), 0, 0, VOCAB)
    with np.errstate(all="ignore"):
        short = listed(logits, GROUPS)
    tokens, undecided = short.choose(np.array([0]), Parameters([sampler], [0], VOCAB), np.array([False]), EOG)
    assert (tokens.tolist(), undecided.tolist()) == ([NOT_FINITE], [False])


@pytest.mark.parametrize(
    "vocab", [32_000, 32_064, 49_152, 50_257, 100_352, 128_256, 151_936, 152_064, 200_064, 256_000, 262_144]
)
def test_vocabularies_are_cut_into_equal_groups(vocab: int) -> None:
    tokens = group_tokens(vocab)
    assert vocab % tokens == 0
    assert GROUPS < vocab // tokens <= 4096
    assert vocab // tokens <= 1024 or vocab in (50_257, 151_936)
    # A list is a small part of the whole.
    assert tokens * GROUPS < vocab / 3


@pytest.mark.parametrize("vocab", [97, 50_261, 1])
def test_a_vocabulary_that_cannot_be_cut_has_no_lists(vocab: int) -> None:
    assert group_tokens(vocab) == 0
