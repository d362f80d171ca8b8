"""Choosing against a slow, obvious reference: 64 bits, full sorts, filters one after the other on the distribution."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import workers.choosing as choosing
import workers.parameters as parameters
from scheduling.requests import Sampling
from workers.choosing import choose, largest
from workers.groups import drawn_group_tokens
from workers.parameters import Parameters
from workers.sampling import NOT_FINITE, RowSampler
from workers.threads import ALONE, Threads

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NO_HISTORY = np.empty(0, np.int32)
ROUNDING = 1e-5


def choose_all(
    logits: Floats,
    samplings: list[Sampling],
    seeds: list[int],
    steps: list[int],
    *,
    rows: npt.NDArray[np.int64] | None = None,
    threads: Threads = ALONE,
) -> list[int]:
    samplers = [RowSampler(sampling, seed, 0, logits.shape[1]) for sampling, seed in zip(samplings, seeds, strict=True)]
    places = np.arange(len(samplings)) if rows is None else rows
    chosen = choose(logits.copy(), places, Parameters(samplers, steps, logits.shape[1]), lambda _: NO_HISTORY, threads)
    return [int(token) for token in chosen]


def choose_one(row: Floats, sampling: Sampling, seed: int = 1, step: int = 0) -> int:
    return choose_all(row[None], [sampling], [seed], [step])[0]


# ------------------------------------------------ the reference


def probabilities(logits: Doubles) -> Doubles:
    weights = np.exp(logits - logits.max())
    p: Doubles = weights / weights.sum()
    return p


def kept_by_filters(row: Floats, s: Sampling, top_p: float) -> npt.NDArray[np.int64]:
    """Tokens that the filters leave, largest first."""
    logits = row.astype(np.float64)
    ids = np.lexsort((np.arange(row.size), -logits))
    if s.top_k > 0:
        ids = ids[: s.top_k]
    ids = ids[logits[ids] > -np.inf]
    if s.typical_p < 1.0:
        p = probabilities(logits[ids])
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        with np.errstate(divide="ignore"):
            order = np.argsort(np.abs(-np.log(p) - entropy), kind="stable")
        count = int((np.cumsum(p[order]) <= s.typical_p).sum()) + 1
        ids = ids[np.sort(order[:count])]
    if top_p < 1.0:
        ids = ids[: int((np.cumsum(probabilities(logits[ids])) < top_p).sum()) + 1]
    if s.min_p > 0.0:
        p = probabilities(logits[ids])
        ids = ids[p >= s.min_p * p[0]]
    return ids


def drawn_by_group(row: Floats, s: Sampling, number: float, within: float) -> set[int]:
    """What the two numbers may draw from all tokens."""
    p = probabilities(row.astype(np.float64) / s.temperature)
    size = drawn_group_tokens(row.size)
    groups = [np.arange(first, min(first + size, row.size)) for first in range(0, row.size, size)]
    edges = np.cumsum([p[group].sum() for group in groups])
    found: set[int] = set()
    for x in (-ROUNDING, 0.0, ROUNDING):
        group = groups[min(int((edges <= number + x).sum()), len(groups) - 1)]
        if p[group].sum() > 0:
            inner = np.cumsum(p[group]) / p[group].sum()
            found.update(int(group[min(int((inner <= within + y).sum()), group.size - 1)]) for y in (-1e-9, 0, 1e-9))
    return found


def allowed(row: Floats, s: Sampling, number: float, within: float) -> set[int]:
    """What `number` may draw, if sums may be off by rounding."""
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        return {NOT_FINITE}
    if s.temperature == 0.0:
        return {best}
    if not 0 < s.top_k < row.size and s.top_p >= 1.0 and s.min_p <= 0.0 and s.typical_p >= 1.0:
        return drawn_by_group(row, s, number, within)
    found = set()
    off = (-ROUNDING, 0.0, ROUNDING)
    for top_p in {min(1.0, max(0.0, s.top_p + x)) for x in off} if s.top_p < 1.0 else {1.0}:
        ids = kept_by_filters(row, s, top_p)
        edges = np.cumsum(probabilities(row[ids].astype(np.float64) / s.temperature))
        for x in off:
            found.add(int(ids[min(int((edges <= number + x).sum()), ids.size - 1)]))
    return found


# ------------------------------------------------ random steps


@dataclass
class Step:
    logits: Floats
    samplings: list[Sampling]
    seeds: list[int]
    steps: list[int]

    def choose(self) -> list[int]:
        return choose_all(self.logits, self.samplings, self.seeds, self.steps)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 5, 40, 700]),
    top_p=st.sampled_from([1.0, 0.99999, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.3]),
)


def numbers_of(sampling: Sampling, seed: int, step: int) -> tuple[float, float]:
    """The numbers that a row draws with."""
    one = Parameters([RowSampler(sampling, seed, 0, 1)], [step], 1)
    return float(one.number[0]), float(one.within[0])


def random_row(rng: np.random.Generator, kind: str, size: int) -> Floats:
    row = rng.standard_normal(size) * {"peaked": 8.0, "flat": 0.01}.get(kind, 2.0)
    if kind == "ties":
        row = np.round(row)
    if kind == "holes":
        row[rng.random(size) < 0.7] = -np.inf
        row[rng.integers(size)] = 1.0
    if kind == "nan":
        row[rng.integers(size)] = np.nan
    if kind == "inf":
        row[rng.integers(size)] = np.inf
    if kind == "nothing":
        row[:] = -np.inf
    return row.astype(np.float32)


kinds = st.sampled_from(["peaked", "peaked", "usual", "usual", "flat", "ties", "holes", "nan", "inf", "nothing"])


@st.composite
def random_steps(draw: st.DrawFn) -> Step:
    size = draw(st.sampled_from([1, 2, 17, 255, 256, 257, 1000, 1536, 3001]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.lists(st.tuples(kinds, samplings), min_size=1, max_size=7))
    count = len(rows)
    return Step(
        np.array([random_row(rng, kind, size) for kind, _ in rows]),
        [sampling for _, sampling in rows],
        rng.integers(0, 2**63, count).tolist(),
        rng.integers(0, 1000, count).tolist(),
    )


@pytest.mark.slow
@given(random_steps())
def test_mixed_rows_get_what_the_reference_draws(step: Step) -> None:
    for place, token in enumerate(step.choose()):
        numbers = numbers_of(step.samplings[place], step.seeds[place], step.steps[place])
        assert token in allowed(step.logits[place], step.samplings[place], *numbers), (place, step.samplings[place])


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.mark.slow
@given(step=random_steps(), count=st.integers(2, 5), gaps=st.randoms(use_true_random=False))
def test_a_token_depends_on_its_row_alone(
    step: Step, count: int, gaps: random.Random, pool: ThreadPoolExecutor
) -> None:
    expected = step.choose()
    alone = [
        choose_one(row, sampling, seed, number)
        for row, sampling, seed, number in zip(step.logits, step.samplings, step.seeds, step.steps, strict=True)
    ]
    assert alone == expected
    rows = np.cumsum([gaps.randint(1, 2) for _ in expected])
    logits = np.full((int(rows[-1]) + 2, step.logits.shape[1]), np.nan, np.float32)
    logits[rows] = step.logits
    threads = Threads(pool, count)
    assert choose_all(logits, step.samplings, step.seeds, step.steps, rows=rows, threads=threads) == expected


@pytest.mark.slow
@given(random_steps())
def test_shortcuts_give_what_the_long_way_gives(step: Step) -> None:
    expected = step.choose()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "FEW_COLUMNS", -1)
        assert step.choose() == expected
        patch.setattr(choosing, "COLUMNS_MIN", 7)
        assert step.choose() == expected
        patch.setattr(choosing, "CROWD_TOKENS", 3)
        assert step.choose() == expected
        patch.setattr(choosing, "CROWD_COLUMNS", 0)
        assert step.choose() == expected


@pytest.mark.slow
@given(random_steps())
def test_a_greedy_row_is_the_same_beside_others_as_in_a_greedy_step(step: Step) -> None:
    step.samplings = [Sampling(temperature=0.0)] * len(step.seeds)
    assert largest(step.logits, np.arange(len(step.seeds))).tolist() == step.choose()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peaked", "usual", "flat"])
def test_a_large_vocabulary_that_no_strip_divides(kind: str) -> None:
    rng = np.random.default_rng(3)
    logits = np.array([random_row(rng, kind, 40_009) for _ in range(6)])
    wanted = [
        Sampling(temperature=0.8, top_p=0.95), Sampling(temperature=0.8, top_p=0.95, min_p=0.05),
        Sampling(temperature=0.8), Sampling(top_k=40, top_p=0.9), Sampling(top_k=5000), Sampling(min_p=0.3),
    ]  # fmt: skip
    for seed in range(10):
        tokens = choose_all(logits, wanted, [seed] * 6, [5] * 6)
        for row, sampling, token in zip(logits, wanted, tokens, strict=True):
            assert token in allowed(row, sampling, *numbers_of(sampling, seed, 5)), sampling


# ------------------------------------------------ frequencies and edges


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=0.7), 5),
        (Sampling(temperature=0.7, top_k=4), 4),
        (Sampling(temperature=0.7, min_p=0.03), 4),
        (Sampling(temperature=0.7, top_p=0.97), 4),
        (Sampling(temperature=0.7, top_p=0.95, min_p=0.01), 3),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, kept: int) -> None:
    row = np.full(300, -np.inf, np.float32)
    tokens = np.array([7, 299, 0, 12, 256])
    row[tokens] = [2.0, 1.0, 0.0, -1.0, -3.0]
    count = 4_000
    logits = np.repeat(row[None], 200, axis=0)
    drawn = [
        token
        for first in range(0, count, 200)
        for token in choose_all(logits, [sampling] * 200, [42] * 200, list(range(first, first + 200)))
    ]
    counts = np.bincount(drawn, minlength=row.size)[tokens]
    weights = np.exp(row[tokens[:kept]].astype(np.float64) / 0.7)
    expected = weights / weights.sum() * count
    assert counts.sum() == count
    assert counts[kept:].sum() == 0
    chi_square = float(((counts[:kept] - expected) ** 2 / expected).sum())
    assert chi_square < {3: 13.82, 4: 16.27, 5: 18.47}[kept]  # p = 0.001


def test_a_draw_from_all_never_falls_on_what_weighs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.full(521, -np.inf, np.float32)
    row[3] = row[4] = 0.0
    for sampling in (Sampling(), Sampling(top_k=300), Sampling(min_p=1e-6)):
        for number, token in ((0.0, 3), (0.5, 4), (1.0 - 2**-53, 4)):
            monkeypatch.setattr(parameters, "uniforms", lambda keys, _, number=number: np.full(keys.size, number))
            assert choose_one(row, sampling) == token


@pytest.mark.parametrize("size", [296, 20_000])
def test_a_draw_at_the_end_of_all_is_the_last_that_weighs_anything(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(parameters, "uniforms", lambda keys, _: np.full(keys.size, 1.0 - 2**-53))
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((50, size)).astype(np.float32)
    logits[:, -5:] = -np.inf
    tokens = choose_all(logits, [Sampling()] * 50, [0] * 50, [0] * 50)
    assert set(tokens) == {size - 6}


@pytest.mark.parametrize("size", [300, 20_000])
def test_of_equal_logits_the_smaller_tokens_are_kept(size: int) -> None:
    logits = np.zeros((200, size), np.float32)
    logits[:, ::6] = 2.0
    logits[:, 1::6] = 1.0
    largest_ones = range(0, size, 6)
    tokens = choose_all(logits, [Sampling(top_k=len(largest_ones) + 10)] * 200, list(range(200)), [0] * 200)
    assert set(tokens) <= {*largest_ones, *range(1, 61, 6)}
    tokens = choose_all(logits, [Sampling(top_k=15)] * 200, list(range(200)), [0] * 200)
    assert set(tokens) == set(range(0, 90, 6))


def test_a_low_temperature_leaves_the_largest() -> None:
    row = np.array([0.0, 3.0, 2.9, 1.0], np.float32)
    for sampling in (Sampling(temperature=1e-5), Sampling(temperature=1e-5, top_k=3)):
        assert choose_one(row, sampling) == 1


# ------------------------------------------------ bias and penalties


def adjusted(row: list[float], history: list[int], **sampling: object) -> tuple[int, list[float]]:
    """The greedy token, and the row as it became."""
    logits = np.array([row], np.float32)
    sampler = RowSampler(Sampling(temperature=0.0, **sampling), 1, 0, len(row))  # type: ignore[arg-type]
    tokens = choose(
        logits,
        np.zeros(1, np.int64),
        Parameters([sampler], [0], logits.shape[1]),
        lambda _: np.array(history, np.int32),
    )
    return int(tokens[0]), logits[0].tolist()


def test_bias_and_penalties_come_before_the_choice() -> None:
    token, row = adjusted(
        [1.0, 4.0, -1.0, 0.5],
        [1, 1, 2],
        repeat_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        logit_bias={3: 1},
    )
    assert token == 3
    assert row == [1.0, 4.0 / 2 - 2 * 0.25 - 0.5, -1.0 * 2 - 0.25 - 0.5, 1.5]


@pytest.mark.parametrize(
    ("last_n", "expected"),
    [(1, [9.0, 9.0, 8.0]), (2, [9.0, 8.0, 8.0]), (0, [9.0, 9.0, 9.0]), (100, [8.0, 8.0, 8.0])],
)
def test_penalties_look_at_the_last_tokens_only(last_n: int, expected: list[float]) -> None:
    assert adjusted([9.0, 9.0, 9.0], [0, 1, 2], presence_penalty=1.0, repeat_last_n=last_n)[1] == expected


def test_bias_is_clipped_to_a_hundred() -> None:
    assert adjusted([0.0, 150.0], [], logit_bias={0: 1e9})[0] == 1


def test_each_row_has_its_own_bias_penalties_and_history() -> None:
    logits = np.zeros((3, 5), np.float32)
    wanted = [
        Sampling(temperature=0.0, logit_bias={1: 2.0}),
        Sampling(temperature=0.0, presence_penalty=-1.0),
        Sampling(temperature=0.0, frequency_penalty=-1.0, repeat_last_n=2),
    ]
    samplers = [RowSampler(sampling, 1, 0, 5) for sampling in wanted]
    histories = [np.array(tokens, np.int32) for tokens in ([4], [2, 3], [4, 4, 4, 1, 3])]
    assert choose(
        logits, np.arange(3), Parameters(samplers, [0] * 3, logits.shape[1]), histories.__getitem__
    ).tolist() == [1, 2, 1]
    assert logits.tolist() == [[0, 2, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]


def test_silenced_tokens_stay_silent_under_bias_and_penalties() -> None:
    _, row = adjusted([-np.inf, 1.0], [0, 1], repeat_penalty=0.1, presence_penalty=-2.0, logit_bias={0: 100})
    assert row[0] == -np.inf
