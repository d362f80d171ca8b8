"""Staging as a job does it, in this process alone: what is staged, and that it is the copy that is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator.config import JobConfig
from coordinator.setup import prepare
from coordinator.staging import models_of, stage_models
from scheduling.errors import StagingError, StoppedError
from storage.stagedir import StageDir
from storage.staging import Staged
from tests.adapters import random_pair, write_adapter


@pytest.fixture(autouse=True)
def other_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is on another file system than the copies."""
    monkeypatch.setattr(StageDir, "device", property(lambda self: -1))


def test_the_copy_is_loaded_and_the_model_stays_what_it_was(tiny_model: Path, tmp_path: Path) -> None:
    config = JobConfig(model=str(tiny_model), draft_model=str(tiny_model), stage="always", stage_dir=str(tmp_path))
    staged = stage_models(config, None)
    here, there = prepare(config, staged), prepare(config)
    assert here.problem is None
    assert Path(here.model.path).is_relative_to(tmp_path)
    assert here.model.draft is not None
    assert Path(here.model.draft.path).is_relative_to(tmp_path)
    assert (here.fingerprint, here.model_name) == (there.fingerprint, there.model_name)
    assert staged.notes[0].startswith("staged ")


def test_adapters_are_staged_each_with_its_scale(tiny_model: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    first, second = (
        write_adapter(far / f"{name}.gguf", {"blk.0.attn_q.weight": random_pair(64, 64, seed=seed)})
        for seed, name in enumerate(("one", "two"))
    )
    config = JobConfig(
        model=str(tiny_model), loras=(f"{first}:0.5", str(second)), stage="always", stage_dir=str(tmp_path)
    )
    there, staged = prepare(config), stage_models(config, None)
    assert there.problem is None
    shutil.rmtree(far)
    here = prepare(config, staged)
    assert here.problem is None
    assert all(Path(adapter.path).is_relative_to(tmp_path) for adapter in here.model.adapters)
    assert [adapter.scale for adapter in here.model.adapters] == [0.5, 1.0]
    assert here.hello().model_fingerprint == there.hello().model_fingerprint


def test_local_models_are_not_staged_by_default(tiny_model: Path, tmp_path: Path) -> None:
    config = JobConfig(model=str(tiny_model), stage_dir=str(tmp_path))
    assert stage_models(config, None) == Staged()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["null", "simulated"])
def test_what_loads_no_model_stages_none(tiny_model: Path, tmp_path: Path, engine: str) -> None:
    config = JobConfig(model=str(tiny_model), stage="always", stage_dir=str(tmp_path), engine=engine)  # type: ignore[arg-type]
    assert stage_models(config, None) == Staged()


def test_what_is_no_model_is_left_to_who_opens_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model")
    for name in ("x.gguf", "gone.gguf"):
        config = JobConfig(model=str(tmp_path / name), stage="always", stage_dir=str(tmp_path))
        assert stage_models(config, None) == Staged()
        assert prepare(config, Staged()).problem is not None


def test_the_store_tells_files_and_digests(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.modelnames import open_store
    from storage.manifest import ModelName

    monkeypatch.setenv("LLMPI_HOME", str(tmp_path))
    stored = open_store().add(tiny_model, name=ModelName("mine"))
    [model] = models_of(JobConfig(model="mine"))
    assert [file.digest for file in model.files] == [stored.digest]
    assert (model.name, model.digest, model.size) == ("mine", str(stored.digest), stored.size)


def test_a_folder_that_is_none_and_a_signal_end_it(tiny_model: Path, tmp_path: Path) -> None:
    config = JobConfig(model=str(tiny_model), stage="always", stage_dir=str(tmp_path / "gone"))
    with pytest.raises(StagingError, match="gone is no folder"):
        stage_models(config, None)

    def stopped() -> None:
        raise StoppedError("enough")

    with pytest.raises(StoppedError, match="enough"):
        stage_models(JobConfig(model=str(tiny_model), stage="always", stage_dir=str(tmp_path)), None, stopped=stopped)
