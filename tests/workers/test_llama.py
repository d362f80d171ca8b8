"""Loading a model: what llama.cpp says about failures, in words that lead on."""

from __future__ import annotations

from pathlib import Path

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
