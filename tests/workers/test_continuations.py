from __future__ import annotations

import pytest

from scheduling.errors import RequestError
from scheduling.requests import Request
from workers.continuations import BOUNDARY_CHARACTERS, ContinuationReader

Given = str | tuple[int, ...]
WORDS = ("Answer:", " yes", " ", "yes", "(", "A", "(A", "x")


def tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    """The longest word that fits, again and again; no other characters are known."""
    assert not add_special
    assert not parse_special
    ids = []
    while text:
        word = max((word for word in WORDS if text.startswith(word)), key=len)
        ids.append(WORDS.index(word))
        text = text[len(word) :]
    return ids


def spaced(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    """A tokenizer that puts a space before a text."""
    return tokenize(" " + text, add_special=add_special, parse_special=parse_special)


def reader(tokenizer: object = tokenize, ctx_tokens: int = 1000) -> ContinuationReader:
    return ContinuationReader(
        tokenizer,  # type: ignore[arg-type]
        lambda token: WORDS[token].encode(),
        vocab_tokens=len(WORDS),
        piece_bytes_max=7,
        ctx_tokens=ctx_tokens,
    )


def words(prompt: Given, *continuations: Given, tokenizer: object = tokenize) -> list[str]:
    request = Request(custom_id="a", kind="completion", prompt=prompt, continuations=continuations)
    return ["|".join(WORDS[token] for token in tokens) for tokens in reader(tokenizer).tokens(request, 5)]


def refused(prompt: Given, *continuations: Given, tokenizer: object = tokenize) -> str:
    with pytest.raises(RequestError) as caught:
        words(prompt, *continuations, tokenizer=tokenizer)
    assert caught.value.param == "continuations[0]"
    return str(caught.value)


def test_a_continuation_is_tokenised_where_it_stands() -> None:
    assert words("Answer:", " yes", "yes") == [" yes", "yes"]
    assert words("Answer: (", "x", " yes(A") == ["x", " yes|(A"]


def test_what_would_join_the_prompt_is_tokenised_by_itself() -> None:
    assert words("Answer: ", "yes") == ["yes"]
    assert words("Answer: (", "Ax") == ["A|x"]


def test_a_space_that_the_tokenizer_puts_before_a_text_does_not_get_between() -> None:
    assert words("Answer:", " yes", "yes", tokenizer=spaced) == [" yes", "yes"]
    # Where it cannot be avoided the continuation would be another one.
    assert "cannot be told apart" in refused("Answer: (", "A", tokenizer=spaced)
    assert "cannot be told apart" in refused((1, 2), "yes", tokenizer=spaced)


def test_token_ids_are_taken_as_they_are_and_must_be_in_the_vocabulary() -> None:
    assert words((0, 2), (3, 4), "yes") == ["yes|(", "yes"]
    assert words("Answer:", (3,)) == ["yes"]
    assert "token 8 is not in the vocabulary (0 to 7)" in refused("x", (8,))


def test_a_long_prompt_is_not_tokenised_again_for_each() -> None:
    seen = []

    def watching(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        seen.append(len(text))
        return tokenize(text, add_special=add_special, parse_special=parse_special)

    assert words("x" * 100_000, " yes", "yes", tokenizer=watching) == [" yes", "yes"]
    assert max(seen) <= BOUNDARY_CHARACTERS + 4


def test_what_does_not_fit_says_what_would() -> None:
    request = Request(custom_id="a", kind="completion", prompt=(1,), continuations=((3,) * 6,))
    assert len(reader(ctx_tokens=11).tokens(request, 5)[0]) == 6
    with pytest.raises(RequestError, match=r"6 tokens after 5 of the prompt.*use --ctx 11"):
        reader(ctx_tokens=10).tokens(request, 5)
    with pytest.raises(RequestError, match="bytes, which is more than"):
        reader(ctx_tokens=10).tokens(Request(custom_id="a", kind="completion", continuations=("x" * 71,)), 5)


def test_a_request_without_continuations_has_none() -> None:
    assert reader().tokens(Request(custom_id="a", kind="completion", prompt="not known"), 5) == []
