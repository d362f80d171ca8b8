"""Segments: telemetry and counters written at every interval, so that a killed run still has them.

A session appends its telemetry to one file in metrics.d/; its counters, of which only the last ones count, are in
another that is replaced as a whole. A frame is

    magic "LSG1" | header length u32 | payload length u64 | crc32 u32 | header JSON | payload

(little-endian), the checksum over header and payload. The header has `kind`, the array's `descr` and `shape` as
numpy names them, and `attributes`; the payload is the array's raw bytes. Nothing in it can be executed, and a
reader trusts no length. The file's end may be torn by a crash: reading stops there and says how many bytes it
left. Unlike the record, a damaged middle is not refused but ends the reading too: these are measurements, not
answers.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from scheduling.errors import RecordError, RunDirError
from storage.files import Disk, OsDisk, replace_file

MAGIC = b"LSG1"
HEADER_BYTES_MAX = 1 << 16
PAYLOAD_BYTES_MAX = 1 << 30

_FRAME = struct.Struct("<4sIQI")
_SUFFIX = ".seg"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Segment:
    """One array as it was at one interval. `kind` is e.g. "telemetry", "ranks", "itl"."""

    kind: str
    array: Array
    attributes: dict[str, Any]


class SegmentWriter:
    """Appends frames to one session's file. `write` makes all arrays of an interval durable together."""

    def __init__(self, disk: Disk, directory: Path, session: int) -> None:
        self.path = directory / f"session-{session:04d}{_SUFFIX}"
        try:
            disk.make_dirs(directory)
            disk.sync_dir(directory.parent)
            self._file = disk.open_append(self.path)
            disk.sync_dir(directory)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def write(self, segments: Sequence[Segment]) -> None:
        """Append and sync. Raises RecordError if the disk refuses, ValueError like `encode`."""
        data = b"".join(encode(segment) for segment in segments)
        try:
            self._file.write(data)
            self._file.sync()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        self._file.close()


def replace_counters(disk: Disk, directory: Path, session: int, segments: Sequence[Segment]) -> None:
    """Make `segments` what the session's file of counters holds, durably and at once. Raises like `write`."""
    path = directory / f"session-{session:04d}.counters{_SUFFIX}"
    data = b"".join(encode(segment) for segment in segments)
    try:
        replace_file(disk, path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def encode(segment: Segment) -> bytes:
    """One frame. Raises ValueError for arrays of Python objects and for what is over the limits."""
    array = np.ascontiguousarray(segment.array)
    if array.dtype.hasobject:
        raise ValueError("an array of Python objects cannot be stored in a segment")
    header = json.dumps(
        {
            "kind": segment.kind,
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "shape": list(segment.array.shape),
            "attributes": segment.attributes,
        }
    ).encode()
    payload = array.tobytes()
    if len(header) > HEADER_BYTES_MAX or len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a segment of {len(header)} + {len(payload)} bytes is over the limits")
    checksum = zlib.crc32(payload, zlib.crc32(header))
    return _FRAME.pack(MAGIC, len(header), len(payload), checksum) + header + payload


class SegmentReader:
    """The good segments of one file, in order. `left_bytes`, after the iteration: what could not be read."""

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self.path = path
        self.left_bytes = 0
        self._disk = disk or OsDisk()

    def __iter__(self) -> Iterator[Segment]:
        try:
            with self._disk.open_read(self.path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                good = 0
                while (segment := _decode(file, size - good)) is not None:
                    good = file.tell()
                    yield segment
                self.left_bytes = size - good
        except OSError as error:
            raise RunDirError(f"cannot read {self.path}: {error.strerror or error}") from error


def segment_files(directory: Path, disk: Disk | None = None) -> list[Path]:
    """The segment files of a run, by session; none if no interval was ever written."""
    disk = disk or OsDisk()
    if not disk.is_dir(directory):
        return []
    return [directory / name for name in disk.list_dir(directory) if name.endswith(_SUFFIX)]


def read_segments(directory: Path, kind: str, disk: Disk | None = None) -> Iterator[Segment]:
    """All segments of one kind, of all sessions in order."""
    for path in segment_files(directory, disk):
        for segment in SegmentReader(path, disk):
            if segment.kind == kind:
                yield segment


@dataclass(frozen=True)
class Latest:
    """What counts where segments hold sums since a session's start: `arrays` has, by kind, the last one of each
    session in order. `unread_bytes`: how much of the segment files cannot be read, torn by a crash or damaged."""

    arrays: dict[str, list[Array]]
    unread_bytes: int


def latest(directory: Path, kinds: Collection[str], disk: Disk | None = None) -> Latest:
    """The last segments of `kinds`, in one reading of a run's segment files."""
    arrays: dict[str, list[Array]] = {kind: [] for kind in kinds}
    unread = 0
    for path in segment_files(directory, disk):
        reader = SegmentReader(path, disk)
        for kind, array in {one.kind: one.array for one in reader if one.kind in arrays}.items():
            arrays[kind].append(array)
        unread += reader.left_bytes
    return Latest(arrays, unread)


def _decode(file: BinaryIO, left: int) -> Segment | None:
    """The next segment; None at the end, or where no whole and right one follows in the `left` bytes."""
    prefix = file.read(_FRAME.size)
    if len(prefix) < _FRAME.size:
        return None
    magic, header_length, payload_length, checksum = _FRAME.unpack(prefix)
    if magic != MAGIC or header_length > HEADER_BYTES_MAX or payload_length > PAYLOAD_BYTES_MAX:
        return None
    if _FRAME.size + header_length + payload_length > left:
        return None
    header, payload = file.read(header_length), file.read(payload_length)
    if zlib.crc32(payload, zlib.crc32(header)) != checksum:
        return None
    try:
        return _segment(json.loads(header), payload)
    except (KeyError, TypeError, ValueError):
        return None


def _segment(header: Mapping[str, Any], payload: bytes) -> Segment:
    descr = header["descr"]
    # JSON made lists of the tuples that numpy wants for the fields of a record.
    fields = descr if isinstance(descr, str) else [_field(field) for field in descr]
    dtype = np.dtype(fields)
    if dtype.hasobject:
        raise ValueError("objects in a segment")
    array = np.frombuffer(payload, dtype).reshape([int(length) for length in header["shape"]])
    return Segment(str(header["kind"]), array, dict(header["attributes"]))


def _field(field: Sequence[Any]) -> tuple[Any, ...]:
    name, form, *shape = field
    return (str(name), str(form), *(tuple(int(length) for length in part) for part in shape))


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"cannot write metrics to {path}: {error.strerror or error}. Free space or mend the file system, then run "
        "the same command again."
    )
