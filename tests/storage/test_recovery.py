"""Reading the record back: torn tails are cut, damage is refused with its place, nothing counts twice."""

from __future__ import annotations

import errno
import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import RecordError, RunDirError, StoppedError
from scheduling.link import ENVELOPE_BYTES_MAX
from scheduling.recordline import line_checks, seal
from storage import files, recovery
from storage.files import OsDisk
from storage.record import GroupCommit, open_mark, open_record
from storage.recovery import ABSENT, FAILED, OK, export_ordered, recover, rows, scan
from tests.storage.fake_disk import Content, FakeDisk
from tests.storage.samples import PATH, RUN, disk_with, failed_line, ok_line


def test_no_record_is_an_empty_one() -> None:
    found = recover(FakeDisk(dirs={RUN}), PATH)
    assert (found.ok, found.failed, found.durable_bytes, found.torn_bytes, found.sessions) == (0, 0, 0, 0, 0)
    assert len(found.states) == 0
    assert recover(disk_with(b""), PATH).done == 0


def test_recovery_tells_answered_failed_and_absent_apart() -> None:
    content = ok_line(5, 1) + failed_line(0) + ok_line(2, 2)
    found = recover(disk_with(content), PATH)
    assert found.states.tolist() == [FAILED, ABSENT, OK, ABSENT, ABSENT, OK]
    assert (found.ok, found.failed, found.done) == (2, 1, 3)
    assert found.durable_bytes == len(content)
    assert found.sessions == 3


def test_truncation_at_every_byte_keeps_whole_lines_and_reports_the_rest() -> None:
    lines = [ok_line(0), failed_line(1), ok_line(2, text='ö\n,"llmpi":{')]
    content = b"".join(lines)
    ends = np.cumsum([0] + [len(line) for line in lines])
    for size in range(len(content) + 1):
        disk = disk_with(content[:size])
        found = recover(disk, PATH)
        whole = int(np.searchsorted(ends, size, side="right")) - 1
        assert found.done == whole
        assert found.durable_bytes == ends[whole]
        assert found.torn_bytes == size - ends[whole]
        assert disk.files[PATH].durable == content[: ends[whole]], "cut, and durably so"


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_counted_answers_that_are_gone_are_told_of(kept: int) -> None:
    lines = [ok_line(index) for index in range(3)]
    disk = disk_with(b"".join(lines[:kept]) + ok_line(3)[:5])
    counted_bytes = sum(map(len, lines))
    disk.files[PATH.with_suffix(".synced")] = Content(b"%d\n" % counted_bytes)
    found = recover(disk, PATH)
    assert found.done == kept
    assert found.lost_bytes == counted_bytes - sum(map(len, lines[:kept]))


def test_a_last_line_with_a_wrong_checksum_is_torn() -> None:
    damaged = bytearray(ok_line(1))
    damaged[20] ^= 1
    disk = disk_with(ok_line(0) + bytes(damaged))
    found = recover(disk, PATH)
    assert found.done == 1
    assert found.torn_bytes == len(damaged)
    assert disk.files[PATH].durable == ok_line(0)


def test_zeros_after_a_power_cut_are_torn() -> None:
    found = recover(disk_with(ok_line(0) + ok_line(1)[:40] + bytes(9000)), PATH)
    assert found.done == 1
    assert found.torn_bytes == 9040


def test_damage_at_every_byte_before_the_last_line_is_refused_with_its_place() -> None:
    first, second, third = ok_line(0), failed_line(1), ok_line(2)
    for place in range(len(second)):
        damaged = bytearray(second)
        damaged[place] ^= 4
        disk = disk_with(first + bytes(damaged) + third)
        with pytest.raises(RunDirError, match=f"line 2 at byte {len(first)}"):
            recover(disk, PATH)
        assert disk.files[PATH].now == first + bytes(damaged) + third, "nothing is cut when something is refused"


@pytest.mark.slow
def test_a_changed_byte_anywhere_is_cut_off_or_refused_and_never_read() -> None:
    """Every byte of a record, each of its bits and all of them: whole lines before it stay, nothing else is taken."""
    lines = [ok_line(0), failed_line(1), ok_line(2)]
    content = b"".join(lines)
    starts = np.cumsum([0] + [len(line) for line in lines])
    for place in range(len(content)):
        hit = int(np.searchsorted(starts, place, side="right")) - 1
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255, content[place], content[place] ^ 10):
            damaged = bytearray(content)
            damaged[place] ^= change
            if damaged == content:
                continue
            disk = disk_with(bytes(damaged))
            # Its length is known to have been synced: zeros are no excuse.
            disk.files[PATH.with_suffix(".synced")] = Content(b"%d" % len(content))
            if hit < len(lines) - 1 or refused(disk):
                with pytest.raises(RunDirError, match=f"at byte {starts[hit]}:"):
                    recover(disk, PATH)
                assert disk.files[PATH].now == damaged
                continue
            found = recover(disk, PATH)
            assert found.states.tolist() == [OK, FAILED]
            assert found.torn_bytes == len(lines[-1])
            assert disk.files[PATH].durable == content[: starts[hit]]


