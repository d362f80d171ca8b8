"""run.json: what one run is. Read and checked; what is in it is the caller's, but for what every run has.

Also what there is to say where the operating system refuses something in a run directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scheduling.errors import LlmpiError, RecordError, RunDirError
from storage.files import FAILS_OF_DISKS, Disk, OsDisk, read_all
from storage.recovery import RECORD_NAME

RUN_NAME = "run.json"
SLURM_NAME = "slurm"
"""Folder for the scripts and logs of jobs, which are there before a run is."""
JOBS_NAME = "jobs.jsonl"
"""In it: what became of the jobs."""
STUDY_NAME = "study.json"
"""What a study has instead of run.json."""

FORMAT = "llmpi-run"
VERSION = 1
_DIFFERENCES_SHOWN = 3

Json = Any
"""What json can hold. Other values in details (paths, numpy numbers) are stored as their text."""


def read_run(path: Path, disk: Disk | None = None) -> dict[str, Json]:
    """The content of run.json. Raises RunDirError if it is not there, unreadable or of another version."""
    disk = disk or OsDisk()
    file = path / RUN_NAME
    disk.refresh(file)
    try:
        state = json.loads(read_all(disk, file))
    except FileNotFoundError as error:
        raise RunDirError(_why_no_run(path, disk)) from error
    except NotADirectoryError as error:
        raise RunDirError(f"{path} is no directory.") from error
    except OSError as error:
        raise RunDirError(f"cannot read {file}: {_why(error)}.") from error
    except ValueError as error:
        raise RunDirError(f"{file} is damaged ({error}). Restore it, or give another run directory.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunDirError(f"{file} was not written by llmpi. Give another run directory.")
    if state.get("version") != VERSION:
        raise RunDirError(
            f"{file} has format version {state.get('version')}, this llmpi reads {VERSION}. Use the llmpi that "
            "started the run."
        )
    if not _well_formed(state):
        raise RunDirError(f"{file} is damaged: it lacks what every run has. Give another run directory.")
    return state


def _why_no_run(path: Path, disk: Disk) -> str:
    """What is said of a directory without run.json."""
    if disk.exists(path / SLURM_NAME / JOBS_NAME):
        return (
            f"no job has begun the run in {path} yet: one is in Slurm's queue (`squeue` shows it, `scancel` ends "
            f"it), or the last log in {path / SLURM_NAME} says why there is none."
        )
    if disk.exists(path / STUDY_NAME):
        return f"{path} is the directory of a study: `llmpi study show {path}` prints it."
    return f"{path} is no run directory: it has no {RUN_NAME}."


def _well_formed(state: dict[str, Json]) -> bool:
    return (
        isinstance(state.get("identity"), dict)
        and isinstance(state.get("details"), dict)
        and isinstance(state.get("sessions"), list)
        and isinstance(state.get("total"), int | None)
        and isinstance(state.get("complete"), bool)
    )


def refuse_other_run(path: Path, there: Mapping[str, Json], here: Mapping[str, Json]) -> None:
    """Raise RunDirError, naming what differs, unless the identities of two runs are the same."""
    if told := told_differences(there, here):
        raise RunDirError(
            f"{path} holds another run: {told}. Give another run directory, or the same command as before to resume."
        )


def told_differences(there: Mapping[str, Json], here: Mapping[str, Json]) -> str:
    """In what two identities differ, for people; empty if in nothing."""
    found = _differences("", dict(there), dict(here))
    more = len(found) - _DIFFERENCES_SHOWN
    return "; ".join(found[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _differences(name: str, there: Json, here: Json) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            found += _differences(inner, there.get(key), here.get(key))
        return found
    if there == here:
        return []
    return [f"{name} is {_short(there)} there and {_short(here)} here"]


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(values: Mapping[str, Json]) -> dict[str, Json]:
    """As json will give it back: tuples are lists, keys and whatever json does not know are text."""
    found: dict[str, Json] = json.loads(json.dumps(dict(values), default=_json_value))
    return found


def _json_value(value: object) -> Json:
    return value.item() if isinstance(value, np.generic) else str(value)


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def unusable(path: Path, error: OSError) -> LlmpiError:
    """What to raise where the operating system refused something in a run directory."""
    if error.errno in FAILS_OF_DISKS:
        begun = os.path.lexists(path / RECORD_NAME)
        safe, other = ("What is recorded is safe; free", "") if begun else ("Free", ", or give another run directory")
        return RecordError(
            f"cannot write to the run directory {path}: {_why(error)}. {safe} space or mend the file system, then run "
            f"the same command again{other}."
        )
    advice = "Mend that, or give a run directory that can be written"
    return RunDirError(f"cannot use {path} as run directory: {_why(error)}. {advice}.")
