"""Whose a run directory is, where locks reach every host, one host, or do not exist: nobody's clock is asked."""

from __future__ import annotations

import errno
import json
import socket
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from scheduling.errors import RecordError, RunDirError
from storage import joblock
from storage.filesystems import mount_of
from storage.joblock import SETTLE_S, WATCH_S, Holder, JobLock, Judge, beat_path, holder_of, read_beat, this_process
from storage.record import GroupCommit, open_record
from tests.storage.fake_disk import Content, FakeDisk
from tests.storage.samples import PATH, RUN

LOCK = Path("/run/lock")
ELSEWHERE = Holder("node-7", 42, "2026-01-01T00:00:00Z", 5, "1234")
LATER = Holder("node-8", 43, "2026-01-01T00:00:09Z")


@dataclass
class Others:
    """Jobs on other hosts. `beats`: what the beat stands at as time goes by, second by second."""

    disk: FakeDisk
    beats: list[bytes] = field(default_factory=list)
    slept_s: float = 0.0
    then: Holder | None = None
    """Who writes its name while this job settles."""

    def pause(self, seconds: float) -> None:
        self.slept_s += seconds
        if seconds == SETTLE_S and self.then is not None:
            put(self.disk, LOCK, json.dumps(asdict(self.then)).encode())
        elif self.beats:
            put(self.disk, beat_path(LOCK), self.beats.pop(0))

    def judge(self, reaches: bool = False) -> Judge:
        return Judge(reaches=lambda path: reaches, pause=self.pause)


def put(disk: FakeDisk, path: Path, data: bytes) -> None:
    disk.files[path] = Content(data, data)


def disk_of(*, locks_work: bool, holder: Holder | None = ELSEWHERE, beat: bytes | None = b"7\n") -> FakeDisk:
    disk = FakeDisk(locks_work=locks_work, dirs={LOCK.parent, RUN})
    if holder is not None:
        put(disk, LOCK, json.dumps(asdict(holder)).encode())
    if beat is not None:
        put(disk, beat_path(LOCK), beat)
    return disk


def test_a_lock_that_could_be_had_and_reaches_all_hosts_proves_that_the_last_job_is_dead() -> None:
    disk = disk_of(locks_work=True)
    others = Others(disk)
    lock = JobLock(disk, LOCK, this_process(0.0), others.judge(reaches=True))
    assert "process 42 on node-7 (since 2026-01-01T00:00:00Z, Slurm job 1234)" in (lock.note or "")
    assert others.slept_s == 0
    lock.release()


@pytest.mark.parametrize("locks_work", [True, False])
def test_a_job_on_another_host_whose_beat_stands_still_is_taken_over_and_that_is_said(locks_work: bool) -> None:
    disk = disk_of(locks_work=locks_work)
    others = Others(disk)
    assert holder_of(disk, LOCK, others.judge()) == (False, None)
    lock = JobLock(disk, LOCK, this_process(0.0), others.judge())
    assert "process 42 on node-7" in (lock.note or "")
    assert others.slept_s >= WATCH_S
    lock.release()


@pytest.mark.parametrize("locks_work", [True, False])
def test_a_job_on_another_host_that_beats_is_refused_by_name(locks_work: bool) -> None:
    disk = disk_of(locks_work=locks_work)
    others = Others(disk, beats=[b"7\n", b"", b"7\n", b"8\n"])
    with pytest.raises(RunDirError, match=r"in use by process 42 on node-7 .*Slurm job 1234"):
        JobLock(disk, LOCK, this_process(0.0), others.judge())
    assert not disk.held, "a lock that could be had is let go"
    others.beats = [b"9\n"]
    assert holder_of(disk, LOCK, others.judge()) == (True, ELSEWHERE)


def test_one_that_never_beats_is_believed() -> None:
    disk = disk_of(locks_work=False, beat=None)
    with pytest.raises(RunDirError, match=r"node-7.*remove /run/lock"):
        JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())


def test_of_two_that_take_over_at_once_only_one_has_it() -> None:
    disk = disk_of(locks_work=False, holder=None, beat=None)
    with pytest.raises(RunDirError, match="in use by process 43 on node-8"):
        JobLock(disk, LOCK, this_process(0.0), Others(disk, then=LATER).judge())
    assert json.loads(disk.files[LOCK].now)["host"] == "node-8", "the other's name stays"


