"""One job at a time on a run directory: a lock file that also says who holds it.

The lock itself is the operating system's (see `storage.files.Disk.try_lock`): it ends with the process, however
that ends. The file's content (host, process, since when, Slurm job) is for people. A content that is left over in a
lock that could be had means that the last job died; that is taken over, and said.

Where a file system has no locks, or has them for each host alone (NFS with `nolock`, Lustre without `flock`), the
content decides. A holder on this host is looked up. One on another host is watched: a job on such a file system counts
in a file beside the lock, the beat, and one whose count stands still for WATCH_S is dead. Nobody's clock is compared
with anybody's. A job that finds anything but its own name in its lock has been taken for dead and ends
(`JobLock.check`): another's name, cut short by a stale size, or nothing, where that job has ended meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from scheduling.errors import RunDirError
from storage.files import Disk, Lock, LocksUnsupportedError, read_all
from storage.filesystems import mount_of, read_mounts

BEAT_SUFFIX = ".beat"
BEAT_S = 5.0
"""Between two beats."""
WATCH_S = 20.0
"""How long a beat may stand still. A network file system can show a change some seconds late."""
LOOK_S = 1.0
HOLDER_BYTES_MAX = 4096
SETTLE_S = 2.0
"""Two jobs that take over at once without locks write one after the other: whose name is there then has it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory. `started_ticks`: its start since boot, 0 where unknown. `slurm_job`: its
    number, "" where there is none."""

    host: str
    pid: int
    since: str
    started_ticks: int = 0
    slurm_job: str = ""

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host} (since {self.since}{job})"


def this_process(now_unix_s: float, environ: Mapping[str, str] = os.environ) -> Holder:
    """This process as a holder."""
    since, job = utc_text(now_unix_s), environ.get("SLURM_JOB_ID", "")
    return Holder(socket.gethostname(), os.getpid(), since, _started_ticks(os.getpid()), job)


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


def locks_reach(path: Path) -> bool:
    """Whether a lock in the folder `path` is seen by every host that has the folder."""
    return mount_of(path, read_mounts()).locks_reach


@dataclass(frozen=True)
class Judge:
    """How a holder is told dead from alive. `reaches`: where locks are enough. `pause` is a sleep, in seconds."""

    is_alive: Callable[[Holder], bool] = alive
    reaches: Callable[[Path], bool] = locks_reach
    pause: Callable[[float], None] = time.sleep

    def lives(self, disk: Disk, path: Path, holder: Holder) -> bool:
        """Whether the holder that the lock file `path` names still runs, no lock saying so. Takes up to WATCH_S."""
        if not self.is_alive(holder):
            return False
        first = read_beat(disk, path)
        if first is None or holder.host == socket.gethostname():
            return True  # one that does not beat is believed
        for _ in range(int(WATCH_S / LOOK_S)):
            self.pause(LOOK_S)
            if read_beat(disk, path) not in (first, None):
                return True
        return False


class JobLock:
    """The lock of a run directory, held from construction to `release`.

    `note` says what was taken over and goes on (`goes_on`: from or with what), or that the file system has no locks;
    None if there is nothing to say. Raises RunDirError naming the holder if another job has it, and how that is ended:
    `way`, if not by `llmpi stop`.
    """

    def __init__(
        self,
        disk: Disk,
        path: Path,
        me: Holder,
        judge: Judge | None = None,
        *,
        goes_on: str = "from its record",
        way: str | None = None,
    ) -> None:
        judge = judge or Judge()
        self._way = way or f"with 'llmpi stop {path.parent}'"
        self._disk = disk
        self._path = path
        self._me = me
        self._lock: Lock | None = None
        self._beating: _Beat | None = None
        self.note: str | None = None
        reaches = judge.reaches(path.parent)
        try:
            self._lock = disk.try_lock(path)
            free = self._lock is not None
        except LocksUnsupportedError:
            reaches = False
            free = True
            self.note = f"the file system of {path.parent} has no locks: other jobs are told by their signs of life"
        disk.refresh(path)
        earlier = read_holder(disk, path)
        try:
            if not free or (earlier is not None and not reaches and judge.lives(disk, path, earlier)):
                raise _held(path, earlier, me, self._way)
            if earlier is not None:
                self.note = f"the last job here ({earlier}) ended without stopping in order: going on {goes_on}"
            self._write(_named(me))
            if not reaches:
                self._beat(judge)
        except BaseException:
            self._let_go()
            raise

    def _beat(self, judge: Judge) -> None:
        self._beating = _Beat(self._disk, self._path, self._me)
        judge.pause(SETTLE_S)
        self._beating.look()
        if self._beating.taken:
            raise _held(self._path, self._beating.taken_by, self._me, self._way)
        self._beating.start()

    def check(self) -> None:
        """Raises RunDirError if another job has taken this one for dead, and the directory with it. To be asked before
        anything is written that must not be written twice; costs nothing where locks reach every host."""
        if self._beating is None:
            return
        self._beating.look()
        if self._beating.taken:
            raise RunDirError(
                f"{self._path.parent} has been taken over by {self._beating.taken_by or 'another job'}, because this "
                f"job had given no sign of life for {WATCH_S:g} s: it ends here, and the other one goes on"
            )

    def release(self) -> None:
        """Let go. The file stays, empty: removing it would race with the next job's locking."""
        if self._beating is None or not self._beating.taken:
            with contextlib.suppress(OSError):
                self._write(b"")
        self._let_go()

    def _let_go(self) -> None:
        if self._beating is not None:
            self._beating.stop()
        if self._lock is not None:
            self._lock.release()

    def _write(self, content: bytes) -> None:
        rewrite(self._disk, self._path, content)