def refused(disk: FakeDisk) -> bool:
    """The last line was made two, or something that no torn write leaves stands in the place of its newline."""
    content = disk.files[PATH].now
    return content.count(b"\n") > 3 or content[-1] not in b"\n\0"


@pytest.mark.parametrize("mark", [None, b"", b"nonsense", b"0\n"])
def test_pages_that_a_power_cut_kept_from_the_disk_are_cut_off_though_later_ones_are_there(mark: bytes | None) -> None:
    content = ok_line(0) + ok_line(1)[:30] + bytes(64) + ok_line(1)[94:] + ok_line(2)
    disk = disk_with(content)
    if mark is not None:
        disk.files[PATH.with_suffix(".synced")] = Content(mark, mark)
    found = recover(disk, PATH)
    assert found.states.tolist() == [OK]
    assert found.torn_bytes == len(content) - len(ok_line(0))
    assert disk.files[PATH].durable == ok_line(0)
    assert [len(chunk) for chunk in rows(PATH, disk_with(content))] == [1]


def test_zeros_in_what_was_synced_are_damage() -> None:
    disk = disk_with(ok_line(0)[:30] + bytes(64) + ok_line(0)[94:] + ok_line(1))
    disk.files[PATH.with_suffix(".synced")] = Content(b"%d\n" % len(ok_line(0)))
    with pytest.raises(RunDirError, match="line 1 at byte 0"):
        recover(disk, PATH)


def test_an_index_recorded_twice_is_refused() -> None:
    with pytest.raises(RunDirError, match=r"line 3 .*request 1 .*second time"):
        recover(disk_with(ok_line(1) + ok_line(0) + failed_line(1)), PATH)
    with pytest.raises(RunDirError, match="second time"):
        export_ordered(RUN, io.BytesIO(), disk_with(ok_line(1) + ok_line(1)))


def test_a_sealed_line_of_another_format_is_refused() -> None:
    with pytest.raises(RunDirError, match="not a line of this version"):
        recover(disk_with(seal(b'{"custom_id":"x"}') + ok_line(0)), PATH)
    with pytest.raises(RunDirError, match="out of range"):
        recover(disk_with(ok_line(1 << 60)), PATH)


def test_recovered_lines_are_synced_before_they_count() -> None:
    disk = disk_with(b"")
    disk.files[PATH].now = ok_line(0)
    recover(disk, PATH)
    assert disk.crash().files[PATH].now == ok_line(0)


def test_lines_of_a_failed_sync_are_written_again_before_they_count() -> None:
    disk = FakeDisk(dirs={RUN})
    commit = GroupCommit(open_record(disk, PATH), PATH, mark=open_mark(disk, PATH, open_record(disk, PATH)))
    commit.add([ok_line(0)], 0.0)
    commit.commit()
    disk.fail |= {"sync": errno.EIO, "truncate": errno.EIO}
    commit.add([ok_line(1)], 0.0)
    with pytest.raises(RecordError):
        commit.commit()
    disk.fail.clear()
    assert recover(disk, PATH).ok == 2, "what was not acknowledged could not be cut off either"
    assert scan(disk.crash(), PATH).ok == 2


def test_a_file_is_written_again_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REWRITE_BYTES", 7)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    file = OsDisk().open_append(path)
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(0, 0))
    for start in (0, 99, 100, 200):
        file.rewrite(start)
    file.close()
    assert path.read_bytes() == bytes(range(100))
    assert path.stat().st_mtime_ns >= before, "it was written"


def test_scan_changes_nothing() -> None:
    disk = disk_with(ok_line(0) + b"torn")
    found = scan(disk, PATH)
    assert found.done == 1
    assert found.torn_bytes == 4
    assert disk.files[PATH].now.endswith(b"torn")
    assert set(disk.calls) == {"read"}


