"""The directory of a study, and the one job that works on it.

    study.json      identity, design, sessions, and what each cell was like: replaced as a whole
    study.h5        the same as tables                (coordinator.study.hdf5)
    scaling.png     a picture                         (coordinator.study.picture)
    cells/w2-r1/    a cell's run directory, as `llmpi batch` makes it
    lock            held by the job that works here

A cell counts once study.json has it. One that was cut off is measured anew: two halves are no measurement.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator.study.design import Cell
from coordinator.study.summary import Measured, without_nan
from scheduling.errors import RunDirError
from storage.files import OsDisk, replace_file
from storage.joblock import BEAT_SUFFIX, JobLock, this_process, utc_text
from storage.runjson import STUDY_NAME, plain, told_differences, unusable

CELLS_NAME, LOCK_NAME = "cells", "lock"
WARM_UP_NAME = "warm-up"
WAY = "where it was started, with Ctrl-C or scancel"
FORMAT, VERSION = "llmpi-study", 1
_BEFORE_STUDY_JSON = {LOCK_NAME, LOCK_NAME + BEAT_SUFFIX, f".{STUDY_NAME}.tmp", CELLS_NAME}
_JOB_OUTPUT = (".out", ".err", ".log")


class StudyDir:
    """See the module's text. Made by `open`; locked until it is left. `measured`: by the name of the cell."""

    def __init__(self, path: Path, lock: JobLock, state: dict[str, Any]) -> None:
        self.path = path
        self._lock = lock
        self._state = state
        self.notes = [lock.note] if lock.note else []

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any], details: Mapping[str, Any]) -> StudyDir:
        """Make the directory, or take up the study in it. `identity`: what must be the same for that.

        Raises RunDirError: locked, of another study, or not to be used; RecordError: the disk fails.
        """
        disk = OsDisk()
        wanted = plain(identity)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            lock = JobLock(
                disk, path / LOCK_NAME, this_process(time.time()), goes_on="with the cells that lack", way=WAY
            )
        except OSError as error:
            raise unusable(path, error) from error
        try:
            state = read_study(path) if (path / STUDY_NAME).exists() else None
            if state is not None and not state["cells"]:
                state["identity"] = wanted  # nothing was measured: it may become another study
            if state is None:
                state = {"format": FORMAT, "version": VERSION, "identity": wanted, "sessions": [], "cells": []}
            if told := told_differences(state["identity"], wanted):
                raise RunDirError(
                    f"{path} holds another study: {told}. Give another directory with -o, or the same command as "
                    "before to go on with it."
                )
            state["sessions"].append({"started_at": utc_text(time.time())} | plain(details))
            study = cls(path, lock, state)
            study._store()
            return study
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> StudyDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    @property
    def measured(self) -> dict[str, Measured]:
        return {cell.name: cell for cell in measured_of(self._state)}

    def fresh_cell(self, name: str) -> Path:
        """Where a cell is to run. What was cut off there is removed."""
        path = self.path / CELLS_NAME / name
        try:
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            raise unusable(path, error) from error
        return path

    def add(self, measured: Measured, facts: Mapping[str, Any]) -> None:
        """A cell has been measured. `facts`: what else is known of it."""
        self._state["cells"].append(without_nan(asdict(measured)) | plain(facts))
        self._store()

    def lacking(self, cells: list[Cell]) -> list[Cell]:
        done = self.measured
        return [cell for cell in cells if cell.name not in done]

    def write(self, name: str, data: bytes) -> None:
        """A file of the study, which appears whole. Raises RecordError or RunDirError."""
        try:
            replace_file(OsDisk(), self.path / name, data)
        except OSError as error:
            raise unusable(self.path, error) from error

    def _store(self) -> None:
        self.write(STUDY_NAME, json.dumps(self._state, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n")


def read_study(path: Path) -> dict[str, Any]:
    """study.json of a directory. Raises RunDirError if it is damaged, or of another version."""
    file = path / STUDY_NAME
    try:
        state = json.loads(file.read_bytes())
        whole = {"identity", "sessions", "cells"} <= state.keys() and state["format"] == FORMAT
        if whole and state["version"] == VERSION:
            measured_of(state)
            return dict(state)
    except OSError as error:
        raise unusable(path, error) from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise RunDirError(f"{file} is damaged ({error}). Restore it, or give another directory.") from error
    raise RunDirError(f"{file} was not written by this version of llmpi. Give another directory.")


def measured_of(state: Mapping[str, Any]) -> list[Measured]:
    """The cells of study.json. NaN where it has null."""
    names = [field.name for field in fields(Measured)]
    found = []
    for cell in state["cells"]:
        values: dict[str, Any] = {name: float("nan") if cell[name] is None else cell[name] for name in names}
        found.append(Measured(**values))
    return found


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    foreign = sorted(name for name in names - _BEFORE_STUDY_JSON if not name.endswith(_JOB_OUTPUT))
    if STUDY_NAME not in names and foreign:
        raise RunDirError(f"{path} holds something else ({foreign[0]}): give an empty or a new directory with -o")
