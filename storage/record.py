"""Writing the durable record, results.jsonl: append only, group commit, and nothing acknowledged early.

`GroupCommit` is the core: it holds lines until a commit is due (by age or by size) and then writes and syncs
them in one go. It has no thread and no clock, so that the simulator can drive it. `RecordWriter` drives one from a
thread, because a sync takes milliseconds that rank 0's loop does not have. Lines come sealed (see
`scheduling.recordline`) and are never looked into here.

The first failed write or sync is the last: the kernel may drop pages that it could not write and report success
next time, so nothing after a failure can be trusted. What was not acknowledged is cut off again if the disk lets
us; what was acknowledged stays, and the same command resumes from there (`storage.recovery`).

How long the record was after its last commit is kept beside it, in results.synced, itself synced only when the record
is opened: an older number is as right. After a power cut it tells pages that were never synced from damage.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from scheduling.errors import BugError, RecordError, RunDirError
from storage.files import AppendFile, Disk
from storage.recovery import SYNCED_SUFFIX

COMMIT_INTERVAL_S = 0.05
COMMIT_BYTES = 16 << 20


class Batch(NamedTuple):
    """Lines taken for one commit."""

    lines: list[bytes]
    size_bytes: int


class GroupCommit:
    """Collects lines and makes them durable together. Thread-free; times are the caller's, in seconds.

    `take` and `write` are apart so that lines can be added while a batch is being written; `commit` is both.
    """

    def __init__(
        self,
        file: AppendFile,
        path: Path,
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes: int = COMMIT_BYTES,
        mark: AppendFile | None = None,
        check_held: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_held` raises RunDirError if the record is another job's by now: then nothing is written any more."""
        self.path = path
        self.durable_bytes = file.size()
        self.durable_lines = 0
        self.fsyncs = 0
        self.failure: RecordError | None = None
        self.waiting_bytes = 0
        self._file = file
        self._mark = mark
        self._check_held = check_held
        self._interval_s = commit_interval_s
        self._commit_bytes = commit_bytes
        self._waiting: list[bytes] = []
        self._oldest_s = 0.0

    def add(self, lines: Sequence[bytes], now_s: float) -> None:
        """Queue sealed lines. Raises the RecordError of an earlier failure."""
        if self.failure is not None:
            raise self.failure
        if not lines:
            return
        if not self._waiting:
            self._oldest_s = now_s
        self._waiting.extend(lines)
        self.waiting_bytes += sum(map(len, lines))

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until a commit is due: 0.0 if it is due now, None if nothing waits."""
        if not self._waiting:
            return None
        if self.waiting_bytes >= self._commit_bytes:
            return 0.0
        return max(0.0, self._oldest_s + self._interval_s - now_s)

    def take(self) -> Batch:
        """Everything that waits, to be given to `write`."""
        batch = Batch(self._waiting, self.waiting_bytes)
        self._waiting, self.waiting_bytes = [], 0
        return batch

    def write(self, batch: Batch) -> int:
        """Write and sync `batch`; returns how many lines became durable.

        Raises RecordError, and from then on always.
        """
        if self.failure is not None:
            raise self.failure
        if not batch.lines:
            return 0
        try:
            self._check_held()
            self._file.write(b"".join(batch.lines))
            self._file.sync()
        except RunDirError as error:
            self.failure = RecordError(str(error))
            raise self.failure from error
        except OSError as error:
            self.failure = _record_error(self.path, error)
            self._cut_unacknowledged()
            raise self.failure from error
        self.fsyncs += 1
        self.durable_lines += len(batch.lines)
        self.durable_bytes += batch.size_bytes
        if self._mark is not None:
            with contextlib.suppress(OSError):  # an older one is as right
                write_mark(self._mark, self.durable_bytes)
        return len(batch.lines)

    def commit(self) -> int:
        """Take and write; returns how many lines became durable."""
        return self.write(self.take())

    def _cut_unacknowledged(self) -> None:
        """After a failed sync the cache may show lines that the disk never got: a resume must not count them."""
        try:
            self._file.truncate(self.durable_bytes)
        except OSError:
            return  # A torn tail is cut on resume; whole lines in it are then synced before they count.


class RecordWriter:
    """Appends lines to the record from a thread of its own.

    `clock` is monotonic, in seconds. Opened after `recover`, which leaves the file ending in a whole line. Not to
    be used from several threads at once, beside its own.
    """

    def __init__(
        self,
        disk: Disk,
        path: Path,
        clock: Callable[[], float],
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes: int = COMMIT_BYTES,
        check_held: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = open_record(disk, path)
        self._mark = open_mark(disk, path, self._file)
        self._clock = clock
        self._core = GroupCommit(self._file, path, commit_interval_s, commit_bytes, self._mark, check_held)
        self._commit_bytes = commit_bytes
        self._changed = threading.Condition()
        self._writing_bytes = 0
        self._seen_lines = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="record-writer", daemon=True)
        self._thread.start()

    @property
    def backlog_bytes(self) -> int:
        """Bytes appended and not yet durable. The caller slows down when this grows."""
        return self._core.waiting_bytes + self._writing_bytes

    @property
    def fsyncs(self) -> int:
        """Commits so far."""
        return self._core.fsyncs

    @property
    def durable_lines(self) -> int:
        """Lines that this writer has made durable."""
        return self._core.durable_lines

    def append(self, lines: Sequence[bytes]) -> None:
        """Queue sealed lines; returns at once. Raises RecordError if the record has failed."""
        if self._closing:
            raise BugError(f"lines were appended to {self._core.path} after it was closed")
        with self._changed:
            idle = self._core.waiting_bytes == 0
            self._core.add(lines, self._clock())
            # The thread sleeps until the first line's time is up; it need only know of that and of a full batch.
            if idle or self._core.waiting_bytes >= self._commit_bytes:
                self._changed.notify()

    def acknowledged(self) -> int:
        """How many lines, in order of append, became durable since the last call.

        After a failure: first those that were durable before it, then RecordError at every call.
        """
        with self._changed:
            new = self._core.durable_lines - self._seen_lines
            self._seen_lines = self._core.durable_lines
            if new == 0 and self._core.failure is not None:
                raise self._core.failure
            return new

    def close(self) -> None:
        """Commit everything and close the file. Raises RecordError if not all of it is durable."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._file.close()
        self._mark.close()
        if self._core.failure is not None:
            raise self._core.failure

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RecordError:
            if error is None:
                raise

    def _run(self) -> None:
        while self._core.failure is None:
            with self._changed:
                wait_s = self._core.due_in_s(self._clock())
                if wait_s is None and self._closing:
                    return
                if not self._closing and (wait_s is None or wait_s > 0.0):
                    self._changed.wait(wait_s)
                    continue
                batch = self._core.take()
                self._writing_bytes = batch.size_bytes
            self._write(batch)

    def _write(self, batch: Batch) -> None:
        try:
            self._core.write(batch)
        except RecordError:
            return  # Kept in the core; `acknowledged`, `append` and `close` raise it where it is handled.
        except Exception as error:
            self._core.failure = RecordError(f"the record {self._core.path} cannot be written: {error!r}")
            return
        self._writing_bytes = 0


