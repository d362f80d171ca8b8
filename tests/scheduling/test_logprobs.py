"""Packed log-probabilities in the shapes of OpenAI's answers."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from scheduling.logprobs import NEVER, TokenLogprobs, chat_logprobs, completion_logprobs, name_of, score


def packed(
    texts: list[bytes],
    logprobs: list[float],
    *,
    tokens: list[int] | None = None,
    top: list[list[tuple[int, float]]] | None = None,
    names: tuple[int, ...] = (),
) -> TokenLogprobs:
    """Tokens 0, 1, … of `texts` unless `tokens` says otherwise; `top` has (token, logprob) for each place."""
    tops = top or [[] for _ in logprobs]
    flat = [pair for places in tops for pair in places]
    known = [value for value in logprobs if value == value]
    return TokenLogprobs(
        texts,
        list(names),
        np.array(range(len(texts)) if tokens is None else tokens, np.int32).tobytes(),
        np.array(logprobs, np.float32).tobytes(),
        len(tops[0]) if tops else 0,
        np.array([token for token, _ in flat], np.int32).tobytes(),
        np.array([value for _, value in flat], np.float32).tobytes(),
        float(sum(known)),
        True,
    )


def test_a_chat_has_an_entry_for_each_token_with_its_bytes_and_alternatives() -> None:
    shape = chat_logprobs(
        packed(
            [b"Par", b"is", b"<|im_end|>"], [-0.5, -0.25, 0.0], top=[[(0, -0.5)], [(1, -0.25)], [(2, 0.0)]], names=(2,)
        )
    )
    assert json.loads(msgspec.json.encode(shape)) == {
        "content": [
            {
                "token": "Par", "logprob": -0.5, "bytes": [80, 97, 114],
                "top_logprobs": [{"token": "Par", "logprob": -0.5, "bytes": [80, 97, 114]}],
            },
            {
                "token": "is", "logprob": -0.25, "bytes": [105, 115],
                "top_logprobs": [{"token": "is", "logprob": -0.25, "bytes": [105, 115]}],
            },
            {
                "token": "<|im_end|>", "logprob": 0.0, "bytes": None,
                "top_logprobs": [{"token": "<|im_end|>", "logprob": 0.0, "bytes": None}],
            },
        ],
        "refusal": None,
    }  # fmt: skip


def test_a_completion_has_parallel_lists_whose_first_is_null_for_a_prompt() -> None:
    shape = completion_logprobs(
        packed([b"Hel", b"lo", b"!"], [float("nan"), -1.5, -2.0], top=[[(0, 0.0)], [(1, -1.5)], [(0, -0.125)]])
    )
    assert json.loads(msgspec.json.encode(shape)) == {
        "tokens": ["Hel", "lo", "!"],
        "token_logprobs": [None, -1.5, -2.0],
        "top_logprobs": [None, {"lo": -1.5}, {"Hel": -0.125, "!": -2.0}],
        "text_offset": [0, 3, 5],
    }


def test_without_alternatives_there_is_no_list_of_them() -> None:
    assert completion_logprobs(packed([b"a"], [-1.0])).top_logprobs is None


def test_a_token_that_is_the_likeliest_has_exactly_the_value_of_the_likeliest() -> None:
    """By that lm-evaluation-harness finds whether a continuation is greedy."""
    value = float(np.float32(-0.123456789))
    shape = completion_logprobs(packed([b"a"], [value], top=[[(0, value)]]))
    assert shape.top_logprobs is not None
    assert shape.top_logprobs[0] is not None
    assert shape.token_logprobs[0] == max(shape.top_logprobs[0].values())


def test_of_tokens_that_are_written_alike_the_likelier_is_kept() -> None:
    shape = completion_logprobs(packed([b"A", b"A"], [-3.0], tokens=[1], top=[[(0, -0.5), (1, -3.0)]]))
    assert shape.top_logprobs == [{"A": -0.5}]
    assert shape.token_logprobs == [-3.0]


def test_pieces_of_characters_are_written_as_bytes_and_offsets_count_whole_characters() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    shape = completion_logprobs(packed([b"a", first, second, b"b"], [-1.0] * 4))
    assert shape.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert shape.text_offset == [0, 1, 1, 2]
    assert name_of("<s>") == "<s>"


def test_names_are_no_part_of_the_text() -> None:
    shape = completion_logprobs(packed([b"<s>", b"a", b"b"], [float("nan"), -1.0, -1.0], names=(0,)))
    assert (shape.tokens, shape.text_offset) == (["<s>", "a", "b"], [0, 0, 1])


def test_minus_infinity_is_a_number_and_a_certain_token_has_no_minus() -> None:
    shape = completion_logprobs(packed([b"a", b"b"], [float("-inf"), -1e-9]))
    assert shape.token_logprobs == [NEVER, 0.0]
    assert "-0.0" not in msgspec.json.encode(shape).decode()


@pytest.mark.parametrize(("values", "total"), [([-0.5, -0.25], -0.75), ([float("nan"), -1.0], -1.0)])
def test_a_score_is_the_sum(values: list[float], total: float) -> None:
    assert score(packed([b"a", b"b"], values)).logprob == total
