"""What a study found, for people and for programs: tables, study.h5, a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from coordinator.simulated import WARNING
from coordinator.study.design import Design
from coordinator.study.directory import StudyDir, measured_of, read_study
from coordinator.study.hdf5 import STUDY_H5_NAME, study_h5
from coordinator.study.picture import PICTURE_NAME, available, picture
from coordinator.study.summary import doubts, summarise, without_nan
from coordinator.study.table import print_scaling
from scheduling.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_SOME_FAILED, RunDirError
from storage.runjson import STUDY_NAME


def show_study(path: Path, *, as_json: bool) -> int:
    """Print the results of a study again. Returns 0, 1 if requests failed, 3 if cells lack.

    Raises:
        RunDirError: there is no study.
    """
    if not (path / STUDY_NAME).exists():
        raise RunDirError(f"{path} is no directory of a study: it has no {STUDY_NAME}")
    state = read_study(path)
    given = state["identity"]["design"]
    results = Results(state, Design(tuple(given["workers"]), given["repeats"], given["seed"], given["warm_up"]))
    if results.rows or as_json:
        results.print(sys.stdout, path, as_json=as_json, quiet=False)
    if not results.complete:
        of = len(given["workers"]) * given["repeats"]
        print(f"{of - len(results.cells)} of {of} cells lack; the same command goes on with them", file=sys.stderr)
    return results.exit_code()


class Results:
    """Of study.json's `state`."""

    def __init__(self, state: dict[str, Any], design: Design) -> None:
        self._design = design
        self.cells = sorted(measured_of(state), key=lambda cell: cell.order)
        self.rows = summarise(self.cells, design.base)
        self.notes = doubts(self.cells)
        self._simulated = state["identity"]["config"]["engine"] == "simulated"
        if self._simulated:
            self.notes.insert(0, WARNING)
        if not any(cell.workers == design.base for cell in self.cells):
            self.notes.append(f"nothing was measured on {design.base} yet: there is no speed-up")

    @property
    def complete(self) -> bool:
        return len(self.cells) == len(self._design.cells())

    def exit_code(self) -> int:
        """Of a study that nothing else is wrong with."""
        if not self.complete:
            return EXIT_RESUMABLE
        return EXIT_SOME_FAILED if any(cell.failed for cell in self.cells) else EXIT_OK

    def write(self, study: StudyDir, say: Callable[[str], None]) -> None:
        """study.h5 and the picture; without matplotlib that is said. Raises RecordError or RunDirError."""
        study.write(STUDY_H5_NAME, study_h5(self.cells, self.rows, self._design.as_data() | {"notes": self.notes}))
        if not available():
            say("no picture: that needs matplotlib (pip install 'llmpi[report]')")
        else:
            study.write(PICTURE_NAME, picture(self.cells, self.rows, self._design.base, simulated=self._simulated))

    def print(self, stream: IO[str], path: Path, *, as_json: bool, quiet: bool) -> None:
        if as_json:
            from coordinator.values import print_json

            print_json(self.as_data() | {"study_dir": str(path)})
        elif not quiet:
            print_scaling(stream, self.rows, self._design.base, self.notes, path)

    def as_data(self) -> dict[str, Any]:
        return {
            "design": self._design.as_data(),
            "complete": self.complete,
            "cells": [
                without_nan(
                    asdict(cell)
                    | {"output_tokens_per_s": cell.output_tokens_per_s, "total_tokens_per_s": cell.total_tokens_per_s}
                )
                for cell in self.cells
            ],
            "scaling": [without_nan(asdict(row)) for row in self.rows],
            "notes": self.notes,
        }
