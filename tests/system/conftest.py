"""Fixtures of the tests that start real processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_alone
from tests.system.held_ranks import answers, words
from tests.system.runs import Gate, Run


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate, for the engines of the test's job."""
    return Gate.closed(tmp_path / "gate")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run directory of the test's job, which makes it."""
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The answers of a run of `tests.system.held_ranks` to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder / "run")
    done = run_alone(*words(folder, run))
    assert done.rc == 0, done.output
    return answers(run)
