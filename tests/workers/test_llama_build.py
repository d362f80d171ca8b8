"""What the installed llama.cpp says it was built for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from workers import llama_build
from workers.llama_build import ask_build, features


def test_features_of_the_processor_are_those_that_are_on() -> None:
    said = "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 | "
    assert features(said) == ("SSE3", "AVX2", "REPACK")
    assert features("CPU : NEON = 1 | Metal : EMBED_LIBRARY = 1 | ") == ("NEON",)
    assert features("") == ()


@pytest.mark.slow
def test_the_installed_one_is_asked_in_a_process_of_its_own() -> None:
    before = set(sys.modules)
    build = ask_build(os.environ, 60.0)
    assert build.problem == ""
    assert "CPU" in build.backends
    assert build.version
    assert [device for device in build.devices if not device.gpu]
    assert "llama_cpp" not in set(sys.modules) - before


@pytest.mark.slow
def test_one_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path.cwd())))
    assert "libcuda.so.1" in ask_build({**os.environ, "PYTHONPATH": path}, 60.0).problem


@pytest.mark.slow
def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_build, "COMMAND", ("sleep", "60"))
    assert "did not load within 0 s" in ask_build(os.environ, 0.1).problem
