"""A random llama of two layers around a real tokenizer: about 10 MB, loads in a blink, runs anywhere.

It speaks SmolLM2's vocabulary and chat template (copied out of the real model's GGUF), so tokenizing, templates
and UTF-8 are the real thing while the text it generates is noise. What it says is deterministic: weights come
from one seed. Input and output embeddings are separate matrices: tied ones would make a random model repeat its
input. The output layer is scaled so that logits spread as a real model's do, because nearly flat ones make
greedy choices hang on rounding and leave filters such as top_p nothing to cut.

It practically never emits an end-of-sequence token: what depends on one belongs on the real model.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LAYERS = 2
WIDTH = 64
HEADS = 4
KV_HEADS = 2
FEED_FORWARD = 128
"""At this width; it grows with it."""
CTX_TOKENS = 8192
LOGIT_SCALE = 8.0
RECIPE = 1
"""Raised with every change to what is written, so that cached files of older recipes are not used."""

FILE_NAME = f"tiny-llama-{LAYERS}x{WIDTH}-r{RECIPE}.gguf"

_COPIED_STRINGS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_COPIED_IDS = (
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
)
_COPIED_FLAGS = ("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token")
_COPIED_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")


def tiny_model_beside(real: Path, fallback: Path) -> Path:
    """The cached tiny model beside `real`, or in the directory `fallback` where that is not writable."""
    folder = real.resolve().parent
    if not (folder / FILE_NAME).is_file() and not os.access(folder, os.W_OK):
        folder = fallback
    target = folder / FILE_NAME
    if not target.is_file():
        build_tiny_model(real, target)
    return target


def build_tiny_model(
    real: Path, target: Path, seed: int = 0, ctx_tokens: int = CTX_TOKENS, *, quantised: bool = True, width: int = WIDTH
) -> None:
    """Write a tiny model with the tokenizer of the GGUF file `real` to `target`, which appears whole.

    `ctx_tokens` is what it says it was trained with. Its embeddings are in 8 bits, or in 16 unless `quantised`.
    `width` is its embeddings' length: llama.cpp's types ending in _K need multiples of 256.
    """
    # Imported here: conftest imports this module, and most test runs need no GGUF writer.
    import gguf

    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=target.parent) as scratch:
        partial = Path(scratch) / FILE_NAME
        writer = gguf.GGUFWriter(str(partial), "llama")
        _write_shape(writer, ctx_tokens, width)
        vocabulary = copy_tokenizer(gguf.GGUFReader(str(real)), writer)
        writer.add_vocab_size(vocabulary)
        for name, weights, packed in _weights(vocabulary, seed, width):
            if packed:
                kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F16
                writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, target)


def _write_shape(writer: Any, ctx_tokens: int, width: int) -> None:
    writer.add_name("Tiny random llama for tests")
    writer.add_context_length(ctx_tokens)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD * width // WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def copy_tokenizer(reader: Any, writer: Any) -> int:
    """Copy everything of the tokenizer; returns the number of tokens in the vocabulary."""
    for key in _COPIED_STRINGS:
        writer.add_string(key, reader.fields[key].contents())
    for key in _COPIED_IDS:
        writer.add_uint32(key, int(reader.fields[key].contents()))
    for key in _COPIED_FLAGS:
        writer.add_bool(key, bool(reader.fields[key].contents()))
    for key in _COPIED_ARRAYS:
        writer.add_array(key, reader.fields[key].contents())
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def _weights(vocabulary: int, seed: int, width: int) -> list[tuple[str, npt.NDArray[np.float32], bool]]:
    """(name, weights, whether to pack as Q8_0) of each tensor; matrices are (outputs, inputs)."""
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        # Unit variance in gives variance gain**2 out.
        drawn: npt.NDArray[np.float32] = random.standard_normal((outputs, inputs), np.float32)
        drawn *= np.float32(gain / inputs**0.5)
        return drawn

    ones = np.ones(width, np.float32)
    feed_forward = FEED_FORWARD * width // WIDTH
    kv_width = width // HEADS * KV_HEADS
    tensors = [
        ("token_embd.weight", random.standard_normal((vocabulary, width), np.float32), True),
        ("output.weight", matrix(vocabulary, width, LOGIT_SCALE), True),
        ("output_norm.weight", ones, False),
    ]
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensors += [
            (f"{block}.attn_norm.weight", ones, False),
            (f"{block}.attn_q.weight", matrix(width, width, 2.0), False),
            (f"{block}.attn_k.weight", matrix(kv_width, width, 2.0), False),
            (f"{block}.attn_v.weight", matrix(kv_width, width), False),
            (f"{block}.attn_output.weight", matrix(width, width, 2.0), False),
            (f"{block}.ffn_norm.weight", ones, False),
            (f"{block}.ffn_gate.weight", matrix(feed_forward, width), False),
            (f"{block}.ffn_up.weight", matrix(feed_forward, width), False),
            (f"{block}.ffn_down.weight", matrix(width, feed_forward, 2.0), False),
        ]
    return tensors