def test_who_has_a_record_read_is_asked_now_and_then_and_may_end_it_with_nothing_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "LINES_BETWEEN", 2)
    disk = disk_with(b"".join(ok_line(index) for index in range(7)) + b"torn")
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise StoppedError("asked to stop")

    with pytest.raises(StoppedError):
        recover(disk, PATH, ask)
    assert set(disk.calls) == {"read"}
    assert recover(disk, PATH).done == 7


def test_unreadable_and_unrepairable_records_are_clear_errors() -> None:
    disk = disk_with(ok_line(0) + b"torn")
    disk.fail["truncate"] = 5
    with pytest.raises(RecordError, match="cannot repair"):
        recover(disk, PATH)
    disk.fail["read"] = 13
    with pytest.raises(RunDirError, match="Permission denied"):
        scan(disk, PATH)


@given(st.lists(st.integers(0, 60), unique=True), st.integers(0, 400), st.integers(16, 300))
@settings(max_examples=50)
def test_any_chunk_size_gives_the_same(indexes: list[int], cut: int, chunk_bytes: int) -> None:
    content = b"".join(ok_line(index) for index in indexes)
    content = content[: max(0, len(content) - cut)]
    expected = scan(disk_with(content), PATH)
    usual = recovery.CHUNK_BYTES
    recovery.CHUNK_BYTES = chunk_bytes
    try:
        found = scan(disk_with(content), PATH)
    finally:
        recovery.CHUNK_BYTES = usual
    assert (found.done, found.torn_bytes) == (expected.done, expected.torn_bytes)
    assert found.states.tolist() == expected.states.tolist()


def test_a_line_without_end_is_refused_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LINE_BYTES_MAX", 1000)
    monkeypatch.setattr(recovery, "CHUNK_BYTES", 100)
    with pytest.raises(RunDirError, match="longer than 1000"):
        scan(disk_with(ok_line(0) + b"x" * 5000), PATH)


class _Piece(bytes):
    """A chunk that counts what is copied to add it to what came before."""

    copied_bytes = 0

    def __radd__(self, before: bytes) -> bytes:
        _Piece.copied_bytes += len(before) + len(self)
        return bytes(before) + bytes(self)


def test_a_line_of_many_chunks_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of one request make lines of a hundred megabytes: each chunk must not cost all those before it."""
    monkeypatch.setattr(recovery, "CHUNK_BYTES", 100)
    monkeypatch.setattr(_Piece, "copied_bytes", 0)
    content = ok_line(0) + ok_line(1, text="x" * 20_000) + ok_line(2, text="y" * 20_000)

    class Pieces(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return _Piece(super().read(size))

    class Disk(FakeDisk):
        def open_read(self, path: Path) -> io.BytesIO:
            return Pieces(super().open_read(path).read())

    disk = Disk(dirs={RUN}, files={PATH: Content(content, content)})
    assert scan(disk, PATH).ok == 3
    assert _Piece.copied_bytes <= 4 * len(content)


def test_no_line_that_a_worker_may_send_is_too_long_to_be_read_again() -> None:
    assert recovery.LINE_BYTES_MAX >= ENVELOPE_BYTES_MAX


def test_rows_come_in_bounded_chunks_in_order_of_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "ROWS_PER_CHUNK", 4)
    content = b"".join(ok_line(index, session=index % 2) for index in (9, 3, 5, 1, 7, 0)) + b"torn"
    chunks = list(rows(PATH, disk_with(content)))
    assert [len(chunk) for chunk in chunks] == [4, 2]
    assert np.concatenate(chunks)["index"].tolist() == [9, 3, 5, 1, 7, 0]
    assert np.concatenate(list(rows(PATH, disk_with(content), session=0)))["index"].tolist() == [0]
    assert list(rows(PATH, FakeDisk())) == []


def test_export_is_in_the_order_of_the_input(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(300)
    content = b"".join(ok_line(int(index), text=f"answer {index}") for index in order if index != 17)
    (tmp_path / "results.jsonl").write_bytes(content + b"torn tail")
    out = io.BytesIO()
    assert export_ordered(tmp_path, out) == 299
    written = out.getvalue().splitlines(keepends=True)
    assert written == [ok_line(index, text=f"answer {index}") for index in range(300) if index != 17]
    assert all(line_checks(line) for line in written)


def test_export_of_a_directory_without_a_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no answer has been recorded"):
        export_ordered(tmp_path, io.BytesIO())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_record(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with open(path, "wb") as file:
        for index in range(20_000):
            file.write(ok_line(index, text="x" * 1000))
    tracemalloc.start()
    try:
        assert scan(OsDisk(), path).ok == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20 < path.stat().st_size
