"""GGUF files of a few kilobytes, whole or split, that differ by their seed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def small_model(path: Path, seed: int = 0, rows: int = 8) -> Path:
    """A model of one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, seed, rows, 0, 1)
    return path


def split_model(folder: Path, name: str = "big", parts: int = 3, seed: int = 0) -> list[Path]:
    """A model of several files. Returns them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{place + 1:05d}-of-{parts:05d}.gguf" for place in range(parts)]
    for place, path in enumerate(paths):
        _write(path, seed + place, 8, place, parts)
    return paths


def _write(path: Path, seed: int, rows: int, place: int, parts: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if parts > 1:
        writer.add_uint16("split.no", place)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", parts)
    if not place:
        writer.add_name("Small")
        writer.add_context_length(512)
        writer.add_embedding_length(64)
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_token_list(["a", "b", "c"])
    values = np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)
    writer.add_tensor(f"blk.{place}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
