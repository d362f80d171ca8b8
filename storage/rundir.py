"""The run directory: what one run is, who works on it, how far it is, and how to ask it to stop.

    run.json        identity, configuration, sessions, `complete`: replaced as a whole, never edited in place
    requests.jsonl  the input, where it could not be read in place: written before the first session
    results.jsonl   the record of answers                       (storage.record, storage.recovery)
    results.synced  how long that was after its last sync       (storage.record)
    metrics.d/      telemetry and counters, an interval each    (storage.segments)
    metrics.h5      made from the two above                     (storage.metrics)
    lock            held by the job that works here             (storage.joblock)
    lock.beat       counts while it lives, where locks do not reach other hosts
    stop            there while somebody wants the job to drain

The identity is what must not change between sessions of one run (input, model, sampling...); it is a dictionary
of the caller's and not looked into here. A run is complete when run.json says so, which is the last durable act.
`status` and `request_stop` need no lock and work from any host.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scheduling.errors import (
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_SOME_FAILED,
    BugError,
    LlmpiError,
    RecordError,
    RunDirError,
)
from storage.files import FAILS_OF_DISKS, Disk, OsDisk, read_all, replace_file
from storage.joblock import BEAT_SUFFIX, Holder, JobLock, Judge, holder_of, this_process, utc_text
from storage.recovery import RECORD_NAME, scan

RUN_NAME = "run.json"
REQUESTS_NAME = "requests.jsonl"
LOCK_NAME = "lock"
BEAT_NAME = LOCK_NAME + BEAT_SUFFIX
STOP_NAME = "stop"
METRICS_NAME = "metrics.h5"
SEGMENTS_NAME = "metrics.d"

_FORMAT = "llmpi-run"
_VERSION = 1
_BEFORE_RUN_JSON = {LOCK_NAME, BEAT_NAME, STOP_NAME, f".{RUN_NAME}.tmp", REQUESTS_NAME, f".{REQUESTS_NAME}.tmp"}
_JOB_OUTPUT = (".out", ".err", ".log")
_DIFFERENCES_SHOWN = 3

Json = Any
"""What json can hold. Other values in details (paths, numpy numbers) are stored as their text."""


class RunDir:
    """A run directory that this process works on. Made by `create_or_resume`; locked until `close`.

    `resumed`: an earlier session was here. `complete`: there is nothing left to do. `session`: number of this
    session, from 0. `notes`: what a person should be told (a lock taken over). Writing methods raise RecordError
    where the disk fails (full, I/O error, read-only), else RunDirError.
    """

    def __init__(
        self, path: Path, disk: Disk, lock: JobLock, state: dict[str, Json], now_unix_s: Callable[[], float]
    ) -> None:
        self.path = path
        self.record_path = path / RECORD_NAME
        self.metrics_path = path / METRICS_NAME
        self.segments_path = path / SEGMENTS_NAME
        self.notes: list[str] = [lock.note] if lock.note else []
        self._disk = disk
        self._lock = lock
        self._state = state
        self._now_unix_s = now_unix_s
        self.session = len(state["sessions"])
        self.resumed = self.session > 0

    @classmethod
    def create_or_resume(
        cls,
        path: Path,
        identity: Mapping[str, Json],
        details: Mapping[str, Json] | None = None,
        session: Mapping[str, Json] | None = None,
        *,
        held: JobLock | None = None,
        disk: Disk | None = None,
        now_unix_s: Callable[[], float] = time.time,
        judge: Judge | None = None,
    ) -> RunDir:
        """Make the directory, or take up the run that is in it.

        `held` is the directory's lock where the caller has it already (`lock_run`); it is this call's from here on.

        `details` (configuration, versions, MPI library, seeds...) replace those of the last session; `session`
        (ranks, launcher, hosts, Slurm job...) is added to the list of sessions, unless the run is complete.
        Raises RunDirError: not writable, locked, foreign content, another identity, run.json damaged. RecordError: the
        disk fails (full, I/O error, read-only).
        """
        disk = disk or OsDisk()
        path = Path(path)
        lock = lock_run(path, disk=disk, now_unix_s=now_unix_s, judge=judge) if held is None else held
        try:
            state = read_run(path, disk) if disk.exists(path / RUN_NAME) else None
            wanted = _plain(identity)
            if state is not None and not state["complete"] and not holds_answers(path, disk):
                state["identity"] = wanted  # nothing was ever answered here: it may become another run
                state["total"] = None
            if state is None:
                state = {"format": _FORMAT, "version": _VERSION, "identity": wanted, "details": {}}
                state |= {"total": None, "sessions": [], "complete": False}
            refuse_other_run(path, state["identity"], wanted)
            run = cls(path, disk, lock, state, now_unix_s)
            disk.remove(path / STOP_NAME)
            if not run.complete:
                state["details"] = _plain(details or {})
                started = {"session": run.session, "started_at": utc_text(now_unix_s())}
                state["sessions"].append(started | _plain(session or {}))
                run._store()
            return run
        except OSError as error:
            lock.release()
            raise unusable(path, error) from error
        except BaseException:
            lock.release()
            raise

    @property
    def complete(self) -> bool:
        return bool(self._state["complete"])

    @property
    def total(self) -> int | None:
        """Requests of the whole input, if they have been counted."""
        total: int | None = self._state["total"]
        return total

    @property
    def sessions(self) -> list[dict[str, Json]]:
        """What run.json says of each session, this one last."""
        return [dict(session) for session in self._state["sessions"]]

    def set_total(self, total: int) -> None:
        """Store how many requests the input has: `status` needs it."""
        if total != self._state["total"]:
            self._state["total"] = total
            self._store()

    def add_details(self, details: Mapping[str, Json]) -> None:
        """Store further facts of the run."""
        self._state["details"].update(_plain(details))
        self._store()

    def add_session_facts(self, facts: Mapping[str, Json]) -> None:
        """Store what is known of this session only after it started (hosts, GPUs) or at its end (exit code)."""
        if self.session < len(self._state["sessions"]):
            self._state["sessions"][self.session].update(_plain(facts))
            self._store()

    def stop_requested(self) -> bool:
        """Whether somebody asked this job to drain. To be polled about once a second. Raises like `check_held`."""
        self.check_held()
        try:
            return self._disk.exists(self.path / STOP_NAME)
        except OSError:
            return False  # a disk that fails is found by who writes what counts

    def check_held(self) -> None:
        """Raises RunDirError if another job has taken the directory over, this one having given no sign of life."""
        self._lock.check()

    def mark_complete(self, summary: Mapping[str, Json] | None = None) -> None:
        """Say that every request is recorded and the metrics are written: the last durable act of a run."""
        if self.complete:
            raise BugError(f"{self.path} is marked complete a second time")
        self._state["summary"] = _plain(summary or {})
        self._state["completed_at"] = utc_text(self._now_unix_s())
        self._state["complete"] = True
        self._store()

    def reopen(self) -> None:
        """A run that called itself complete is not: its record has lost answers. Starts a session on it."""
        self._state["complete"] = False
        self._state["sessions"].append({"session": self.session, "started_at": utc_text(self._now_unix_s())})
        self._store()

    def close(self) -> None:
        """Answer a request to stop by removing it, and let others in. Never raises OSError."""
        with contextlib.suppress(OSError):  # It is removed at the next start, too.
            self._disk.remove(self.path / STOP_NAME)
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _store(self) -> None:
        try:
            text = json.dumps(self._state, indent=1, ensure_ascii=False) + "\n"
            replace_file(self._disk, self.path / RUN_NAME, text.encode("utf-8", "replace"))
        except OSError as error:
            raise unusable(self.path, error) from error


def lock_run(
    path: Path,
    *,
    disk: Disk | None = None,
    now_unix_s: Callable[[], float] = time.time,
    judge: Judge | None = None,
) -> JobLock:
    """Make the directory if it is not there, and lock it. Raises like `RunDir.create_or_resume`."""
    disk = disk or OsDisk()
    try:
        _prepare(disk, path)
        return JobLock(disk, path / LOCK_NAME, this_process(now_unix_s()), judge)
    except OSError as error:
        raise unusable(path, error) from error


@dataclass(frozen=True)
class Status:
    """How far a run is, by its record.

    `total` None: the input was not counted. `torn_bytes`: an unfinished line, being written or cut by a crash.
    """

    path: Path
    ok: int
    failed: int
    total: int | None
    complete: bool
    running: bool
    holder: Holder | None
    sessions: int
    record_bytes: int
    torn_bytes: int

    @property
    def done(self) -> int:
        return self.ok + self.failed

    @property
    def exit_code(self) -> int:
        """0 all answered; 1 complete, some failed; 3 not complete: the same command goes on."""
        if not self.complete:
            return EXIT_RESUMABLE
        return EXIT_SOME_FAILED if self.failed else EXIT_OK


def status(path: Path, disk: Disk | None = None, judge: Judge | None = None) -> Status:
    """Read how far the run in `path` is. Writes nothing; works while a job runs there.

    A run that calls itself complete but whose record lacks requests is not complete. Raises RunDirError if there
    is no run, or the record is damaged.
    """
    disk = disk or OsDisk()
    path = Path(path)
    state = read_run(path, disk)
    found = scan(disk, path / RECORD_NAME)
    try:
        running, holder = holder_of(disk, path / LOCK_NAME, judge)
    except OSError:
        running, holder = False, None  # Not ours to read: then the record alone is told of.
    total: int | None = state["total"]
    return Status(
        path=path,
        ok=found.ok,
        failed=found.failed,
        total=total,
        complete=bool(state["complete"]) and (total is None or found.done >= total),
        running=running,
        holder=holder,
        sessions=len(state["sessions"]),
        record_bytes=found.durable_bytes,
        torn_bytes=found.torn_bytes,
    )


def request_stop(path: Path, disk: Disk | None = None, judge: Judge | None = None) -> Holder | None:
    """Ask the job that works on `path` to drain; returns who that is, if known.

    Raises RunDirError if there is no run, or no job works on it.
    """
    disk = disk or OsDisk()
    path = Path(path)
    read_run(path, disk)
    try:
        running, holder = holder_of(disk, path / LOCK_NAME, judge)
        if not running:
            raise RunDirError(f"no job is running on {path}: there is nothing to stop.")
        replace_file(disk, path / STOP_NAME, b"stop\n")
    except OSError as error:
        raise unusable(path, error) from error
    return holder


def is_held(path: Path, disk: Disk | None = None, judge: Judge | None = None) -> bool:
    """Whether a job works on `path`. Raises RunDirError where that cannot be read."""
    try:
        return holder_of(disk or OsDisk(), Path(path) / LOCK_NAME, judge)[0]
    except OSError as error:
        raise unusable(path, error) from error


def read_run(path: Path, disk: Disk | None = None) -> dict[str, Json]:
    """The content of run.json. Raises RunDirError if it is not there, unreadable or of another version."""
    disk = disk or OsDisk()
    file = path / RUN_NAME
    disk.refresh(file)
    try:
        state = json.loads(read_all(disk, file))
    except FileNotFoundError as error:
        raise RunDirError(f"{path} is no run directory: it has no {RUN_NAME}.") from error
    except NotADirectoryError as error:
        raise RunDirError(f"{path} is no directory.") from error
    except OSError as error:
        raise RunDirError(f"cannot read {file}: {_why(error)}.") from error
    except ValueError as error:
        raise RunDirError(f"{file} is damaged ({error}). Restore it, or give another run directory.") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise RunDirError(f"{file} was not written by llmpi. Give another run directory.")
    if state.get("version") != _VERSION:
        raise RunDirError(
            f"{file} has format version {state.get('version')}, this llmpi reads {_VERSION}. Use the llmpi that "
            "started the run."
        )
    if not _well_formed(state):
        raise RunDirError(f"{file} is damaged: it lacks what every run has. Give another run directory.")
    return state


def _well_formed(state: dict[str, Json]) -> bool:
    return (
        isinstance(state.get("identity"), dict)
        and isinstance(state.get("details"), dict)
        and isinstance(state.get("sessions"), list)
        and isinstance(state.get("total"), int | None)
        and isinstance(state.get("complete"), bool)
    )


def holds_answers(path: Path, disk: Disk | None = None) -> bool:
    """Whether anything has been recorded in `path`."""
    disk = disk or OsDisk()
    record = path / RECORD_NAME
    if not disk.exists(record):
        return False
    with disk.open_read(record) as file:
        return bool(file.read(1))


def _prepare(disk: Disk, path: Path) -> None:
    """Make the directory if it is not there; refuse one that holds something else. Writes nothing into it."""
    if disk.exists(path) and not disk.is_dir(path):
        raise RunDirError(f"{path} is not a directory. Give another run directory.")
    if not disk.exists(path):
        disk.make_dirs(path)
    names = disk.list_dir(path)
    if RUN_NAME in names:
        return
    # Also where it is there already: whoever made it may have been killed before its name was durable. A parent that
    # we may not read: its file system decides when that is.
    with contextlib.suppress(PermissionError):
        disk.sync_dir(path.parent)
    foreign = [name for name in names if name not in _BEFORE_RUN_JSON and not name.endswith(_JOB_OUTPUT)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise RunDirError(f"{path} is not empty and no run directory (it holds {shown}). Give another one.")


def refuse_other_run(path: Path, there: Mapping[str, Json], here: Mapping[str, Json]) -> None:
    """Raise RunDirError, naming what differs, unless the identities of two runs are the same."""
    differences = _differences("", dict(there), dict(here))
    if differences:
        shown = "; ".join(differences[:_DIFFERENCES_SHOWN])
        more = len(differences) - _DIFFERENCES_SHOWN
        raise RunDirError(
            f"{path} holds another run: {shown}{f'; and {more} more' if more > 0 else ''}. Give another run "
            "directory, or the same command as before to resume."
        )


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


def _plain(values: Mapping[str, Json]) -> dict[str, Json]:
    """As json will give it back: tuples are lists, keys and whatever json does not know are text."""
    plain: dict[str, Json] = json.loads(json.dumps(dict(values), default=_json_value))
    return plain


def _json_value(value: object) -> Json:
    return value.item() if isinstance(value, np.generic) else str(value)


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def unusable(path: Path, error: OSError) -> LlmpiError:
    """What to raise where the operating system refused something in a run directory."""
    if error.errno in FAILS_OF_DISKS:
        return RecordError(
            f"cannot write to the run directory {path}: {_why(error)}. What is recorded is safe; free space or mend "
            "the file system, then run the same command again."
        )
    advice = "Mend that, or give a run directory that can be written"
    return RunDirError(f"cannot use {path} as run directory: {_why(error)}. {advice}.")
