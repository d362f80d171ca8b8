"""How far a run is, and how to ask the job that works on it to stop: from any host, and without its lock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_SOME_FAILED, RunDirError
from storage.files import Disk, OsDisk
from storage.joblock import Holder, Judge, holder_of
from storage.recovery import RECORD_NAME, scan
from storage.rundir import LOCK_NAME, STOP_NAME
from storage.runjson import read_run, unusable


@dataclass(frozen=True)
class Status:
    """How far a run is, by its record.

    `total` None: the input was not counted. `torn_bytes`: an unfinished line, being written or cut by a crash.
    `lost_bytes`: of answers that had been counted and are gone; 0 while a job runs, which has been told of them.
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
    lost_bytes: int

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
        lost_bytes=0 if running else found.lost_bytes,
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
        # That it is there says it all: several may ask at once, and on a disk that is full.
        disk.open_append(path / STOP_NAME).close()
        disk.sync_dir(path)
    except OSError as error:
        raise unusable(path, error) from error
    return holder


def is_held(path: Path, disk: Disk | None = None, judge: Judge | None = None) -> bool:
    """Whether a job works on `path`. Raises RunDirError where that cannot be read."""
    try:
        return holder_of(disk or OsDisk(), Path(path) / LOCK_NAME, judge)[0]
    except OSError as error:
        raise unusable(path, error) from error
