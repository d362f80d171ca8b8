"""How long requests are, before a tokenizer has seen them."""

from __future__ import annotations

import pytest

from scheduling.lengths import LengthScan, prompt_tokens, text_tokens
from scheduling.requests import Message, Request, Sampling


def completion(prompt: str | tuple[int, ...], max_tokens: int | None = None, n: int = 1) -> Request:
    return Request(custom_id="x", kind="completion", prompt=prompt, sampling=Sampling(max_tokens=max_tokens, n=n))


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        # What SmolLM2's tokenizer makes of it, and half as much again.
        ("The quick brown fox jumps over the lazy dog. It was not amused, and said so at once.", 19, 32),
        ("3.14159265358979 2.71828182845905 1.41421356237310", 48, 60),
        ("def add(a, b):\n    return a + b\n", 13, 24),
        ("Fußgängerübergänge überqueren größere Straßen", 13, 30),
        ("", 0, 0),
    ],
)
def test_a_text_has_about_so_many_tokens_and_rather_fewer(text: str, least: int, most: int) -> None:
    assert least <= text_tokens(text.encode()) <= most


def test_tokens_that_are_given_are_counted_exactly() -> None:
    assert prompt_tokens(completion(tuple(range(300)))) == (300, 300)


def test_no_prompt_has_more_tokens_than_bytes() -> None:
    chat = Request(custom_id="x", kind="chat", messages=(Message("user", "é" * 100), Message("user", "1 2 3")))
    for request in (completion("日本語のテキスト"), completion("a b c d"), chat):
        likely, most = prompt_tokens(request)
        assert likely <= most


def test_output_limits_and_choices_count() -> None:
    scan = LengthScan(max_tokens_default=100)
    scan.add(completion((1,) * 156))  # 256 with the default
    scan.add(completion((1,) * 157, n=3))
    scan.add(completion((1,) * 10, max_tokens=1000))
    found = scan.found(whole=True)
    assert found is not None
    assert (found.sequences, dict(found.counts), found.longest_tokens) == (5, {1: 1, 2: 3, 4: 1}, 1010)
    assert (found.tokens_of(0.2), found.tokens_of(0.8), found.tokens_of(1.0)) == (256, 512, 1024)
    assert found.without(3).sequences == 2
    assert found.without(30).sequences == 1


def test_continuations_are_as_long_as_the_longest_and_generate_nothing() -> None:
    scan = LengthScan(max_tokens_default=5000)
    scan.add(Request(custom_id="x", kind="completion", prompt=(1,) * 100, continuations=((2,), (3,) * 500, " a")))
    found = scan.found(whole=True)
    assert found is not None
    assert (found.sequences, dict(found.counts), found.longest_tokens, found.scores) == (1, {3: 1}, 600, True)
    assert found.without(0).scores
    scan = LengthScan(100)
    scan.add(completion((1,) * 10))
    generates = scan.found(whole=True)
    assert generates is not None
    assert not generates.scores


def test_nothing_read_is_nothing_known() -> None:
    assert LengthScan(1).found(whole=True) is None


def test_requests_for_embeddings_take_no_slots() -> None:
    scan = LengthScan(100)
    scan.add(Request(custom_id="x", kind="embedding", inputs=("a text",)))
    scan.add(Request(custom_id="y", kind="embedding", inputs=((1,) * 900, (1,))))
    assert scan.found(whole=True) is None
    scan.add(completion((1,) * 156))
    found = scan.found(whole=True)
    assert found is not None
    assert (found.sequences, found.longest_tokens, found.input_tokens) == (1, 256, 900)


def test_a_line_of_text_is_a_prompt() -> None:
    scan = LengthScan(100)
    scan.add_text(b"word " * 50)
    found = scan.found(whole=False)
    assert found is not None
    assert (found.sequences, found.longest_tokens, found.whole) == (1, 351, False)
