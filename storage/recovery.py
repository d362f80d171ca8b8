"""Reading the record: what is done, what was torn by a crash, rows for metrics, answers in the input's order.

All passes read results.jsonl once from the front in chunks, check every line's checksum and decode only its
`llmpi` part and error. A last line that is incomplete or fails its checksum is a torn tail: a crash in the middle
of a write, never acknowledged, so `recover` cuts it off. So it does, from there on, where a line has zeros and lies
behind what is known to have been synced: pages that a power cut kept from the disk, later ones of the same write being
there. Any other damaged line is refused with its place, because an answer that was acknowledged is lost there and only
a person can decide.

Memory is one chunk, the longest line, and one byte (or eight, for `export_ordered`) per request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from scheduling.errors import RecordError, RunDirError
from scheduling.link import ENVELOPE_BYTES_MAX
from scheduling.recordline import SEAL_BYTES, SEAL_OPEN, Row, decode_row, request_row, text_checks
from scheduling.tables import REQUEST
from storage.files import Disk, OsDisk, read_all

RECORD_NAME = "results.jsonl"
SYNCED_SUFFIX = ".synced"
"""In the place of the record's own, for the file that says how much of it was synced."""
CHUNK_BYTES = 1 << 18
LINE_BYTES_MAX = ENVELOPE_BYTES_MAX
"""No line that a worker could send is refused here."""
INDEX_MAX = 1 << 34
ROWS_PER_CHUNK = 65_536
LINES_BETWEEN = 1_024
"""Of a record that is read, between two looks at what else there is to do: some hundredths of a second."""

ABSENT, OK, FAILED = 0, 1, 2
"""What `Recovery.states` says of an index."""


@dataclass(frozen=True)
class Recovery:
    """What a record holds.

    `states` (uint8, indexed by request; shorter than the input if the last ones are absent) says ABSENT, OK or
    FAILED. `durable_bytes` is the length of all whole lines, `torn_bytes` what follows them: after `recover` it
    has been cut off, after `scan` it is still there. `sessions` is one more than the highest session in a line.
    `lost_bytes`, after `recover`: how much of what had been synced is not there any more.
    """

    states: npt.NDArray[np.uint8]
    ok: int
    failed: int
    durable_bytes: int
    torn_bytes: int
    sessions: int
    lost_bytes: int = 0

    @property
    def done(self) -> int:
        """Requests with a line, whether answered or failed."""
        return self.ok + self.failed