def test_it_beats_where_locks_do_not_reach_and_nowhere_else() -> None:
    for reaches in (False, True):
        disk = disk_of(locks_work=True, holder=None, beat=None)
        lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge(reaches=reaches))
        assert (read_beat(disk, LOCK) is not None) is not reaches
        lock.release()


def test_a_job_that_was_taken_for_dead_ends_and_leaves_the_others_name() -> None:
    disk = disk_of(locks_work=False, holder=None, beat=None)
    lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())
    lock.check()
    put(disk, LOCK, json.dumps(asdict(LATER)).encode())
    with pytest.raises(RunDirError, match="taken over by process 43 on node-8"):
        lock.check()
    lock.release()
    assert json.loads(disk.files[LOCK].now)["host"] == "node-8"


@pytest.mark.parametrize("content", [b"", json.dumps(asdict(LATER)).encode()[:-9]])
def test_it_ends_too_where_the_other_job_is_done_already_or_its_name_is_cut_short(content: bytes) -> None:
    disk = disk_of(locks_work=False, holder=None, beat=None)
    lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())
    put(disk, LOCK, content)
    with pytest.raises(RunDirError, match="taken over by another job"):
        lock.check()
    lock.release()
    assert disk.files[LOCK].now == content


def test_a_lock_that_cannot_be_read_is_not_taken_for_anothers() -> None:
    disk = disk_of(locks_work=False, holder=None, beat=None)
    lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())
    disk.fail["read"] = errno.ENOTCONN
    lock.check()
    disk.fail.clear()
    lock.release()


def test_a_job_that_was_taken_for_dead_writes_nothing_more_to_the_record() -> None:
    disk = disk_of(locks_work=False, holder=None, beat=None)
    lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())
    commit = GroupCommit(open_record(disk, PATH), PATH, check_held=lock.check)
    commit.add([b"first\n"], 0.0)
    commit.commit()
    put(disk, LOCK, json.dumps(asdict(LATER)).encode())
    commit.add([b"second\n"], 0.0)
    with pytest.raises(RecordError, match="taken over by process 43 on node-8"):
        commit.commit()
    assert disk.files[PATH].now == b"first\n", "nor is what the other job writes cut off"
    lock.release()


def test_the_beat_is_counted_as_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblock, "BEAT_S", 1e-3)
    disk = disk_of(locks_work=False, holder=None, beat=None)
    lock = JobLock(disk, LOCK, this_process(0.0), Others(disk).judge())
    seen, pause = {read_beat(disk, LOCK)}, threading.Event()
    for _ in range(10_000):
        pause.wait(1e-3)
        seen.add(read_beat(disk, LOCK))
        if len(seen - {None}) > 2:
            break
    lock.release()
    assert len(seen - {None}) > 2


def test_who_holds_it_says_its_slurm_job() -> None:
    me = this_process(0.0, {"SLURM_JOB_ID": "77"})
    assert me.host == socket.gethostname()
    assert str(me).endswith("(since 1970-01-01T00:00:00Z, Slurm job 77)")
    assert "Slurm" not in str(this_process(0.0, {}))


@pytest.mark.parametrize(
    ("mounted", "reaches"),
    [
        ("ext4 /dev/vda rw", True),
        ("tmpfs tmpfs rw", True),
        ("overlay overlay rw,lowerdir=/a", True),
        ("nfs4 server:/x rw,vers=4.2,local_lock=none", True),
        ("nfs server:/x rw,vers=3,nolock,local_lock=all", False),
        ("nfs server:/x rw,vers=3,local_lock=posix", False),
        ("lustre mds@tcp:/x rw,flock,lazystatfs", True),
        ("lustre mds@tcp:/x rw,localflock", False),
        ("lustre mds@tcp:/x rw", False),
        ("gpfs /dev/gpfs rw", True),
        ("beegfs beegfs_nodev rw", False),
        ("9p host rw", False),
        ("fuse.sshfs user@host: rw", False),
    ],
)
def test_whether_locks_reach_other_hosts_is_known_from_the_mount(mounted: str, reaches: bool) -> None:
    table = f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / /data rw,relatime shared:1 - {mounted}\n"
    assert mount_of(Path("/data/run"), table).locks_reach is reaches
