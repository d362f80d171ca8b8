"""What tests of the model store begin with: an empty store, and a model that is not in it yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.modelstore import ModelStore
from tests.storage.small_models import small_model


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "files" / "Small 1.gguf")