class _Beat(threading.Thread):
    """Counts in the file beside the lock, so that other hosts see that this job lives."""

    def __init__(self, disk: Disk, path: Path, me: Holder) -> None:
        super().__init__(name="run-directory-beat", daemon=True)
        self._disk = disk
        self._path = path
        self._me = me
        self._count = 0
        self._ended = threading.Event()
        self.taken = False
        self.taken_by: Holder | None = None
        self.once()

    def look(self) -> None:
        """See whether the lock holds this job's name, and nothing else. Where it cannot be read, who writes what counts
        finds that."""
        try:
            found = read_all(self._disk, self._path, HOLDER_BYTES_MAX)
        except (OSError, ValueError):
            return
        if found != _named(self._me):
            self.taken, self.taken_by = True, _holder_in(found)

    def once(self) -> None:
        """Look, and count on. A disk that fails is found by who writes what counts."""
        self.look()
        if not self.taken:
            self._count += 1
            with contextlib.suppress(OSError):
                rewrite(self._disk, beat_path(self._path), f"{self._me.host}:{self._me.pid}:{self._count}\n".encode())

    def run(self) -> None:
        while not self.taken and not self._ended.wait(BEAT_S):
            self.once()

    def stop(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join(BEAT_S)


def beat_path(path: Path) -> Path:
    return path.with_name(path.name + BEAT_SUFFIX)


def read_beat(disk: Disk, path: Path) -> bytes | None:
    """Where the beat beside the lock file `path` stands; None where there is none, or it is being written."""
    try:
        return read_all(disk, beat_path(path), 4096) or None
    except (OSError, ValueError):
        return None


def rewrite(disk: Disk, path: Path, content: bytes) -> None:
    """Give a file another content. Not durable, and not at once: a reader may see it empty."""
    file = disk.open_append(path)
    try:
        file.truncate(0)
        file.write(content)
    finally:
        file.close()


def read_holder(disk: Disk, path: Path) -> Holder | None:
    """Who the lock file names; None if nobody, or nothing readable."""
    try:
        return _holder_in(read_all(disk, path, HOLDER_BYTES_MAX))
    except (OSError, ValueError):
        return None


def _named(me: Holder) -> bytes:
    """The content of a lock file."""
    return json.dumps(asdict(me)).encode() + b"\n"


def _holder_in(content: bytes) -> Holder | None:
    try:
        found = json.loads(content)
        return Holder(
            str(found["host"]), int(found["pid"]), str(found["since"]), int(found["started_ticks"]),
            str(found.get("slurm_job", "")),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def holder_of(disk: Disk, path: Path, judge: Judge | None = None) -> tuple[bool, Holder | None]:
    """Whether a job runs under the lock file `path`, and who that is. Takes no lock and writes nothing."""
    judge = judge or Judge()
    disk.refresh(path)
    named = read_holder(disk, path)
    try:
        running = disk.locked(path)
        reaches = judge.reaches(path.parent)
    except LocksUnsupportedError:
        running = reaches = False
    if not running and not reaches and named is not None:
        running = judge.lives(disk, path, named)
    return running, named if running else None


def _held(path: Path, holder: Holder | None, me: Holder, way: str) -> RunDirError:
    who = "another job" if holder is None else str(holder)
    text = f"{path.parent} is in use by {who}. Wait for it, or end it {way}"
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