class _Lines:
    """Whole, checked lines of a record. `offset` and `number` (from 1) are those of the line last yielded."""

    def __init__(self, file: BinaryIO, path: Path, synced_bytes: int) -> None:
        self._file = file
        self._path = path
        self._synced_bytes = synced_bytes
        self.size = file.seek(0, os.SEEK_END)
        self.good_bytes = 0
        self.offset = 0
        self.number = 0
        file.seek(0)

    def __iter__(self) -> Iterator[bytes]:
        """Yields each good line without its newline; stops before a torn last one.

        Raises RunDirError for damage elsewhere.
        """
        parts: list[bytes] = []  # of a line that goes on: put together once, as one may be of hundreds of chunks
        parts_bytes = 0
        left = self.size
        while left and (chunk := self._file.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
            *lines, tail = chunk.split(b"\n")
            if lines:
                lines[0] = b"".join((*parts, lines[0]))
                parts, parts_bytes = [], 0
            parts.append(tail)
            parts_bytes += len(tail)
            for text in lines:
                self.offset = self.good_bytes
                self.number += 1
                if not text_checks(text):
                    if self.offset + len(text) + 1 == self.size:
                        self._must_be_torn(text)
                        return
                    if self.offset >= self._synced_bytes and b"\0" in text:
                        return
                    raise self.damaged("its checksum is wrong")
                self.good_bytes += len(text) + 1
                yield text
            if parts_bytes > LINE_BYTES_MAX:
                self.offset = self.good_bytes
                self.number += 1
                raise self.damaged(f"it is longer than {LINE_BYTES_MAX} bytes")
        self.offset = self.good_bytes
        self.number += 1
        self._must_be_torn(b"".join(parts))

    def _must_be_torn(self, tail: bytes) -> None:
        """Refuse a last line in which a whole line is followed by more: a newline between two was damaged.

        Zeros may follow: what a file system leaves where it had no time to write.
        """
        end = tail.find(SEAL_OPEN) + SEAL_BYTES - 1
        if text_checks(tail[:end]) and tail[end:].strip(b"\0"):
            raise self.damaged("its newline is gone")

    def row(self, line: bytes) -> Row:
        """The decoded line. Raises RunDirError if it is sealed but no line of this format."""
        try:
            row = decode_row(line)
        except ValueError as error:
            raise self.damaged(f"it is not a line of this version's format ({error})") from error
        if not 0 <= row.llmpi.index < INDEX_MAX:
            raise self.damaged(f"its index {row.llmpi.index} is out of range")
        return row

    def damaged(self, why: str) -> RunDirError:
        return RunDirError(
            f"{self._path} is damaged in line {self.number} at byte {self.offset}: {why}. To have the answers "
            f"from there on computed anew, cut it with 'truncate -s {self.offset} {self._path}' and run the same "
            "command again."
        )


def synced_bytes(disk: Disk, path: Path) -> int:
    """How much of the record at `path` is known to have been synced (`storage.record`). 0 where nothing is known."""
    try:
        return int(read_all(disk, path.with_suffix(SYNCED_SUFFIX), 64))
    except (OSError, ValueError):
        return 0


def scan(disk: Disk, path: Path, meanwhile: Callable[[], object] = lambda: None) -> Recovery:
    """Read a record without changing it; also while a job appends to it. A record that is not there is empty.

    `meanwhile` is called now and then; it may raise to end that. Raises RunDirError for a damaged line before the last,
    for an index that is there twice, and if it cannot be read.
    """
    states = bytearray()
    ok = failed = sessions = 0
    try:
        disk.refresh(path)
        if not disk.exists(path):
            return Recovery(np.zeros(0, np.uint8), 0, 0, 0, 0, 0)
        with disk.open_read(path) as file:
            lines = _Lines(file, path, synced_bytes(disk, path))
            for line in lines:
                if lines.number % LINES_BETWEEN == 0:
                    meanwhile()
                row = lines.row(line)
                index = row.llmpi.index
                if index >= len(states):
                    states.extend(bytes(max(index + 1 - len(states), len(states) // 2)))
                if states[index]:
                    raise lines.damaged(f"request {index} ({row.custom_id}) is recorded for a second time")
                if row.error is None:
                    states[index] = OK
                    ok += 1
                else:
                    states[index] = FAILED
                    failed += 1
                sessions = max(sessions, row.llmpi.session + 1)
    except OSError as error:
        raise RunDirError(f"cannot read the record {path}: {error.strerror or error}") from error
    found = np.frombuffer(states, np.uint8)
    length = int(found.nonzero()[0][-1]) + 1 if ok + failed else 0
    return Recovery(found[:length], ok, failed, lines.good_bytes, lines.size - lines.good_bytes, sessions)


def recover(disk: Disk, path: Path, meanwhile: Callable[[], object] = lambda: None) -> Recovery:
    """Scan a record, cut a torn tail off, and make durable what is left: only then may it count as done.

    To be called with the run directory locked. `meanwhile` as in `scan`; until the record has been read nothing is
    changed. Raises RunDirError like `scan`, and RecordError if it cannot be cut.
    """
    found = scan(disk, path, meanwhile)
    synced = synced_bytes(disk, path)
    found = replace(found, lost_bytes=max(0, synced - found.durable_bytes))
    if found.durable_bytes + found.torn_bytes == 0:
        return found
    try:
        file = disk.open_append(path)
        try:
            if found.torn_bytes:
                file.truncate(found.durable_bytes)
            # Whole lines may be in the cache only: a job that was killed wrote them and never came to sync them. Or its
            # sync failed, and the system takes them for written since: they are written again.
            file.rewrite(min(synced, found.durable_bytes))
            file.sync()
        finally:
            file.close()
    except OSError as error:
        raise RecordError(
            f"cannot repair the record {path}: {error.strerror or error}. What is recorded is safe; mend that, then "
            "run the same command again."
        ) from error
    return found


def rows(path: Path, disk: Disk | None = None, session: int | None = None) -> Iterator[npt.NDArray[np.void]]:
    """The record's rows as arrays of `scheduling.tables.REQUEST`, in order of completion.

    At most ROWS_PER_CHUNK rows at once; those of one session if it is given. A torn tail is left out. Raises like
    `scan`, but does not look for indexes that are there twice.
    """
    pending: list[tuple[object, ...]] = []
    disk = disk or OsDisk()
    try:
        with disk.open_read(path) as file:
            lines = _Lines(file, path, synced_bytes(disk, path))
            for line in lines:
                row = lines.row(line)
                if session is not None and row.llmpi.session != session:
                    continue
                pending.append(request_row(row))
                if len(pending) == ROWS_PER_CHUNK:
                    yield np.array(pending, REQUEST)
                    pending = []
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"cannot read the record {path}: {error.strerror or error}") from error
    if pending:
        yield np.array(pending, REQUEST)


def whole_lines(path: Path, disk: Disk | None = None) -> Iterator[bytes]:
    """The record's lines as they are, newlines included, also while a job appends to it; none if it is not there.

    A torn tail is left out. Raises like `scan` for damage.
    """
    disk = disk or OsDisk()
    try:
        with disk.open_read(path) as file:
            for line in _Lines(file, path, synced_bytes(disk, path)):
                yield line + b"\n"
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"cannot read the record {path}: {error.strerror or error}") from error


def export_ordered(run_dir: Path, out: BinaryIO, disk: Disk | None = None) -> int:
    """Write the record's lines to `out` in the order of the input; returns how many.

    Takes eight bytes of memory per request: where each line starts. Lines are copied as they are. Raises
    RunDirError like `scan`; errors of `out` are the caller's.
    """
    count = 0
    for line in ordered_lines(run_dir / RECORD_NAME, disk):
        out.write(line)
        count += 1
    return count


def ordered_lines(path: Path, disk: Disk | None = None) -> Iterator[bytes]:
    """The lines of a record, newlines included, in the order of the input. Memory and errors: see `export_ordered`."""
    disk = disk or OsDisk()
    with _opened(path, disk) as file:
        starts = _starts(_Lines(file, path, synced_bytes(disk, path)))
        for index in np.flatnonzero(starts >= 0):
            file.seek(int(starts[index]))
            yield file.readline()


def record_lines(path: Path, disk: Disk | None = None) -> Iterator[tuple[int, bytes]]:
    """Each whole line of a record without its newline, and the byte where it starts, in order of completion.

    A torn tail is left out. Raises RunDirError: there is no record, or a line before the last is damaged.
    """
    disk = disk or OsDisk()
    with _opened(path, disk) as file:
        lines = _Lines(file, path, synced_bytes(disk, path))
        for line in lines:
            yield lines.offset, line


def _opened(path: Path, disk: Disk) -> BinaryIO:
    try:
        return disk.open_read(path)
    except FileNotFoundError as error:
        raise RunDirError(f"{path.parent} holds no {path.name}: no answer has been recorded there") from error


def _starts(lines: _Lines) -> npt.NDArray[np.int64]:
    """Byte offset of each request's line, -1 where there is none."""
    starts = np.full(1024, -1, np.int64)
    for line in lines:
        index = lines.row(line).llmpi.index
        if index >= len(starts):
            grown = np.full(max(index + 1, 2 * len(starts)), -1, np.int64)
            grown[: len(starts)] = starts
            starts = grown
        if starts[index] >= 0:
            raise lines.damaged(f"request {index} is recorded for a second time")
        starts[index] = lines.offset
    return starts
