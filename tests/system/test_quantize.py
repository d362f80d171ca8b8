"""llama.cpp quantises a model, which then answers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from storage.blobs import Blobs
from storage.digest import Digest
from tests.launch import PATIENCE_S
from tests.storage.small_models import small_model
from tests.tiny_model import build_tiny_model

pytestmark = [pytest.mark.system, pytest.mark.slow]


def llmpi(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLMPI_HOME": str(home)}
    command = [sys.executable, "-m", "llmpi", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def f16_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f16") / "tiny-f16.gguf"
    build_tiny_model(real_model, path, quantised=False)
    return path


def test_a_model_is_quantised_and_used_by_name(f16_model: Path, tmp_path: Path) -> None:
    added = json.loads(llmpi(tmp_path, "models", "add", str(f16_model), "--json").stdout)
    done = llmpi(tmp_path, "models", "quantize", "tiny-f16", "q4_0", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["name"], made["parent"]) == ("tiny:q4_0", added["digest"])
    assert made["gguf"]["quantization"] == "Q4_0"
    assert [file["name"] for file in made["files"]] == ["tiny-Q4_0.gguf"]
    assert made["size"] < added["size"]
    answer = llmpi(
        tmp_path, "infer", "-m", "tiny:q4_0", "-p", "Hello", "--max-tokens", "4", "--device", "cpu", "--json"
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["output_tokens"] == 4


@pytest.fixture(scope="module")
def wide_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rows that are whole blocks of the K types: of others llama.cpp writes another type and says nothing."""
    path = tmp_path_factory.mktemp("wide") / "wide-f16.gguf"
    build_tiny_model(real_model, path, quantised=False, width=256)
    return path


@pytest.mark.parametrize(("kind", "most", "some"), [("Q4_K_M", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0")])
def test_tensors_have_the_types_that_were_asked_for(
    wide_model: Path, tmp_path: Path, kind: str, most: str, some: str
) -> None:
    done = llmpi(tmp_path, "models", "quantize", str(wide_model), kind, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["parent"] == f"sha256:{hashlib.sha256(wide_model.read_bytes()).hexdigest()}"
    assert made["gguf"]["quantization"] == kind
    reader = gguf.GGUFReader(Blobs(tmp_path / "models").path(Digest.parse(made["digest"])))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[f"blk.{layer}.attn_q.weight"] for layer in (0, 1)} == {most}
    assert types["output.weight"] == some


def test_what_cannot_be_quantised_is_said(f16_model: Path, tmp_path: Path) -> None:
    unknown = llmpi(tmp_path, "models", "quantize", str(f16_model), "Q99")
    assert unknown.returncode == 2
    assert "Q4_K_M" in unknown.stderr
    llmpi(tmp_path, "models", "quantize", str(f16_model), "q4_0", "--name", "small")
    again = llmpi(tmp_path, "models", "quantize", "small", "q8_0")
    assert again.returncode == 2
    assert "quantised already" in again.stderr
    assert "Traceback" not in again.stderr
    hollow = llmpi(tmp_path, "models", "quantize", str(small_model(tmp_path / "hollow.gguf")), "q8_0")
    assert hollow.returncode == 2
    assert "key not found" in hollow.stderr
    assert "quantised already" not in hollow.stderr
