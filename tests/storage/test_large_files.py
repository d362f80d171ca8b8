"""Files over 2 GiB and 4 GiB: places that 32 bits do not hold. The files are sparse, so they take no room."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from scheduling.errors import ModelFileError
from storage.digest import Digest
from storage.gguf import check_gguf
from storage.stagedir import StageDir, StageFile, Writing
from storage.stagesource import SourceFiles

SIZE = 5 << 30
PLACES = (0, (1 << 31) - 2, (1 << 32) - 2, SIZE - 4)
"""Where something stands that is to be found again: also across the limits."""


def large_model(path: Path, tensors: int = 3) -> int:
    """A header of tensors that take SIZE bytes together, and nothing behind it. Returns the size of the whole file."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count, writer.add_head_count):
        add(64)
    writer.add_token_list(["a", "b", "c"])
    rows = SIZE // tensors // 256
    for place in range(tensors):
        writer.add_tensor_info(f"blk.{place}.weight", (rows, 64), np.dtype(np.float32), rows * 256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = -(-path.stat().st_size // 32) * 32
    return begin + tensors * rows * 256


def test_tensors_that_end_beyond_4_gib_are_looked_for_there(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    whole = large_model(path)
    assert whole > 1 << 32
    with path.open("r+b") as file:
        file.truncate(whole)
    assert check_gguf(path).tensors == 3
    with path.open("r+b") as file:
        file.truncate(whole - (1 << 32))  # what 32 bits would take for the same
    with pytest.raises(ModelFileError):
        check_gguf(path)


def test_pieces_beyond_4_gib_are_staged_from_and_to_their_places(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        for number, place in enumerate(PLACES):
            file.seek(place)
            file.write(bytes([65 + number] * 4))
    assert source.stat().st_size == SIZE
    files = [StageFile(str(source), SIZE, None)]
    (tmp_path / "node").mkdir()
    into = StageDir(tmp_path / "node")
    reading, writing, digest = SourceFiles(files), Writing(into, files, reserve=False), Digest("0" * 64)
    try:
        for place in PLACES:
            piece = memoryview(bytearray(4))
            reading.read(0, place, piece)
            writing.write(0, place, piece)
        writing.name([digest])
    finally:
        reading.close()
        writing.drop()
    assert into.has(digest, SIZE)
    with into.blobs.path(digest).open("rb") as file:
        for number, place in enumerate(PLACES):
            file.seek(place)
            assert file.read(4) == bytes([65 + number] * 4)
