"""An adapter is accepted for its model, or refused in one clear sentence."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from scheduling.errors import ModelFileError
from storage.adapter import check_adapter
from storage.gguf import GgufInfo, check_gguf
from tests.adapters import random_pair, write_adapter

WEIGHT = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GgufInfo:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.ones((10, 64), np.float32))
    writer.add_tensor(WEIGHT, np.ones((32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return check_gguf(path)


def refusal(path: Path, model: GgufInfo) -> str:
    with pytest.raises(ModelFileError) as caught:
        check_adapter(path, model)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    return said


def test_an_adapter_of_the_model_is_accepted_with_its_size(tmp_path: Path, model: GgufInfo) -> None:
    path = write_adapter(tmp_path / "a.gguf", {WEIGHT: random_pair(64, 32, rank=4)})
    assert check_adapter(path, model) == 4 * (4 * 64 + 4 * 32)


def test_the_input_matrix_has_its_pair_the_other_way_round(tmp_path: Path, model: GgufInfo) -> None:
    a, b = random_pair(10, 64, rank=4)
    path = write_adapter(tmp_path / "a.gguf", {"token_embd.weight": (a, b)})
    assert "does not fit token_embd.weight" in refusal(path, model)
    other_way = write_adapter(tmp_path / "b.gguf", {"token_embd.weight": (a.T.copy(), b)})
    assert check_adapter(other_way, model) == 4 * (4 * 10 + 4 * 64)


def test_what_is_no_adapter_of_this_model_is_refused_by_what_is_wrong(tmp_path: Path, model: GgufInfo) -> None:
    pair = random_pair(64, 32)
    path = tmp_path / "a.gguf"
    assert "the adapter" in refusal(tmp_path / "none.gguf", model)
    assert "does not exist" in refusal(tmp_path / "none.gguf", model)
    assert "is no adapter" in refusal(model.path, model)
    assert "is no adapter" in refusal(write_adapter(path, {WEIGHT: pair}, general_type="model"), model)
    assert "of the type 'control'" in refusal(write_adapter(path, {WEIGHT: pair}, kind="control"), model)
    assert "architecture 'gemma'" in refusal(write_adapter(path, {WEIGHT: pair}, architecture="gemma"), model)
    assert "changes no weight" in refusal(write_adapter(path, {}), model)
    assert "lacks" in refusal(write_adapter(path, {"blk.7.attn_q.weight": pair}), model)
    assert f"does not fit {WEIGHT}" in refusal(write_adapter(path, {WEIGHT: random_pair(32, 32)}), model)
    path.write_bytes(b"not a file of that kind")
    assert "not a GGUF" in refusal(path, model)


def test_half_a_pair_and_foreign_tensors_are_refused(tmp_path: Path, model: GgufInfo) -> None:
    def written(name: str) -> Path:
        path = tmp_path / "a.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_tensor(name, np.ones((4, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    assert f"lacks {WEIGHT}.lora_b" in refusal(written(f"{WEIGHT}.lora_a"), model)
    assert "which no LoRA has" in refusal(written(WEIGHT), model)
