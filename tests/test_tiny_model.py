"""The tiny model of the tests: the real tokenizer, and the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import FILE_NAME, LAYERS, WIDTH, build_tiny_model, tiny_model_beside

pytestmark = pytest.mark.slow


def test_tiny_model_has_a_real_tokenizer_and_chat_template(tiny_model: Path) -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(tiny_model)).fields
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    assert len(fields["tokenizer.ggml.tokens"].data) == 49_152
    assert fields["llama.block_count"].contents() == LAYERS
    assert fields["llama.embedding_length"].contents() == WIDTH


def test_tiny_model_is_small_and_the_same_each_time(tiny_model: Path, real_model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.gguf"
    build_tiny_model(real_model, again)
    assert again.read_bytes() == tiny_model.read_bytes()
    assert again.stat().st_size < 10_000_000


def test_tiny_model_is_built_once(tmp_path: Path) -> None:
    cached = tmp_path / FILE_NAME
    cached.write_bytes(b"made before")
    assert tiny_model_beside(tmp_path / "real.gguf", tmp_path / "elsewhere") == cached
    assert cached.read_bytes() == b"made before"
