"""From tokens to text: the pieces of a vocabulary, whole UTF-8 characters, stop strings.

Tokens stand for bytes, not characters: one character can be spread over several tokens. `PieceTable` knows the
bytes of each token; `TextStream` turns them into text bit by bit, holds back what may be half a character or the
beginning of a stop string, and says when a stop string has come. For a request that is neither streamed nor has
stop strings `PieceTable.text` does all of it at once, at the end.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence


class PieceTable:
    """The bytes that each token stands for, asked of the vocabulary once per token.

    Threads may share one: two that look up the same new token store the same bytes. `name_of` says how the vocabulary
    writes a token that stands for no text.
    """

    def __init__(
        self, vocab_tokens: int, piece_of: Callable[[int], bytes], name_of: Callable[[int], str] = str
    ) -> None:
        self._pieces: list[bytes | None] = [None] * vocab_tokens
        self._piece_of = piece_of
        self._name_of = name_of

    def __getitem__(self, token: int) -> bytes:
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._piece_of(token)
        return piece

    def shown(self, token: int) -> bytes | str:
        """The bytes that a token stands for, or its name if it stands for none."""
        return self[token] or self._name_of(token)

    def text(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join([self[token] for token in tokens]).decode("utf-8", "replace")

    def prompt_text(self, prompt: str | Sequence[int]) -> str:
        """A prompt as text: as it was written, or what its tokens stand for."""
        return prompt if isinstance(prompt, str) else self.text(prompt)


class TextStream:
    """Text of one growing answer.

    `push` returns the text that is certain now: whole characters that belong to no stop string. `stopped` is set
    once a stop string has come; the text before it has then been returned in full, and nothing more follows.
    """

    __slots__ = ("stopped", "_decoder", "_held", "_stops")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._stops = tuple(stop for stop in stops if stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add one token's bytes."""
        return self._advance(self._decoder.decode(piece))

    def finish(self) -> str:
        """The answer has ended: all that was held back, an unfinished character as U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if not self._stops:
            return text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
