from __future__ import annotations

import pytest

from scheduling.errors import RequestError
from scheduling.requests import Message, Request, Sampling
from workers.chat import ChatTemplate
from workers.prompts import PromptReader


def tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    text, control = text.replace("<|end|>", ""), text.count("<|end|>")
    return [1] * add_special + list(text.encode()) + ([2] if parse_special else list(b"<|end|>")) * control


def reader(bos: int = 1, ctx_tokens: int = 10) -> PromptReader:
    template = ChatTemplate("{{ messages[0].content }}")
    return PromptReader(
        template,
        tokenize,
        vocab_tokens=256,
        piece_bytes_max=4,
        bos=bos,
        ctx_tokens=ctx_tokens,
        max_tokens_default=5,
    )


def completion(prompt: str | tuple[int, ...]) -> Request:
    return Request(custom_id="a", kind="completion", prompt=prompt)


def test_text_gets_what_the_model_puts_before_a_text() -> None:
    assert reader().tokens(completion("ab")).tolist() == [1, 97, 98]


def test_control_text_of_a_plain_prompt_stays_text() -> None:
    assert reader().tokens(completion("<|end|>")).tolist() == [1, *b"<|end|>"]


def test_token_ids_are_taken_as_they_are() -> None:
    assert reader().tokens(completion((9, 255))).tolist() == [9, 255]


def test_a_chat_goes_through_the_template() -> None:
    request = Request(custom_id="a", kind="chat", messages=(Message("user", "hi"),))
    assert reader().tokens(request).tolist() == [104, 105]


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_that_the_vocabulary_lacks_is_refused(token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token} is not in the vocabulary"):
        reader().tokens(completion((3, token)))
    with pytest.raises(RequestError, match="logit_bias"):
        reader().check_sampling(Sampling(logit_bias={token: 1.0}))


def test_a_prompt_that_leaves_no_room_says_what_fits_and_which_flag_helps() -> None:
    assert reader().tokens(completion((7,) * 9)).size == 9
    with pytest.raises(RequestError, match=r"has 10 tokens, and at most 9 fit.*--ctx 11"):
        reader().tokens(completion((7,) * 10))


def test_a_text_that_cannot_fit_is_not_even_tokenised() -> None:
    with pytest.raises(RequestError, match=r"41 bytes.*at most 40.*--ctx"):
        reader().tokens(completion("x" * 41))
    with pytest.raises(RequestError, match="41 bytes"):
        reader().tokens(Request(custom_id="a", kind="chat", messages=(Message("user", "x" * 41),)))


def test_an_empty_prompt_is_the_beginning_of_a_text_if_the_model_has_one() -> None:
    assert reader().tokens(completion(())).tolist() == [1]
    with pytest.raises(RequestError, match="no tokens"):
        reader(bos=-1).tokens(completion(()))


@pytest.mark.parametrize(("asked", "expected"), [(None, 5), (3, 3), (100, 6), (0, 0)])
def test_output_is_limited_by_the_request_the_default_and_the_slot(asked: int | None, expected: int) -> None:
    assert reader().limit(Sampling(max_tokens=asked), 4) == expected
