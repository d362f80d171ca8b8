from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.engine_fakes import vocabulary
from workers.logprobs import Asker, Look, Noted, likely
from workers.sampling import NOT_FINITE, Floats
from workers.threads import Threads


def log_softmax(logits: Floats) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """In 64 bits throughout."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("vocab", [64, 1_000, 49_152, 128_256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 200.0])
def test_log_probabilities_equal_those_of_64_bits(vocab: int, scale: float) -> None:
    logits = (np.random.default_rng(1).standard_normal((5, vocab)) * scale + 30).astype(np.float32)
    wanted = log_softmax(logits)
    found = likely(logits, np.array([0, 2, 4]), 20)
    assert np.abs(found.of(logits, [1, 2, 3]) - wanted[[0, 2, 4], [1, 2, 3]]).max() < 1e-6
    order = np.argsort(-logits, axis=1, kind="stable")[[0, 2, 4], :20]
    assert (found.ids == order).all()
    assert (found.best == order[:, 0]).all()
    assert np.allclose(found.logprobs, np.take_along_axis(wanted[[0, 2, 4]], order, axis=1), rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=300), st.integers(0, 20))
def test_the_likeliest_are_found_among_ties_smaller_tokens_first(values: list[int], k: int) -> None:
    row = np.array([values], np.float32)
    wanted = np.argsort(-row[0], kind="stable")[: min(k, len(values))]
    assert likely(row, np.arange(1), k).ids[0].tolist() == wanted.tolist()


def test_the_likeliest_token_chosen_has_exactly_the_value_of_the_alternative() -> None:
    logits = np.random.default_rng(2).standard_normal((50, 500)).astype(np.float32)
    found = likely(logits, np.arange(50), 1)
    assert (found.of(logits, found.best).astype(np.float32) == found.logprobs[:, 0]).all()


def test_tokens_that_are_ruled_out_have_no_share_and_damaged_rows_are_told() -> None:
    logits = np.zeros((4, 10), np.float32)
    logits[0, 5:] = -np.inf
    logits[1, 3] = np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    found = likely(logits, np.arange(4), 3)
    assert found.damaged.tolist() == [False, True, True, True]
    assert found.of(logits, [0, 6], [0, 0]).tolist() == [pytest.approx(-np.log(5)), -np.inf]


def test_many_threads_find_what_one_does() -> None:
    logits = np.random.default_rng(3).standard_normal((40, 700)).astype(np.float32)
    one = likely(logits, np.arange(40), 4)
    many = likely(logits, np.arange(40), 4, Threads(ThreadPoolExecutor(3), 3))
    assert (one.log_sum == many.log_sum).all()
    assert (one.ids == many.ids).all()


def test_a_look_is_at_the_rows_as_they_were() -> None:
    logits = np.random.default_rng(4).standard_normal((3, 50)).astype(np.float32)
    wanted = log_softmax(logits)
    first, third = Noted(5, 2), Noted(5, 0)
    look = Look(logits, np.array([0, 1, 2]), [Asker(0, first, 3), Asker(2, third, 0)])
    logits[:] = 0
    look.note(np.array([7, 8, NOT_FINITE], np.int32))
    assert first.logprob[3] == pytest.approx(wanted[0, 7], abs=1e-6)
    assert np.isnan(third.logprob).all()


def test_what_is_known_is_packed_with_each_token_named_once() -> None:
    logits = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float32)
    found = likely(logits, np.arange(3), 2)
    noted = Noted(4, 2)
    tokens = np.array([40, 41, 40, 40], np.int32)
    noted.put(1, found.of(logits, tokens[1:]), found, slice(0, 3))
    packed = noted.pack(tokens, vocabulary().pieces)
    assert sorted(packed.texts) == sorted(set(packed.texts))
    assert {b"i", b"j"} <= set(packed.texts)
    assert packed.total == pytest.approx(log_softmax(logits)[[0, 1, 2], tokens[1:]].sum(), abs=1e-5)
    assert (packed.alternatives, packed.names) == (2, [])
