"""LoRA adapters for tests: random matrices, written with the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def random_pair(inputs: int, outputs: int, rank: int = 4, seed: int = 0, gain: float = 1.0) -> Pair:
    """A of (rank, inputs) and B of (outputs, rank): B A keeps variance, times gain**2."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((rank, inputs), np.float32) / np.float32(inputs**0.5)
    b = random.standard_normal((outputs, rank), np.float32) * np.float32(gain / rank**0.5)
    return a, b


def write_adapter(
    path: Path,
    pairs: Mapping[str, Pair],
    *,
    architecture: str = "llama",
    general_type: str = "adapter",
    kind: str = "lora",
) -> Path:
    """Write an adapter that changes the weights named in `pairs`. The rest is for adapters that are none."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(general_type)
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", 4.0)
    for weight, (a, b) in pairs.items():
        writer.add_tensor(f"{weight}.lora_a", a)
        writer.add_tensor(f"{weight}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
