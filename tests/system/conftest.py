"""Fixtures of the tests that start real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.runs import Gate, Run


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate, for the engines of the test's job."""
    return Gate.closed(tmp_path / "gate")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run directory of the test's job, which makes it."""
    return Run(tmp_path / "run")
