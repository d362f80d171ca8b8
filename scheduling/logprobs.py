"""Log-probabilities of tokens: packed as they travel from an engine, and unpacked into the shapes of OpenAI's answers.

A rank has no vocabulary, so what a token stands for travels with it: once for each token that occurs, while the
numbers are packed arrays. The log-probability of a token is the logarithm of the softmax over the model's own logits,
before bias, penalties and temperature. This module is pure.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

DECIMALS = 6
NEVER = -9999.0
"""Stands for minus infinity, which JSON cannot hold, as in OpenAI's answers."""


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What is known of some tokens of one choice, in their order: `count` tokens with `alternatives` each.

    texts: what the tokens that occur stand for, as bytes. names: places in `texts` of what is no text but the name
    of a token that stands for none.
    tokens: int32, places in `texts`. logprobs: float32, NaN where there is none (nothing stands before a prompt's first
    token). top_tokens (places in `texts`) and top_logprobs: the likeliest tokens at each place, likeliest first. total:
    the sum of `logprobs`. greedy: whether each token that has one was the likeliest.
    """

    texts: list[bytes]
    names: list[int]
    tokens: bytes
    logprobs: bytes
    alternatives: int
    top_tokens: bytes
    top_logprobs: bytes
    total: float
    greedy: bool


class Alternative(msgspec.Struct, frozen=True, gc=False):
    """One of the likeliest tokens at a place of a chat's answer."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class ChatToken(msgspec.Struct, frozen=True, gc=False):
    """One token of a chat's answer. `bytes` is null for a token that stands for no text."""

    token: str
    logprob: float | None
    bytes: list[int] | None
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct, frozen=True, gc=False):
    """`choices[].logprobs` of a chat."""

    content: list[ChatToken]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, gc=False):
    """`choices[].logprobs` of a completion: parallel lists. Offsets count characters of the tokens' text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Score(msgspec.Struct, frozen=True, gc=False):
    """What is said of a continuation as a whole: ln P(continuation | prompt), and whether greedy decoding says it."""

    logprob: float
    is_greedy: bool


def chat_logprobs(packed: TokenLogprobs) -> ChatLogprobs:
    """The tokens of a chat's answer."""
    texts = _texts(packed)
    names, values = (
        [name_of(text) for text in texts],
        [list(text) if isinstance(text, bytes) else None for text in texts],
    )

    def entry(place: int, logprob: float | None) -> Alternative:
        return Alternative(names[place], logprob, values[place])

    content = [
        ChatToken(names[token], logprob, values[token], [entry(*pair) for pair in top])
        for token, logprob, top in _places(packed)
    ]
    return ChatLogprobs(content)


def completion_logprobs(packed: TokenLogprobs) -> CompletionLogprobs:
    """The tokens of a completion. The token itself is among its alternatives, also where it is none of the likeliest;
    of two tokens that are written alike the likelier is kept."""
    texts = _texts(packed)
    names = [name_of(text) for text in texts]
    tokens, logprobs, tops = [], [], []
    for token, logprob, top in _places(packed):
        tokens.append(token)
        logprobs.append(logprob)
        table: dict[str, float] | None = None
        if logprob is not None:
            table = {}
            for place, value in [*top, (token, logprob)]:
                table.setdefault(names[place], NEVER if value is None else value)
        tops.append(table)
    return CompletionLogprobs(
        [names[token] for token in tokens],
        logprobs,
        tops if packed.alternatives else None,
        _offsets([texts[token] for token in tokens]),
    )


def score(packed: TokenLogprobs) -> Score:
    """What the tokens come to together."""
    return Score(_rounded([packed.total])[0] or 0.0, packed.greedy)


def name_of(text: bytes | str) -> str:
    """A token as it is written: its text, `bytes:\\xe2\\x80` for a piece of a character, or its name."""
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in text)


def _texts(packed: TokenLogprobs) -> list[bytes | str]:
    """Bytes for what stands for text, a string for a name."""
    texts: list[bytes | str] = list(packed.texts)
    for place in packed.names:
        texts[place] = packed.texts[place].decode()
    return texts


def _places(packed: TokenLogprobs) -> Iterable[tuple[int, float | None, list[tuple[int, float | None]]]]:
    """For each token its place in `texts`, its log-probability, and the same of the likeliest there."""
    width = packed.alternatives
    tokens = np.frombuffer(packed.tokens, np.int32).tolist()
    logprobs = _rounded(np.frombuffer(packed.logprobs, np.float32))
    top_tokens = np.frombuffer(packed.top_tokens, np.int32).tolist()
    top_logprobs = _rounded(np.frombuffer(packed.top_logprobs, np.float32))
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        here = slice(place * width, (place + 1) * width) if logprob is not None else slice(0)
        yield token, logprob, list(zip(top_tokens[here], top_logprobs[here], strict=True))


def _rounded(values: npt.ArrayLike) -> list[float | None]:
    """As JSON holds them: rounded, minus infinity as NEVER, NaN as None."""
    wide = np.asarray(values, np.float64)
    # Plus 0: rounding leaves a minus before zeros.
    clean: list[Any] = (np.round(np.maximum(wide, NEVER), DECIMALS) + 0.0).tolist()
    return [None if value != value else value for value in clean]


def _offsets(texts: list[bytes | str]) -> list[int]:
    """How many characters of the text stand before each token; a name is no part of the text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, length = [], 0
    for text in texts:
        offsets.append(length)
        if isinstance(text, bytes):
            length += len(decoder.decode(text))
    return offsets
