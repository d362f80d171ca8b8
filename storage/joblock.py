"""One job at a time on a run directory: a lock file that also says who holds it.

The lock itself is the operating system's (see `storage.files.Disk.try_lock`): it ends with the process, however
that ends. The file's content (host, process, since when) is for people, and it is what decides where a file system
has no locks: then a holder on this host is looked up, and one on another host is believed. A content that is left
over in a lock that could be had means that the last job died; that is taken over, and said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from scheduling.errors import RunDirError
from storage.files import Disk, Lock, LocksUnsupportedError, read_all


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory. `started_ticks`: its start since boot, 0 where unknown."""

    host: str
    pid: int
    since: str
    started_ticks: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def this_process(now_unix_s: float) -> Holder:
    """This process as a holder."""
    since = utc_text(now_unix_s)
    return Holder(socket.gethostname(), os.getpid(), since, _started_ticks(os.getpid()))


def utc_text(unix_s: float) -> str:
    """A time for people and for run.json, in UTC with a resolution of a second."""
    return datetime.fromtimestamp(int(unix_s), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def alive(holder: Holder) -> bool:
    """Whether `holder` still runs, if it is of this host; one of another host is taken to."""
    if holder.host != socket.gethostname():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    ticks = _started_ticks(holder.pid)
    return not (ticks and holder.started_ticks and ticks != holder.started_ticks)


class JobLock:
    """The lock of a run directory, held from construction to `release`.

    `note` says what was taken over, or that the file system has no locks; None if there is nothing to say.
    Raises RunDirError naming the holder if another job has it.
    """

    def __init__(self, disk: Disk, path: Path, me: Holder, is_alive: Callable[[Holder], bool] = alive) -> None:
        self._disk = disk
        self._path = path
        self._lock: Lock | None = None
        self.note: str | None = None
        try:
            self._lock = disk.try_lock(path)
            free = self._lock is not None
        except LocksUnsupportedError:
            earlier = read_holder(disk, path)
            free = earlier is None or not is_alive(earlier)
            self.note = f"the file system of {path.parent} has no locks: start no second job there"
        earlier = read_holder(disk, path)
        if not free:
            raise _held(path, earlier, me)
        if earlier is not None:
            self.note = f"the last job here ({earlier}) ended without stopping in order: going on from its record"
        try:
            self._write(json.dumps(asdict(me)).encode() + b"\n")
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let go. The file stays, empty: removing it would race with the next job's locking."""
        with contextlib.suppress(OSError):
            self._write(b"")
        if self._lock is not None:
            self._lock.release()

    def _write(self, content: bytes) -> None:
        file = self._disk.open_append(self._path)
        try:
            file.truncate(0)
            file.write(content)
        finally:
            file.close()


def read_holder(disk: Disk, path: Path) -> Holder | None:
    """Who the lock file names; None if nobody, or nothing readable."""
    try:
        found = json.loads(read_all(disk, path, 4096))
        return Holder(str(found["host"]), int(found["pid"]), str(found["since"]), int(found["started_ticks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def holder_of(disk: Disk, path: Path, is_alive: Callable[[Holder], bool] = alive) -> tuple[bool, Holder | None]:
    """Whether a job runs under the lock file `path`, and who that is. Takes no lock and writes nothing."""
    named = read_holder(disk, path)
    try:
        running = disk.locked(path)
    except LocksUnsupportedError:
        running = named is not None and is_alive(named)
    return running, named if running else None


def _held(path: Path, holder: Holder | None, me: Holder) -> RunDirError:
    who = "another job" if holder is None else str(holder)
    text = f"{path.parent} is in use by {who}. Wait for it, or end it with 'llmpi stop {path.parent}'"
    if holder is not None and holder.host != me.host:
        text += f"; if that job is dead for certain and the lock stays, remove {path}"
    return RunDirError(text + ".")


def _started_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot: tells a process from a later one with its number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name stands in parentheses and may contain anything; 19 fields follow to the time.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
