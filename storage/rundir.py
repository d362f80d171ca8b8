"""The run directory: what is in it, and how the one job that works on it makes, locks, describes and ends it.

    run.json        identity, configuration, sessions, `complete`: replaced as a whole  (storage.runjson)
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
How far it is and how to ask it to stop, without its lock, is in `storage.runstatus`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from scheduling.errors import BugError, RecordError, RunDirError
from storage.files import Disk, OsDisk, replace_file
from storage.joblock import BEAT_SUFFIX, JobLock, Judge, this_process, utc_text
from storage.recovery import RECORD_NAME
from storage.runjson import (
    FORMAT,
    RUN_NAME,
    SLURM_NAME,
    VERSION,
    Json,
    plain,
    read_run,
    refuse_other_run,
    unusable,
)

REQUESTS_NAME = "requests.jsonl"
LOCK_NAME = "lock"
BEAT_NAME = LOCK_NAME + BEAT_SUFFIX
STOP_NAME = "stop"
METRICS_NAME = "metrics.h5"
SEGMENTS_NAME = "metrics.d"

_BEFORE_RUN_JSON = {
    LOCK_NAME, BEAT_NAME, STOP_NAME, f".{RUN_NAME}.tmp", REQUESTS_NAME, f".{REQUESTS_NAME}.tmp", SLURM_NAME,
}  # fmt: skip
_JOB_OUTPUT = (".out", ".err", ".log")


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
            wanted = plain(identity)
            if state is not None and not state["complete"] and not holds_answers(path, disk):
                state["identity"] = wanted  # nothing was ever answered here: it may become another run
                state["total"] = None
            if state is None:
                state = {"format": FORMAT, "version": VERSION, "identity": wanted, "details": {}}
                state |= {"total": None, "sessions": [], "complete": False}
            refuse_other_run(path, state["identity"], wanted)
            run = cls(path, disk, lock, state, now_unix_s)
            if not run.complete:
                state["details"] = plain(details or {})
                started = {"session": run.session, "started_at": utc_text(now_unix_s())}
                state["sessions"].append(started | plain(session or {}))
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
        self._state["details"].update(plain(details))
        self._store()

    def add_session_facts(self, facts: Mapping[str, Json]) -> None:
        """Store what is known of this session only after it started (hosts, GPUs) or at its end (exit code)."""
        if self.session < len(self._state["sessions"]):
            self._state["sessions"][self.session].update(plain(facts))
            self._store()

    def stop_requested(self) -> bool:
        """Whether somebody asked this job to drain. To be polled about once a second. Raises like `check_held`."""
        self.check_held()
        try:
            return self._disk.exists(self.path / STOP_NAME)
        except OSError:
            return False  # a disk that fails is found by who writes what counts

    def check_held(self) -> None:
        """Raises RunDirError if another job has taken the directory over, this one having given no sign of life.
        RecordError if it is there no more: then what is written would be acknowledged and found by nobody."""
        self._lock.check()
        if not self._disk.exists(self.path / RUN_NAME) and self._is_gone():
            raise RecordError(
                f"{self.path} was removed or renamed while this job worked on it, or its file system is not connected "
                "any more: the job ends here. When the directory is back the same command again goes on."
            )

    def _is_gone(self) -> bool:
        """Whether that is so, and not a file system that answers nothing just now."""
        try:
            return RUN_NAME not in self._disk.list_dir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def mark_complete(self, summary: Mapping[str, Json] | None = None) -> None:
        """Say that every request is recorded and the metrics are written: the last durable act of a run."""
        if self.complete:
            raise BugError(f"{self.path} is marked complete a second time")
        self._state["summary"] = plain(summary or {})
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
        left = disk.exists(path / STOP_NAME)  # meant for an earlier job
        lock = JobLock(disk, path / LOCK_NAME, this_process(now_unix_s()), judge)
        try:
            if left:  # what came since the lock was there is for this job
                disk.remove(path / STOP_NAME)
        except BaseException:
            lock.release()
            raise
        return lock
    except FileNotFoundError as error:
        # What lacked above it has been made, so the kernel's "No such file or directory" would help nobody.
        raise RunDirError(
            f"cannot use {path} as run directory: nothing can be made there (is it below /proc?). Give another one."
        ) from error
    except OSError as error:
        raise unusable(path, error) from error


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
