"""A random Mamba of two layers around a real tokenizer: a model whose sequences are one state each, not cells.

As tests/tiny_model.py, with which it shares what is not the architecture: there is no going back in such a sequence, it
can only be copied whole.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.tiny_model import CTX_TOKENS, LAYERS, LOGIT_SCALE, WIDTH, copy_tokenizer

INNER = 2 * WIDTH
STATE = 16
RANK = 4
KERNEL = 4

Weights = npt.NDArray[np.float32]


def build_tiny_recurrent(real: Path, target: Path, seed: int = 0) -> None:
    """Write the model, with the tokenizer of the GGUF file `real`, to `target`."""
    # Imported here: most test runs need no GGUF writer.
    import gguf

    writer = gguf.GGUFWriter(str(target), "mamba")
    writer.add_name("Tiny random mamba for tests")
    writer.add_context_length(CTX_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = copy_tokenizer(gguf.GGUFReader(str(real)), writer)
    writer.add_vocab_size(vocabulary)
    for name, weights in _weights(vocabulary, seed).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(vocabulary: int, seed: int) -> dict[str, Weights]:
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> Weights:
        drawn: Weights = random.standard_normal((outputs, inputs), np.float32)
        drawn *= np.float32(gain / inputs**0.5)
        return drawn

    tensors: dict[str, Weights] = {
        "token_embd.weight": random.standard_normal((vocabulary, WIDTH), np.float32),
        "output.weight": matrix(vocabulary, WIDTH, LOGIT_SCALE),
        "output_norm.weight": np.ones(WIDTH, np.float32),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensors |= {
            f"{block}.attn_norm.weight": np.ones(WIDTH, np.float32),
            f"{block}.ssm_in.weight": matrix(2 * INNER, WIDTH, 2.0),
            f"{block}.ssm_conv1d.weight": matrix(INNER, KERNEL),
            f"{block}.ssm_conv1d.bias": np.zeros(INNER, np.float32),
            f"{block}.ssm_x.weight": matrix(RANK + 2 * STATE, INNER, 2.0),
            f"{block}.ssm_dt.weight": matrix(INNER, RANK),
            f"{block}.ssm_dt.bias": np.full(INNER, -2.0, np.float32),
            f"{block}.ssm_a": -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (INNER, 1)),
            f"{block}.ssm_d": np.ones(INNER, np.float32),
            f"{block}.ssm_out.weight": matrix(WIDTH, INNER, 2.0),
        }
    return tensors
