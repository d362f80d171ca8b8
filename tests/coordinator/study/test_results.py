"""What a study gives: table, study.h5, picture, data."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest

from coordinator.study.design import Design
from coordinator.study.hdf5 import CELL, FORMULAS, SUMMARY, UNITS, study_h5
from coordinator.study.picture import picture
from coordinator.study.results import Results
from coordinator.study.summary import Measured, summarise, without_nan
from coordinator.study.table import print_scaling
from coordinator.terminal import PLAIN_WIDTH
from tests.coordinator.study.cells import cell, cells
from tests.storage.hdf5_rules import check_any_reader_takes

MEASURED = cells({1: [10.0, 12.0, 11.0], 4: [3.0, 4.0, 5.0]})
DESIGN = Design.checked([1, 4], 3, 7)


def state(measured: list[Measured], engine: str = "llama") -> dict[str, Any]:
    return {"identity": {"config": {"engine": engine}}, "cells": [without_nan(asdict(one)) for one in measured]}


def text_of(results: Results) -> str:
    stream = io.StringIO()
    print_scaling(stream, results.rows, 1, results.notes, Path("st"))
    return stream.getvalue()


def test_the_table_has_a_row_for_each_number_of_workers() -> None:
    lines = text_of(Results(state(MEASURED), DESIGN)).splitlines()
    titles = "workers runs time range speed-up range efficiency serial tokens/s idle starved"
    assert " ".join(lines[1].split()) == titles
    assert lines[2].split()[:3] == ["1", "3", "11.00"]
    assert " ".join(lines[3].split()) == "4 3 4.00 s 3.00 to 5.00 2.75 2.00 to 4.00 69 % 15 % 25.0 25 % 12 %"
    assert len(lines[3]) <= PLAIN_WIDTH
    assert "…" not in lines[1]
    assert lines[-1] == "study directory: st"


def test_energy_is_shown_where_it_was_measured_and_a_simulation_is_said() -> None:
    powered = text_of(Results(state([cell(1, 1, 5.0, energy_j=1200.0)], "simulated"), DESIGN))
    assert "1,200 J" in powered
    assert "the engine was simulated" in powered
    assert "energy" not in text_of(Results(state(MEASURED), DESIGN))


def test_an_unfinished_study_without_its_base_says_so() -> None:
    results = Results(state([cell(4, 1, 3.0)]), DESIGN)
    assert "nothing was measured on 1 yet" in text_of(results)
    data = json.loads(json.dumps(results.as_data(), allow_nan=False))
    assert data["complete"] is False
    assert data["scaling"][0]["speedup"] is None


def test_study_h5_is_read_by_any_reader_and_says_what_the_table_says(tmp_path: Path) -> None:
    file = tmp_path / "study.h5"
    file.write_bytes(study_h5(MEASURED, summarise(MEASURED, 1), DESIGN.as_data() | {"notes": []}))
    assert "/summary@speedup_formula" in check_any_reader_takes(file)
    with h5py.File(file, "r") as opened:
        assert opened.attrs["workers"].tolist() == [1, 4]
        assert opened.attrs["seed"] == 7
        table = pd.DataFrame.from_records(opened["cells"][:])
        summary = opened["summary"][:]
    assert table.groupby("workers")["wall_s"].median().to_dict() == {1: 11.0, 4: 4.0}
    assert summary["speedup"].tolist() == [1.0, 2.75]
    assert set(UNITS) | set(FORMULAS) <= {*(CELL.names or ()), *(SUMMARY.names or ())}


@pytest.mark.slow
@pytest.mark.parametrize("measured", [MEASURED, [cell(4, 1, 3.0)]], ids=["whole", "without its base"])
def test_the_picture_is_one(measured: list[Measured]) -> None:
    data = picture(measured, summarise(measured, 1), 1)
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1350, 600)
