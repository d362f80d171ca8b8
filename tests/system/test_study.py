"""`llmpi study scaling` on the simulated engine: real ranks, real cells, a study that is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.launch import Argument, Launcher
from tests.storage.hdf5_rules import check_any_reader_takes
from tests.system.runs import Run, check_one_clear_line, check_ranks_add_up, prompts, until, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 12
IDS = [f"r{k}" for k in range(REQUESTS)]
CELLS = {f"w{workers}-r{repeat}" for workers in (1, 2, 3) for repeat in (1, 2)}


def study(tmp_path: Path, *options: Argument) -> tuple[Argument, ...]:
    given = write_lines(tmp_path / "in.jsonl", [line | {"max_tokens": 8} for line in prompts(REQUESTS)])
    simulated = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 2, "--time-scale", "0.01")
    return ("study", "scaling", *simulated, "-i", given, "-o", tmp_path / "study", "--no-warm-up", *options)


def measured(tmp_path: Path) -> dict[str, dict[str, Any]]:
    file = tmp_path / "study" / "study.json"
    return {cell["name"]: cell for cell in json.loads(file.read_text())["cells"]} if file.exists() else {}


def workers_of(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = Run(tmp_path / "study" / "cells" / name).about()["sessions"][0]["workers"]
    return workers


def test_a_study_that_was_killed_measures_what_lacks_and_nothing_twice(mpirun: Launcher, tmp_path: Path) -> None:
    words = study(tmp_path, "--workers", "1,2,3", "--repeats", 2)
    with mpirun.start(4, *words) as job:
        until(lambda: measured(tmp_path) or job.process.poll() is not None, "a cell that is measured")
        job.kill()
    kept = measured(tmp_path)
    assert 1 <= len(kept) < len(CELLS)

    done = mpirun(4, *words, "--json")
    assert done.rc == 0, done.output
    assert f"{len(kept)} of 6 cells are measured" in done.stderr, done.output
    cells = measured(tmp_path)
    assert cells.keys() == CELLS
    assert {name: cells[name] for name in kept} == kept
    for name, cell in cells.items():
        run = Run(tmp_path / "study" / "cells" / name)
        run.check_whole(IDS)
        check_ranks_add_up(run)
        assert len(run.about()["sessions"]) == 1
        assert set(run.metrics()["ranks"]["rank"]) == set(range(1, 1 + cell["workers"]))
        assert (cell["requests"], cell["slots"]) == (REQUESTS, 2 * cell["workers"])
        assert cell["wall_s"] > 0
        assert cell["load_s"] > 0
        assert 0 <= cell["starved_share"] <= cell["idle_share"] <= 1

    # The processors of the host are divided as for three, also where one works alone.
    (three,) = {worker["threads"] for worker in workers_of(tmp_path, "w3-r1")}
    assert {worker["threads"] for name in CELLS for worker in workers_of(tmp_path, name)} == {three}

    said = json.loads(done.stdout)
    assert said["complete"] is True
    table = {row["workers"]: row for row in said["scaling"]}
    medians = {k: sum(cells[f"w{k}-r{r}"]["wall_s"] for r in (1, 2)) / 2 for k in (1, 2, 3)}
    for k in (1, 2, 3):
        assert table[k]["speedup"] == pytest.approx(medians[1] / medians[k])
        assert table[k]["efficiency"] == pytest.approx(medians[1] / medians[k] / k)
    check_any_reader_takes(tmp_path / "study" / "study.h5")
    with h5py.File(tmp_path / "study" / "study.h5", "r", locking=False) as file:
        assert sorted(name.decode() for name in file["cells"]["name"]) == sorted(CELLS)
    picture = tmp_path / "study" / "scaling.png"
    # The environment of one of the two MPIs may lack matplotlib: then that is said.
    assert picture.exists() is ("no picture: that needs matplotlib" not in done.stderr)


def test_more_workers_than_ranks_are_told_once(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(2, *study(tmp_path, "--workers", "1,2", "--repeats", 1))
    check_one_clear_line(done, 2, "needs 2 worker ranks", "mpirun -n 3")
    assert not (tmp_path / "study").exists()
