"""Loading a model: what llama.cpp says about failures, in words that lead on."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import ConfigError, ModelFileError
from workers import llama
from workers.llama_backend import start_backend
from workers.protocol import EngineConfig


@pytest.mark.parametrize(("split", "error"), [("row", ConfigError), ("layer", ModelFileError)])
def test_a_backend_without_split_buffers_is_no_fault_of_the_model_file(
    split: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "llama_model_load: error loading model: device CUDA0 does not support split buffers"
    monkeypatch.setattr(llama, "recent_errors", lambda: said)
    start_backend()
    with pytest.raises(error, match="--split layer" if split == "row" else "split buffers"):
        llama.LlamaModel(EngineConfig(model=str(tmp_path / "none.gguf"), slots=1, ctx_tokens=256, split=split))  # type: ignore[arg-type]


@pytest.mark.parametrize("use_devices", [True, False])
def test_an_engine_that_is_to_use_no_device_gives_llama_an_empty_list(
    use_devices: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[ctypes.c_void_p | None] = []

    def load(path: bytes, params: Any) -> None:
        given.append(ctypes.c_void_p.from_address(params.devices) if params.devices else None)

    monkeypatch.setattr("workers.llama.lib.llama_model_load_from_file", load)
    config = EngineConfig(model=str(tmp_path / "none.gguf"), slots=1, ctx_tokens=256, use_devices=use_devices)
    with pytest.raises(ModelFileError):
        llama.LlamaModel(config)
    assert [None if first is None else first.value for first in given] == [None]
    assert (given[0] is None) is use_devices


def test_a_model_loads_without_devices(tiny_model: Path) -> None:
    start_backend()
    config = EngineConfig(model=str(tiny_model), slots=1, ctx_tokens=256, gpu_layers=0, use_devices=False)
    assert llama.LlamaModel(config).vocab_tokens > 0


@pytest.mark.parametrize("what", ["generates", "embeds", "drafts"])
def test_one_pass_at_a_time_where_a_model_is_split_by_tensors(
    what: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_backend()
    # A CPU cannot be asked to split anything.
    monkeypatch.setitem(llama._SPLIT_MODES, "tensor", llama._SPLIT_MODES["layer"])
    config = EngineConfig(model=str(tiny_model), slots=1, ctx_tokens=256, gpu_layers=0, split="tensor")
    model = llama.LlamaModel(config)
    taken: list[bool] = []

    def decode(_context: Any, _batch: Any) -> int:
        taken.append(model.turn.locked())  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr("workers.llama_contexts.lib.llama_decode", decode)
    if what == "embeds":
        model.encoder(config, 256, 1).encode(1)
    else:
        (llama.LlamaModel(config) if what == "drafts" else model).context(config, 1, 1).decode(1)
    assert taken == [True]
