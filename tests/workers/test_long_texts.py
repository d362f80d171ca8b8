"""Texts that llama.cpp takes long to tokenise, or dies of: each fails its request at most, and nobody waits for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from scheduling.errors import RequestError
from scheduling.requests import Message, Request
from tests.workers.test_engine import Session, chat, config
from workers.longtexts import LONG_CHARACTERS, LongTexts, longest_text
from workers.protocol import EngineConfig

pytestmark = [pytest.mark.slow, pytest.mark.system]

DEEP = "a" * 600_000
"""One word. The regular expressions of many vocabularies recurse for each of its letters."""


def other_rules(model: Path, target: Path, rules: bytes) -> Path:
    """A copy of `model` whose texts are cut into words by other rules, whose name is as long."""
    key = b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, len(rules))
    data = model.read_bytes()
    assert data.count(key + b"smollm") == 1
    target.write_bytes(data.replace(key + b"smollm", key + rules))
    return target


@pytest.fixture(scope="module")
def recursive_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with rules that llama.cpp has no code of its own for."""
    return other_rules(tiny_model, tmp_path_factory.mktemp("model") / "gpt-4o.gguf", b"gpt-4o")


@pytest.fixture(scope="module")
def long_texts(recursive_model: Path) -> Iterator[LongTexts]:
    one = LongTexts(str(recursive_model))
    yield one
    one.close()


def engine(model: Path) -> EngineConfig:
    return msgspec.structs.replace(config(model, slots=2), ctx_tokens=8192)


def test_a_word_that_overflows_llama_cpps_stack_fails_alone(recursive_model: Path) -> None:
    session = Session(engine(recursive_model))
    try:
        pid = session.engine.pid
        got = session.ask(chat(1, DEEP), chat(2, "Hi"))
        assert "tokens, and at most" in (got[1].error or "")
        assert got[2].error is None
        assert (session.engine.alive, session.engine.pid) == (True, pid)
    finally:
        session.engine.close(5.0)


def test_short_requests_do_not_wait_for_a_long_text(tiny_model: Path) -> None:
    session = Session(engine(tiny_model))
    try:
        session.ask(chat(1, "a " * 70_000, max_tokens=1))  # the process for long texts has started
        got = session.ask(chat(2, "ab" * 60_000), *(chat(key, "Hi", max_tokens=1) for key in range(3, 9)))
        assert list(got)[-1] == 2
        assert "tokens, and at most" in (got[2].error or "")
    finally:
        session.engine.close(5.0)


def test_a_long_text_has_the_tokens_that_it_has_anywhere(long_texts: LongTexts) -> None:
    text = "Copper <|im_end|> rivers\0 and\n\nlamps. " * 1800
    assert len(text) > LONG_CHARACTERS
    whole = long_texts.tokenize(text, add_special=True, parse_special=False)
    part = long_texts.tokenize(text[: len(text) // 2], add_special=True, parse_special=False)
    assert whole[: len(part) - 8] == part[:-8]
    assert len(long_texts.tokenize(text, add_special=True, parse_special=True)) < len(whole)


def test_a_word_that_is_too_long_is_told_and_the_next_text_is_tokenised(long_texts: LongTexts) -> None:
    with pytest.raises(RequestError, match=r"longer than llama.cpp can take|more than 10 seconds"):
        long_texts.tokenize("é" * 5_000_000, add_special=True, parse_special=False)
    assert long_texts.tokenize("Hi", add_special=False, parse_special=False)


def test_what_takes_too_long_is_told_and_the_next_text_is_tokenised(tiny_model: Path) -> None:
    one = LongTexts(str(tiny_model), 0.5)
    try:
        with pytest.raises(RequestError, match=r"tokenising it takes more than 0\.5 seconds"):
            one.tokenize("Copper rivers and lamps. " * 400_000, add_special=True, parse_special=False)
        assert one.tokenize("Hi", add_special=False, parse_special=False)
    finally:
        one.close()


def test_the_longest_text_of_a_request_counts() -> None:
    def request(**fields: object) -> Request:
        return Request(custom_id="a", kind="completion", **fields)  # type: ignore[arg-type]

    assert longest_text(request(prompt="abc")) == 3
    assert longest_text(request(prompt=(1, 2, 3, 4))) == 0
    assert longest_text(request(prompt="a", continuations=("abcd", (1,)))) == 4
    assert longest_text(request(messages=(Message("user", "abc"), Message("user", "de")))) == 5
    assert longest_text(request(inputs=("ab", (1, 2, 3)))) == 2
