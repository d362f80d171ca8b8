"""Segments survive a crash up to the last whole one, and hold numbers only."""

from __future__ import annotations

import errno
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import RecordError, RunDirError
from scheduling.tables import RANK, TELEMETRY
from storage.files import OsDisk
from storage.segments import (
    MAGIC,
    Segment,
    SegmentReader,
    SegmentWriter,
    encode,
    latest,
    read_segments,
    replace_counters,
    segment_files,
)
from tests.storage.fake_disk import Content, FakeDisk

FOLDER = Path("/run/metrics.d")
FILE = FOLDER / "session-0000.seg"


def telemetry(count: int) -> np.ndarray:
    rows = np.zeros(count, TELEMETRY)
    rows["t_s"] = np.arange(count)
    rows["power_w"] = np.nan
    rows["rss_bytes"] = -1
    return rows


SEGMENTS = [
    Segment("telemetry", telemetry(3), {"interval": 1}),
    Segment("ranks", np.zeros(2, RANK), {}),
    Segment("itl", np.arange(6, dtype=np.int64).reshape(2, 3), {"unit": "s"}),
    Segment("telemetry", telemetry(0), {}),
]


def disk_with(content: bytes) -> FakeDisk:
    return FakeDisk(dirs={FOLDER}, files={FILE: Content(content, content)})


def test_segments_of_all_sessions_are_read_back_as_they_were(tmp_path: Path) -> None:
    for session in (1, 0):
        writer = SegmentWriter(OsDisk(), tmp_path / "metrics.d", session)
        writer.write(SEGMENTS[:2])
        writer.write(SEGMENTS[2:])
        writer.close()
    assert [file.name for file in segment_files(tmp_path / "metrics.d")] == [
        "session-0000.seg",
        "session-0001.seg",
    ]
    found = list(SegmentReader(tmp_path / "metrics.d" / "session-0001.seg"))
    for expected, segment in zip(SEGMENTS, found, strict=True):
        assert segment.kind == expected.kind
        assert segment.attributes == expected.attributes
        assert segment.array.dtype == expected.array.dtype
        assert segment.array.shape == expected.array.shape
        assert segment.array.tobytes() == expected.array.tobytes()
    assert len(list(read_segments(tmp_path / "metrics.d", "telemetry"))) == 4
    assert list(read_segments(tmp_path / "none", "telemetry")) == []


def test_the_latest_of_each_session_stands_for_its_counters(tmp_path: Path) -> None:
    for session in (0, 1):
        writer = SegmentWriter(OsDisk(), tmp_path, session)
        for count in (1, 2 + session):
            writer.write([Segment("itl", np.full(3, count), {}), Segment("ranks", np.zeros(1, RANK), {})])
        writer.close()
    found = latest(tmp_path, ("itl", "telemetry"))
    assert [counts.tolist() for counts in found.arrays["itl"]] == [[2, 2, 2], [3, 3, 3]]
    assert (found.arrays["telemetry"], found.unread_bytes) == ([], 0)


def test_an_interval_is_one_sync() -> None:
    disk = FakeDisk()
    writer = SegmentWriter(disk, FOLDER, 0)
    writer.write(SEGMENTS)
    assert disk.calls.count("sync") == 1
    assert len(list(SegmentReader(FILE, disk.crash()))) == 4


def test_a_file_cut_at_any_byte_keeps_its_whole_segments() -> None:
    frames = [encode(segment) for segment in SEGMENTS]
    content = b"".join(frames)
    ends = np.cumsum([len(frame) for frame in frames])
    for size in range(len(content) + 1):
        reader = SegmentReader(FILE, disk_with(content[:size]))
        whole = len(list(reader))
        assert whole == int((ends <= size).sum())
        assert reader.left_bytes == size - (ends[whole - 1] if whole else 0)
        assert latest(FILE.parent, (), disk_with(content[:size])).unread_bytes == reader.left_bytes


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60)
def test_a_changed_byte_ends_the_reading_and_raises_nothing(place: int, change: int) -> None:
    content = bytearray(b"".join(encode(segment) for segment in SEGMENTS))
    content[place % len(content)] ^= change
    found = list(SegmentReader(FILE, disk_with(bytes(content))))
    assert len(found) < len(SEGMENTS)


@given(st.binary(max_size=100))
def test_garbage_holds_no_segment(data: bytes) -> None:
    assert list(SegmentReader(FILE, disk_with(MAGIC + data))) == []


def test_python_objects_are_refused_both_ways() -> None:
    with pytest.raises(ValueError, match="objects"):
        encode(Segment("x", np.array([{}], object), {}))
    for descr, reads in (('"<i8"', 1), ('"|O"', 0), ('[["a", "|O"]]', 0), ('"nonsense"', 0), ("7", 0)):
        header = b'{"kind":"x","attributes":{},"shape":[1],"descr":%b}' % descr.encode()
        checksum = zlib.crc32(bytes(8), zlib.crc32(header))
        forged = struct.pack("<4sIQI", MAGIC, len(header), 8, checksum) + header + bytes(8)
        assert len(list(SegmentReader(FILE, disk_with(forged)))) == reads


def test_counters_are_those_that_came_last_and_take_no_more_room_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "metrics.d"
    writer = SegmentWriter(OsDisk(), folder, 0)
    for interval in range(3):
        writer.write([Segment("telemetry", telemetry(2), {})])
        replace_counters(OsDisk(), folder, 0, [Segment("ranks", np.full(1, interval), {})])
    writer.close()
    assert [counts.tolist() for counts in latest(folder, ("ranks",)).arrays["ranks"]] == [[2]]
    assert sum(len(segment.array) for segment in read_segments(folder, "telemetry")) == 6
    assert sorted(file.name for file in folder.iterdir()) == ["session-0000.counters.seg", "session-0000.seg"]
    with pytest.raises(RecordError, match="counters"):
        replace_counters(FakeDisk(fail={"sync": errno.EIO}, dirs={FOLDER}), FOLDER, 0, SEGMENTS)


def test_a_full_disk_is_a_record_error() -> None:
    disk = FakeDisk()
    writer = SegmentWriter(disk, FOLDER, 0)
    disk.fail["write"] = errno.ENOSPC
    with pytest.raises(RecordError, match=r"No space left .* Free space"):
        writer.write(SEGMENTS)
    with pytest.raises(RecordError):
        SegmentWriter(FakeDisk(fail={"make_dirs": errno.EROFS}), FOLDER, 0)
    with pytest.raises(RunDirError):
        list(SegmentReader(FILE, FakeDisk(fail={"read": errno.EIO})))
