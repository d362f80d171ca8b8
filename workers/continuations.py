"""From what may follow a prompt to tokens, such that the prompt's own tokens stay as they are.

A prompt is computed once for all its continuations, so its tokens must not depend on them. A continuation's tokens are
those that the tokenizer makes of it where it stands: the end of the prompt and the continuation are tokenised together,
and what follows the prompt's tokens is taken. So a tokenizer that puts a space before a text, or joins punctuation and
letters, does what it did in training. Where it would join the last characters of the prompt and the first ones of the
continuation to one token ("Answer: " before "yes"), the continuation is tokenised by itself.

A prompt of token ids has no text: there a continuation is always tokenised by itself. Tokens found so must stand for
its text to the byte; else (a tokenizer that adds a space) it is refused. Token ids are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from scheduling.errors import RequestError
from scheduling.requests import Request
from workers.promptparts import Tokenize

BOUNDARY_CHARACTERS = 256
"""So much of a prompt's end is tokenised with a continuation: no token is as long, and 1,024 times a long prompt would
take longer than computing it."""


class ContinuationReader:
    """Reads the continuations of requests for one model. `piece`: the bytes that a token stands for, at most
    `piece_bytes_max`."""

    def __init__(
        self,
        tokenize: Tokenize,
        piece: Callable[[int], bytes],
        *,
        vocab_tokens: int,
        piece_bytes_max: int,
        ctx_tokens: int,
    ) -> None:
        self._llama_tokenize = tokenize
        self._piece = piece
        self._vocab_tokens = vocab_tokens
        self._text_bytes_max = piece_bytes_max * ctx_tokens
        self._ctx_tokens = ctx_tokens

    def tokens(self, request: Request, prompt_tokens: int) -> list[npt.NDArray[np.int32]]:
        """The tokens of each continuation, 1-D. Raises `RequestError` for one that cannot be scored."""
        if not request.continuations:
            return []
        end = request.prompt[-BOUNDARY_CHARACTERS:] if isinstance(request.prompt, str) else ""
        end_ids = self._tokenize(end) if end else []
        read = []
        for place, continuation in enumerate(request.continuations):
            name = f"continuations[{place}]"
            if isinstance(continuation, str):
                ids = self._of_text(continuation, end, end_ids, name)
            else:
                ids = self._checked(continuation, name)
            if prompt_tokens + len(ids) > self._ctx_tokens:
                raise RequestError(
                    f"{name} has {len(ids)} tokens after {prompt_tokens} of the prompt, and a slot holds "
                    f"{self._ctx_tokens}; use --ctx {prompt_tokens + len(ids)} or more",
                    name,
                )
            read.append(np.array(ids, np.int32))
        return read

    def _of_text(self, text: str, end: str, end_ids: list[int], name: str) -> list[int]:
        size = len(text.encode("utf-8", "replace"))
        if size > self._text_bytes_max:
            raise RequestError(
                f"{name} has {size} bytes, which is more than a slot of {self._ctx_tokens} tokens can hold "
                f"(at most {self._text_bytes_max}); use a larger --ctx",
                name,
            )
        ids = self._tokenize(end + text) if end_ids else []
        if len(ids) > len(end_ids) and ids[: len(end_ids)] == end_ids:
            return ids[len(end_ids) :]
        ids = self._tokenize(text)
        if b"".join([self._piece(token) for token in ids]) != text.encode("utf-8", "replace"):
            raise RequestError(
                f"{name} cannot be told apart from the prompt: this model's tokenizer joins them or changes the text; "
                "let it begin with a space, or give token ids for both",
                name,
            )
        return ids

    def _tokenize(self, text: str) -> list[int]:
        return self._llama_tokenize(text, add_special=False, parse_special=False)

    def _checked(self, ids: tuple[int, ...], name: str) -> list[int]:
        for token in ids:
            if not 0 <= token < self._vocab_tokens:
                raise RequestError(
                    f"{name}: token {token} is not in the vocabulary (0 to {self._vocab_tokens - 1})", name
                )
        return list(ids)
