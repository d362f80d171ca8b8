"""Group commit: nothing is acknowledged before it is durable, and nothing after a failure."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scheduling.errors import BugError, RecordError
from scheduling.recordline import encode_failure
from storage.files import OsDisk
from storage.record import GroupCommit, RecordWriter, open_record
from storage.recovery import recover, scan
from tests.storage.fake_disk import FakeDisk

RUN = Path("/run")
PATH = RUN / "results.jsonl"


def line(index: int) -> bytes:
    return encode_failure(f"id-{index}", index, 1, 1, 0, "test", "x" * 50)


def fake() -> FakeDisk:
    return FakeDisk(dirs={RUN})


def core(disk: FakeDisk, commit_bytes: int = 1 << 20) -> GroupCommit:
    return GroupCommit(disk.open_append(PATH), PATH, commit_interval_s=0.05, commit_bytes=commit_bytes)


def test_commit_is_due_an_interval_after_the_oldest_line() -> None:
    commit = core(fake())
    assert commit.due_in_s(0.0) is None
    commit.add([line(0)], 10.0)
    commit.add([line(1)], 10.04)
    assert commit.due_in_s(10.0) == pytest.approx(0.05)
    assert commit.due_in_s(10.06) == 0.0
    assert commit.commit() == 2
    assert commit.due_in_s(10.06) is None


def test_commit_is_due_at_once_when_enough_bytes_wait() -> None:
    commit = core(fake(), commit_bytes=2 * len(line(0)))
    commit.add([line(0)], 0.0)
    assert commit.due_in_s(0.0) == 0.05
    commit.add([line(1)], 0.0)
    assert commit.due_in_s(0.0) == 0.0


def test_many_lines_cost_one_sync() -> None:
    disk = fake()
    commit = core(disk)
    commit.add([line(index) for index in range(100)], 0.0)
    commit.commit()
    assert disk.calls.count("sync") == 1
    assert commit.fsyncs == 1
    assert commit.durable_bytes == len(disk.files[PATH].durable)
    assert commit.commit() == 0
    assert commit.fsyncs == 1


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failed_write_or_sync_is_final_and_says_what_to_do(operation: str, number: int) -> None:
    disk = fake()
    commit = core(disk)
    commit.add([line(0)], 0.0)
    assert commit.commit() == 1
    disk.fail[operation] = number
    commit.add([line(1)], 0.0)
    with pytest.raises(RecordError, match="run the same command again") as caught:
        commit.commit()
    assert str(PATH) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    disk.fail.clear()
    with pytest.raises(RecordError):
        commit.add([line(2)], 0.0)
    with pytest.raises(RecordError):
        commit.commit()
    assert commit.durable_lines == 1
    assert disk.files[PATH].now == line(0), "what was not acknowledged is cut off, so that a resume redoes it"


def test_full_disk_acknowledges_exactly_what_a_crash_leaves() -> None:
    size = len(line(0))
    for room in range(0, 6 * size, 37):
        disk = FakeDisk(dirs={RUN}, capacity_bytes=room)
        commit = core(disk)
        acknowledged = 0
        try:
            for index in range(0, 6, 2):
                commit.add([line(index), line(index + 1)], 0.0)
                acknowledged += commit.commit()
        except RecordError:
            pass
        after = disk.crash(torn_bytes=room)
        assert recover(after, PATH).ok + recover(after, PATH).failed >= acknowledged
        assert len(disk.files[PATH].durable) == acknowledged * size


def test_what_is_known_to_be_synced_follows_each_commit_and_is_never_ahead() -> None:
    disk = fake()
    mark = PATH.with_suffix(".synced")
    with RecordWriter(disk, PATH, StoppedClock(), commit_bytes=1) as writer:
        assert disk.files[mark].durable == b"0\n"
        writer.append([line(0)])
    assert disk.files[mark].now == b"%d\n" % len(line(0))
    disk.fail["sync"] = errno.EIO
    commit = GroupCommit(disk.open_append(PATH), PATH, mark=disk.open_append(mark))
    commit.add([line(1)], 0.0)
    with pytest.raises(RecordError):
        commit.commit()
    assert disk.files[mark].now == b"%d\n" % len(line(0))


class StoppedClock:
    """Time that stands still: a commit then waits until its bytes or the closing make it due."""

    def __call__(self) -> float:
        return 0.0


def test_writer_acknowledges_all_lines_by_the_time_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    writer = RecordWriter(OsDisk(), path, StoppedClock())
    for index in range(50):
        writer.append([line(2 * index), line(2 * index + 1)])
    writer.close()
    assert writer.acknowledged() == 100
    assert writer.acknowledged() == 0
    assert writer.backlog_bytes == 0
    assert writer.fsyncs >= 1
    assert scan(OsDisk(), path).failed == 100


def test_writer_commits_by_itself_when_the_interval_is_over(tmp_path: Path) -> None:
    with RecordWriter(OsDisk(), tmp_path / "r", time.monotonic, commit_interval_s=0.001) as writer:
        writer.append([line(0)])
        pause, deadline = threading.Event(), time.monotonic() + 300
        acknowledged = 0
        # A line counts as durable a moment before it counts as no longer waiting.
        while acknowledged == 0 or writer.backlog_bytes > 0:
            assert time.monotonic() < deadline
            pause.wait(0.001)
            acknowledged += writer.acknowledged()
        assert acknowledged == 1


def test_writer_reports_a_failure_after_the_lines_that_were_durable_before_it() -> None:
    disk = fake()
    writer = RecordWriter(disk, PATH, StoppedClock(), commit_bytes=1)
    writer.append([line(0)])
    pause = threading.Event()
    while writer.durable_lines == 0:
        pause.wait(0.001)
    disk.fail["sync"] = errno.EIO
    writer.append([line(1)])
    with pytest.raises(RecordError, match="Input/output error"):
        writer.close()
    assert writer.acknowledged() == 1
    for _ in range(2):
        with pytest.raises(RecordError):
            writer.acknowledged()


def test_writer_turns_an_unexpected_exception_into_a_record_error() -> None:
    class Broken(FakeDisk):
        def check(self, operation: str) -> None:
            if operation == "sync" and self.files[PATH].now:
                raise RuntimeError("no such thing")

    writer = RecordWriter(Broken(dirs={RUN}), PATH, StoppedClock())
    writer.append([line(0)])
    with pytest.raises(RecordError, match="no such thing"):
        writer.close()


def test_an_error_in_the_body_is_not_hidden_by_the_writers_own() -> None:
    disk = fake()

    def body() -> None:
        with RecordWriter(disk, PATH, StoppedClock()) as writer:
            disk.fail["write"] = errno.ENOSPC
            writer.append([line(0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()


def test_appending_after_closing_is_a_bug(tmp_path: Path) -> None:
    writer = RecordWriter(OsDisk(), tmp_path / "r", StoppedClock())
    writer.close()
    with pytest.raises(BugError):
        writer.append([line(0)])


def test_a_torn_record_is_not_appended_to() -> None:
    disk = fake()
    disk.open_append(PATH).write(line(0)[:-5])
    with pytest.raises(BugError, match="recovered"):
        open_record(disk, PATH)


def test_a_record_that_cannot_be_opened_is_a_record_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="Is a directory"):
        RecordWriter(OsDisk(), tmp_path, StoppedClock())


APPENDER = """
import sys, time
from pathlib import Path
from scheduling.recordline import encode_failure
from storage.files import OsDisk
from storage.record import RecordWriter

writer = RecordWriter(OsDisk(), Path(sys.argv[1]), time.monotonic, commit_interval_s=0.001)
index = acknowledged = 0
while True:
    if writer.backlog_bytes < 1 << 20:
        writer.append([encode_failure("id", index + k, 1, 1, 0, "test", "x" * 200) for k in range(10)])
        index += 10
    new = writer.acknowledged()
    if new:
        acknowledged += new
        print(acknowledged, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_has_recorded_every_line_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", APPENDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    acknowledged = max(int(text) for text in said if text.endswith(b"\n"))
    found = recover(OsDisk(), path)
    assert acknowledged > 0
    assert found.failed >= acknowledged
    assert found.states.all(), "lines are recorded in the order of append, without gaps"