def open_record(disk: Disk, path: Path) -> AppendFile:
    """The record opened for appending, its name made durable. Raises RecordError, or BugError for a torn tail."""
    try:
        file = disk.open_append(path)
        try:
            disk.sync_dir(path.parent)
            _must_end_whole(disk, path, file.size())
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise _record_error(path, error) from error
    return file


def open_mark(disk: Disk, path: Path, record: AppendFile) -> AppendFile:
    """The file that says how much of the record at `path` is synced, holding that durably. Raises RecordError.

    The record must be synced (`recover` does). Closes it if this fails.
    """
    try:
        mark = disk.open_append(path.with_suffix(SYNCED_SUFFIX))
        try:
            write_mark(mark, record.size())
            mark.sync()
            disk.sync_dir(path.parent)
        except BaseException:
            mark.close()
            raise
    except BaseException as error:
        record.close()
        if isinstance(error, OSError):
            raise _record_error(path, error) from error
        raise
    return mark


def write_mark(mark: AppendFile, durable_bytes: int) -> None:
    """Make `durable_bytes` what the mark holds; a crash may leave it empty."""
    mark.truncate(0)
    mark.write(b"%d\n" % durable_bytes)


def _must_end_whole(disk: Disk, path: Path, size: int) -> None:
    if size == 0:
        return
    with disk.open_read(path) as reader:
        reader.seek(size - 1)
        if reader.read(1) != b"\n":
            raise BugError(f"{path} ends in a torn line: it must be recovered before it is appended to")


def _record_error(path: Path, error: OSError) -> RecordError:
    why = os.strerror(error.errno) if error.errno else str(error)
    return RecordError(
        f"cannot write the record {path}: {why}. What was acknowledged is safe; free space or mend the file "
        "system, then run the same command again to resume."
    )
