"""From a request for embeddings to the tokens of its inputs.

Runs ahead of admission, as `workers.prompts` does for prompts. Everything that can be wrong with an input is found
here, before native code sees it: a model of learnt positions (BERT) reads memory that is not its own beyond the last.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduling.errors import RequestError
from scheduling.requests import Request
from workers.promptparts import Tokenize

Ints = npt.NDArray[np.int32]

TEXT_BYTES_MIN = 1 << 16
"""Texts up to here are tokenised whatever a model can take: spaces and unknown words have few tokens or none."""


class InputReader:
    """Turns inputs into tokens for one model. `tokens_max`: most of an input; `dimensions`: of the model's vectors.

    `piece_bytes_max`: the most bytes that one token stands for.
    """

    def __init__(
        self,
        tokenize: Tokenize,
        *,
        vocab_tokens: int,
        piece_bytes_max: int,
        tokens_max: int,
        train_ctx_tokens: int,
        dimensions: int,
    ) -> None:
        self._tokenize = tokenize
        self._vocab_tokens = vocab_tokens
        self._text_bytes_max = max(TEXT_BYTES_MIN, tokens_max * piece_bytes_max)
        self.tokens_max = tokens_max
        self._train_ctx_tokens = train_ctx_tokens
        self.dimensions = dimensions

    def read(self, request: Request) -> tuple[Ints, Ints]:
        """The tokens of all inputs one after the other, and where each begins: (inputs + 1,), the end of the last too.

        Raises RequestError if one of them cannot be embedded, or has no `dimensions` of the size that is asked for.
        """
        wanted = request.dimensions
        if wanted is not None and wanted > self.dimensions:
            raise RequestError(
                f"dimensions is {wanted}, and this model's embeddings have {self.dimensions}; ask for as many or fewer",
                "dimensions",
            )
        inputs = [self._tokens(one, f"input[{place}]") for place, one in enumerate(request.inputs)]
        starts = np.zeros(len(inputs) + 1, np.int32)
        np.cumsum([len(tokens) for tokens in inputs], out=starts[1:])
        return np.concatenate(inputs), starts

    def _tokens(self, one: str | tuple[int, ...], name: str) -> Ints:
        if isinstance(one, str):
            size = len(one.encode("utf-8", "replace"))
            if size > self._text_bytes_max:
                raise RequestError(f"{name} has {size} bytes, more than {self._limit()} can hold", "input")
            ids = self._tokenize(one, add_special=True, parse_special=False)
        else:
            ids = list(one)
            for token in ids:
                if not 0 <= token < self._vocab_tokens:
                    raise RequestError(
                        f"{name}: token {token} is not in the vocabulary (0 to {self._vocab_tokens - 1})", "input"
                    )
        if not ids:
            raise RequestError(f"{name} has no tokens", "input")
        if len(ids) > self.tokens_max:
            raise RequestError(f"{name} has {len(ids)} tokens, more than {self._limit()}", "input")
        return np.array(ids, np.int32)

    def _limit(self) -> str:
        if self.tokens_max < self._train_ctx_tokens:
            return f"the {self.tokens_max} that --ctx allows; this model can take up to {self._train_ctx_tokens}"
        return f"the {self.tokens_max} that this model can take; cut it into pieces"
