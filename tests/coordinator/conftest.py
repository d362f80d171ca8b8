"""Fixtures of several files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordinator.inputs import WriteFile


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    def write_file(content: bytes | str, name: str = "requests.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
