"""From a request for embeddings to tokens, and what is refused before native code sees it."""

from __future__ import annotations

import pytest

from scheduling.errors import RequestError
from scheduling.requests import Request
from workers.inputs import TEXT_BYTES_MIN, InputReader


def tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    """A letter is a token, a space is none; 1 stands before a text that has any. A text is never parsed."""
    assert not parse_special
    letters = [ord(letter) for letter in text if letter != " "]
    return [1] * (add_special and bool(letters)) + letters


def reader(tokens_max: int = 6, train_ctx_tokens: int = 6) -> InputReader:
    return InputReader(
        tokenize,
        vocab_tokens=256,
        piece_bytes_max=4,
        tokens_max=tokens_max,
        train_ctx_tokens=train_ctx_tokens,
        dimensions=8,
    )


def request(*inputs: str | tuple[int, ...], dimensions: int | None = None) -> Request:
    return Request(custom_id="a", kind="embedding", inputs=inputs, dimensions=dimensions)


def test_inputs_stand_one_after_the_other_and_token_ids_are_taken_as_they_are() -> None:
    tokens, starts = reader().read(request("ab", (9, 255), "c"))
    assert tokens.tolist() == [1, 97, 98, 9, 255, 1, 99]
    assert starts.tolist() == [0, 3, 5, 7]


def test_as_many_tokens_as_the_model_can_take_are_taken() -> None:
    assert reader().read(request("abcde", (7,) * 6))[1].tolist() == [0, 6, 12]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request("a", "abcdef"), r"input\[1\] has 7 tokens, more than the 6 that this model can take; cut it"),
        (request((7,) * 7), r"input\[0\] has 7 tokens"),
        (request("a", " "), r"input\[1\] has no tokens"),
        (request("a", (256,)), r"input\[1\]: token 256 is not in the vocabulary \(0 to 255\)"),
        (request(" " * (TEXT_BYTES_MIN + 1)), "bytes, more than"),
        (request("a", dimensions=9), "dimensions is 9, and this model's embeddings have 8"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_the_place(asked: Request, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        reader().read(asked)


def test_a_limit_that_the_run_has_set_is_told_apart_from_the_models() -> None:
    with pytest.raises(RequestError, match=r"the 6 that --ctx allows; this model can take up to 512"):
        reader(train_ctx_tokens=512).read(request("abcdef"))
