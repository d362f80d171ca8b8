"""llama.cpp quantises a model, which then answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import PATIENCE_S
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
    assert made["size"] < added["size"]
    answer = llmpi(
        tmp_path, "infer", "-m", "tiny:q4_0", "-p", "Hello", "--max-tokens", "4", "--device", "cpu", "--json"
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["output_tokens"] == 4


def test_what_cannot_be_quantised_is_said(f16_model: Path, tmp_path: Path) -> None:
    unknown = llmpi(tmp_path, "models", "quantize", str(f16_model), "Q99")
    assert unknown.returncode == 2
    assert "Q4_K_M" in unknown.stderr
    llmpi(tmp_path, "models", "quantize", str(f16_model), "q4_0", "--name", "small")
    again = llmpi(tmp_path, "models", "quantize", "small", "q8_0")
    assert again.returncode == 2
    assert "quantised already" in again.stderr
    assert "Traceback" not in again.stderr
