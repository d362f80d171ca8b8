"""From a request to the tokens of its prompt, and the limit of its output.

Runs ahead of admission, in a thread of its own, so that the stepping threads do not pay for templates and
tokenising. Everything that can be wrong with a prompt is found here, before native code sees it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduling.errors import RequestError
from scheduling.requests import Request, Sampling
from workers.promptparts import Template, Tokenize, tokens_of


class PromptReader:
    """Turns requests into tokens for one model. `ctx_tokens`: what a slot holds, prompt and output together.

    `piece_bytes_max`: the most bytes that one token stands for.
    """

    def __init__(
        self,
        template: Template,
        tokenize: Tokenize,
        *,
        vocab_tokens: int,
        piece_bytes_max: int,
        bos: int,
        ctx_tokens: int,
        max_tokens_default: int,
    ) -> None:
        """`bos` negative: the vocabulary has none."""
        self._template = template
        self._llama_tokenize = tokenize
        self._text_bytes_max = ctx_tokens * piece_bytes_max
        self._vocab_tokens = vocab_tokens
        self._bos = bos
        self._ctx_tokens = ctx_tokens
        self._max_tokens_default = max_tokens_default

    def tokens(self, request: Request) -> npt.NDArray[np.int32]:
        """The prompt's tokens, 1-D. Raises `RequestError` if it cannot be run."""
        if request.kind == "chat":
            ids = tokens_of(self._template.parts(request.messages), self._tokenize)
        elif isinstance(request.prompt, str):
            ids = self._tokenize(request.prompt, add_special=True, parse_special=False)
        else:
            ids = self._checked(request.prompt)
        if not ids:
            if self._bos < 0:
                raise RequestError("the prompt has no tokens, and this model has none to begin with", "prompt")
            ids = [self._bos]
        if len(ids) > self._ctx_tokens - 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, and at most {self._ctx_tokens - 1} fit beside one of output "
                f"into a slot of {self._ctx_tokens}; use --ctx {len(ids) + 1} or more",
                "prompt",
            )
        return np.array(ids, np.int32)

    def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of `text`, unless it is so long that they cannot fit: tokenising 10 MB takes long, or worse."""
        size = len(text.encode("utf-8", "replace"))
        if size > self._text_bytes_max:
            raise RequestError(
                f"the prompt has {size} bytes, which is more than a slot of {self._ctx_tokens} tokens can hold "
                f"(at most {self._text_bytes_max}); use a larger --ctx",
                "prompt",
            )
        return self._llama_tokenize(text, add_special=add_special, parse_special=parse_special)

    def _checked(self, prompt: tuple[int, ...]) -> list[int]:
        for token in prompt:
            self._check_token(token, "the prompt's", "prompt")
        return list(prompt)

    def _check_token(self, token: int, whose: str, param: str) -> None:
        if not 0 <= token < self._vocab_tokens:
            raise RequestError(f"{whose} token {token} is not in the vocabulary (0 to {self._vocab_tokens - 1})", param)

    def limit(self, sampling: Sampling, prompt_tokens: int) -> int:
        """Most output tokens of one choice: what was asked for, or the run's default, as far as the slot holds."""
        wanted = self._max_tokens_default if sampling.max_tokens is None else sampling.max_tokens
        return min(wanted, self._ctx_tokens - prompt_tokens)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises `RequestError` for a bias on a token that the vocabulary does not have."""
        for token in sampling.logit_bias:
            self._check_token(token, "logit_bias:", "logit_bias")
