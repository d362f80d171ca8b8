"""What a chat template makes of messages: the parts of a prompt, each with how it is tokenised.

Nothing here needs jinja2, which only the process has that renders (`workers.chat`, `workers.rendering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from scheduling.requests import Message


class Tokenize(Protocol):
    """Text to token ids, as llama.cpp's tokenizer does it."""

    def __call__(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a prompt that is tokenised by itself: what the template wrote, or what a user wrote."""

    text: str
    add_special: bool
    parse_special: bool


class Template(Protocol):
    """A chat template in use: `ChatTemplate`, or one that is rendered elsewhere."""

    def check(self) -> None:
        """Raises `RequestError` if it cannot be compiled."""

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt, ready for the assistant's turn. Raises `RequestError` if the template fails."""


def tokens_of(parts: Sequence[Part], tokenize: Tokenize) -> list[int]:
    """The prompt as tokens."""
    tokens: list[int] = []
    for part in parts:
        tokens += tokenize(part.text, add_special=part.add_special, parse_special=part.parse_special)
    return tokens
