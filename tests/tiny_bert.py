"""A random BERT around a WordPiece vocabulary of its own: an embedding model of any size, made in a blink.

Its vocabulary is every word of two letters, every letter alone and every letter within a word, so that all plain text
has tokens: words of up to two letters one, longer ones one for each further letter. Weights come from one seed. What it
says means nothing, but like a real model's its vectors are the same for the same text and far apart for others.

`MINILM` has the shape of all-MiniLM-L6-v2, which speed is measured with: weights do not change that.
"""

from __future__ import annotations

import os
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

POOLING = {"mean": 1, "cls": 2, "last": 3, "rank": 4}
"""llama.cpp's numbers for ways to make one vector of many; the last makes a score instead."""
CTX_TOKENS = 512

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BEGINS_WORD = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True, slots=True)
class BertShape:
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocabulary: int = 0
    """At least so many tokens: filled up with words that no text has."""


TINY = BertShape(layers=2, width=64, heads=4, feed_forward=128)
MINILM = BertShape(layers=6, width=384, heads=12, feed_forward=1536, vocabulary=30_522)


def build_tiny_bert(target: Path, *, pooling: str | None = "mean", shape: BertShape = TINY, seed: int = 0) -> None:
    """Write the model to `target`, which appears whole. `pooling` None: the file does not say."""
    import gguf

    tokens = _tokens(shape.vocabulary)
    with tempfile.TemporaryDirectory(prefix=".bert-", dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        writer = gguf.GGUFWriter(str(partial), "bert")
        _write_shape(writer, shape, pooling)
        _write_tokenizer(writer, tokens)
        for name, weights in _weights(shape, len(tokens), seed):
            packed = weights.ndim == 2 and not name.startswith("token_types")
            writer.add_tensor(name, weights.astype(np.float16) if packed else weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, target)


def words(random: np.random.Generator, count: int) -> str:
    """A text of `count` tokens beside the two that every text has."""
    letters = random.choice(list(string.ascii_lowercase), (count, 2))
    return " ".join(first + second for first, second in letters)


def _tokens(at_least: int) -> list[str]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pairs = [_BEGINS_WORD + one + two for one in string.ascii_lowercase for two in string.ascii_lowercase]
    tokens = [*_SPECIAL, *(_BEGINS_WORD + letter for letter in letters), *letters, *pairs]
    return tokens + [f"[unused{place}]" for place in range(at_least - len(tokens))]


def _write_shape(writer: Any, shape: BertShape, pooling: str | None) -> None:
    writer.add_name("Random BERT for tests")
    writer.add_context_length(CTX_TOKENS)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_file_type(1)  # matrices of 16 bits
    if pooling is not None:
        writer.add_uint32("bert.pooling_type", POOLING[pooling])


def _write_tokenizer(writer: Any, tokens: list[str]) -> None:
    writer.add_string("tokenizer.ggml.model", "bert")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if place < len(_SPECIAL) else 1 for place in range(len(tokens))])
    writer.add_token_type_count(2)
    writer.add_vocab_size(len(tokens))
    for place, key in enumerate(("padding", "unknown", "bos", "seperator", "mask")):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", place)


def _weights(shape: BertShape, vocabulary: int, seed: int) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """(name, weights) of each tensor; matrices are (outputs, inputs)."""
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        drawn: npt.NDArray[np.float32] = random.standard_normal((outputs, inputs), np.float32)
        drawn *= np.float32(gain / inputs**0.5)
        return drawn

    def norm(name: str) -> list[tuple[str, npt.NDArray[np.float32]]]:
        return [(f"{name}.weight", np.ones(width, np.float32)), (f"{name}.bias", np.zeros(width, np.float32))]

    width, wide = shape.width, shape.feed_forward
    tensors = [
        ("token_embd.weight", random.standard_normal((vocabulary, width), np.float32)),
        ("token_types.weight", 0.1 * random.standard_normal((2, width), np.float32)),
        ("position_embd.weight", 0.3 * random.standard_normal((CTX_TOKENS, width), np.float32)),
        *norm("token_embd_norm"),
    ]
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        matrices = {
            "attn_q": matrix(width, width, 2.0),
            "attn_k": matrix(width, width, 2.0),
            "attn_v": matrix(width, width),
            "attn_output": matrix(width, width, 2.0),
            "ffn_up": matrix(wide, width),
            "ffn_down": matrix(width, wide, 2.0),
        }
        for name, weights in matrices.items():
            tensors.append((f"{block}.{name}.weight", weights))
            tensors.append((f"{block}.{name}.bias", 0.1 * random.standard_normal(len(weights), np.float32)))
        tensors += norm(f"{block}.attn_output_norm") + norm(f"{block}.layer_output_norm")
    return tensors
