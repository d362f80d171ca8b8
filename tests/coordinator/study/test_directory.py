"""The directory of a study: taken up, refused, never half."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coordinator.study.design import Design
from coordinator.study.directory import StudyDir
from scheduling.errors import RunDirError
from tests.coordinator.study.cells import cell

DESIGN = Design.checked([1, 2], 1, 0)


def identity(**changes: Any) -> dict[str, Any]:
    return {"design": DESIGN.identity(), "model": "abc", "config": {"slots": 4, "engine": "llama"}} | changes


def test_a_study_is_taken_up_with_the_cells_that_lack(tmp_path: Path) -> None:
    with StudyDir.open(tmp_path / "s", identity(), {}) as study:
        study.add(cell(2, 1, 3.5), {"hosts": ["a", "b"]})
    with StudyDir.open(tmp_path / "s", identity(), {}) as study:
        assert [one.name for one in study.lacking(DESIGN.cells())] == ["w1-r1"]
        kept = study.measured["w2-r1"]
        assert kept.wall_s == 3.5
        assert math.isnan(kept.energy_j)
        assert len(study.state["sessions"]) == 2
        assert study.state["cells"][0]["hosts"] == ["a", "b"]


def test_another_design_is_refused_by_what_differs_and_changes_nothing(tmp_path: Path) -> None:
    with StudyDir.open(tmp_path, identity(), {}) as study:
        study.add(cell(2, 1, 3.5), {})
    before = (tmp_path / "study.json").read_bytes()
    other = Design.checked([1, 2, 4], 1, 0).identity()
    with pytest.raises(RunDirError, match=r"design\.workers is \[1, 2\] there .*; model is \"abc\" there"):
        StudyDir.open(tmp_path, identity(design=other, model="xyz"), {})
    with pytest.raises(RunDirError, match=r"config\.slots is 4 there and 8 here"):
        StudyDir.open(tmp_path, identity(config={"slots": 8, "engine": "llama"}), {})
    assert (tmp_path / "study.json").read_bytes() == before


def test_a_study_without_a_measurement_may_become_another(tmp_path: Path) -> None:
    with StudyDir.open(tmp_path, identity(), {}):
        pass
    with StudyDir.open(tmp_path, identity(model="xyz"), {}) as study:
        assert study.state["identity"]["model"] == "xyz"


def test_one_job_at_a_time(tmp_path: Path) -> None:
    with (
        StudyDir.open(tmp_path, identity(), {}),
        pytest.raises(RunDirError, match=r"end it where it was started, with Ctrl-C"),
    ):
        StudyDir.open(tmp_path, identity(), {})


def test_what_a_killed_job_left_is_taken_over_and_that_is_said(tmp_path: Path) -> None:
    with StudyDir.open(tmp_path, identity(), {}) as study:
        held = (tmp_path / "lock").read_bytes()
        study.add(cell(2, 1, 3.5), {})
    (tmp_path / "lock").write_bytes(held)
    with StudyDir.open(tmp_path, identity(), {}) as study:
        [note] = study.notes
        assert note.endswith("ended without stopping in order: going on with the cells that lack")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(RunDirError, match=r"something else \(results\.jsonl\)"):
        StudyDir.open(tmp_path, identity(), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "llmpi-study", "version": 9}'])
def test_a_damaged_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(RunDirError, match=r"study\.json (is damaged|was not written)"):
        StudyDir.open(tmp_path, identity(), {})


def test_what_a_cell_left_when_it_was_cut_off_is_removed(tmp_path: Path) -> None:
    with StudyDir.open(tmp_path, identity(), {}) as study:
        left = study.fresh_cell("w1-r1")
        left.mkdir(parents=True)
        (left / "results.jsonl").write_text("{}\n")
        assert study.fresh_cell("w1-r1") == left
        assert not left.exists()
    assert json.loads((tmp_path / "study.json").read_text())["cells"] == []
