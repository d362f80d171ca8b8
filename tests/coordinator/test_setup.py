"""What a rank finds out about its model and adapters before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from coordinator.config import JobConfig
from coordinator.setup import prepare
from storage.staging import Staged, StagedModel
from tests.adapters import random_pair, write_adapter
from workers.protocol import Adapter

QUERY = "blk.0.attn_q.weight"


def test_an_adapter_is_part_of_what_all_ranks_must_agree_on(tiny_model: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", {QUERY: random_pair(64, 64)})
    plain = prepare(JobConfig(model=str(tiny_model)))
    adapted = prepare(JobConfig(model=str(tiny_model), loras=(f"{path}:0.5",)))
    assert adapted.problem is None
    assert adapted.model.adapters == (Adapter(str(path), 0.5),)
    assert adapted.model.adapter_bytes == 4 * (4 * 64 + 4 * 64)
    other = prepare(JobConfig(model=str(tiny_model), loras=(str(path),)))
    prints = {one.hello().model_fingerprint for one in (plain, adapted, other)}
    assert len(prints) == 3
    assert adapted.adapters != other.adapters


def test_an_adapter_that_cannot_be_used_is_the_ranks_problem(tiny_model: Path, tmp_path: Path) -> None:
    wrong = write_adapter(tmp_path / "a.gguf", {QUERY: random_pair(64, 64)}, architecture="gemma")
    for path, word in ((wrong, "gemma"), (tmp_path / "none.gguf", "does not exist"), (tiny_model, "is no adapter")):
        problem = prepare(JobConfig(model=str(tiny_model), loras=(str(path),))).problem
        assert problem is not None
        assert word in str(problem)
        assert "\n" not in str(problem)


def test_of_a_staged_model_it_is_known_where_it_came_from(tiny_model: Path) -> None:
    """The copy may be gone when the run is done again."""
    copy = StagedModel(tiny_model, "big", None, "/far/big.gguf")
    staged = prepare(JobConfig(model="far/big.gguf"), Staged({"model": copy}))
    assert (staged.model.path, staged.source) == (str(tiny_model), "/far/big.gguf")
    assert prepare(JobConfig(model=str(tiny_model))).source == ""
