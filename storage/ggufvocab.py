"""A model's vocabulary, as far as llama.cpp trusts it.

It indexes some lists by token, and aborts if two tokens are the same.
"""

from __future__ import annotations

import numpy as np

from scheduling.errors import ModelFileError
from storage.ggufheader import ARRAY, FLOAT32, INT32, STRING, TOKENS_KEY, Header

_LISTS = {
    TOKENS_KEY: (STRING,),
    "tokenizer.ggml.scores": (FLOAT32, INT32),
    "tokenizer.ggml.token_type": (INT32,),
    "tokenizer.ggml.merges": (STRING,),
}
_BY_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_NO_VOCABULARY = ("none", "no_vocab")
"""Values of tokenizer.ggml.model at which llama.cpp looks at none of these lists."""


def check_vocabulary(header: Header) -> None:
    """Raises ModelFileError if llama.cpp would refuse the vocabulary without saying much, or abort on it."""
    if header.values.get("tokenizer.ggml.model") in _NO_VOCABULARY:
        return
    tokens = header.lengths.get(TOKENS_KEY, 0)
    for key, kinds in _LISTS.items():
        if key not in header.keys:
            continue
        if header.kinds[key] != ARRAY or header.elements[key] not in kinds:
            raise ModelFileError(f"{header.path} is damaged: its {key} is no list of that kind. Fetch it again.")
        if key in _BY_TOKEN and header.lengths[key] < tokens:
            raise ModelFileError(
                f"{header.path} is damaged: its {key} has {header.lengths[key]} entries for {tokens} tokens. Fetch it "
                "again."
            )
    if same := _same_tokens(header):
        raise ModelFileError(
            f"{header.path} is damaged: tokens {same[0]} and {same[1]} of its {TOKENS_KEY} are the same, on which "
            "llama.cpp aborts. Fetch it again."
        )


def _same_tokens(header: Header) -> tuple[int, int] | None:
    """Numbers of two tokens that are one to llama.cpp.

    Hashes of 64 bits are compared: among 2^18 tokens that differ, two of them meet once in 2^29 vocabularies.
    """
    hashes = np.frombuffer(header.token_hashes, dtype=np.int64)
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(np.diff(hashes[order]) == 0)
    if not len(repeated):
        return None
    return int(order[repeated[0]]), int(order[repeated[0] + 1])
