"""A run directory belongs to one run and to one job at a time, and says how far it is without being touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scheduling.errors import BugError, RecordError, RunDirError
from scheduling.recordline import encode_failure
from storage.files import AppendFile, Lock, OsDisk
from storage.joblock import Holder, Judge, alive, read_holder, this_process
from storage.record import GroupCommit, open_record
from storage.recovery import RECORD_NAME, recover
from storage.rundir import RunDir, lock_run
from storage.runjson import read_run, unusable
from storage.runstatus import request_stop, status
from tests.simulation.disk import Outside, SimulatedDisk, Storage
from tests.storage.fake_disk import FakeDisk, PowerCutError
from tests.storage.samples import ok_line

IDENTITY = {"input": "sha256:aa", "model": "sampled-sha256:bb", "sampling": {"temperature": 0.5, "stop": ("x",)}}
ROOT = Path(__file__).resolve().parents[2]


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def test_a_new_run_stores_what_it_was_given(tmp_path: Path) -> None:
    details = {"config": {"slots": 4}, "path": tmp_path, "gpus": np.int64(2)}
    with RunDir.create_or_resume(
        tmp_path / "a" / "run", IDENTITY, details, {"ranks": 3}, now_unix_s=lambda: 0.0
    ) as run:
        assert not run.resumed
        assert run.session == 0
        assert not run.complete
        assert run.notes == []
        run.set_total(10)
        run.add_details({"hosts": ["n1"]})
        run.add_session_facts({"launcher": "mpirun"})
    stored = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert stored["identity"]["sampling"] == {"temperature": 0.5, "stop": ["x"]}
    assert stored["details"] == {"config": {"slots": 4}, "path": str(tmp_path), "gpus": 2, "hosts": ["n1"]}
    assert stored["sessions"] == [
        {"session": 0, "started_at": "1970-01-01T00:00:00Z", "ranks": 3, "launcher": "mpirun"}
    ]
    assert stored["total"] == 10
    assert stored["complete"] is False


def test_the_same_identity_resumes_and_adds_a_session(tmp_path: Path) -> None:
    RunDir.create_or_resume(tmp_path, IDENTITY, {"slots": 1}).close()
    with RunDir.create_or_resume(tmp_path, dict(reversed(IDENTITY.items())), {"slots": 2}) as run:
        assert run.resumed
        assert run.session == 1
        assert [session["session"] for session in run.sessions] == [0, 1]
    assert read_run(tmp_path)["details"] == {"slots": 2}


def test_another_identity_is_refused_naming_what_differs_and_both_values(tmp_path: Path) -> None:
    RunDir.create_or_resume(tmp_path, IDENTITY).close()
    (tmp_path / "results.jsonl").write_bytes(b"{}\n")
    before = snapshot(tmp_path)["run.json"]
    other = {**IDENTITY, "sampling": {"temperature": 0.7, "stop": ["x"]}, "endpoint": "chat"}
    with pytest.raises(RunDirError) as caught:
        RunDir.create_or_resume(tmp_path, other)
    assert "sampling.temperature is 0.5 there and 0.7 here" in str(caught.value)
    assert 'endpoint is null there and "chat" here' in str(caught.value)
    assert snapshot(tmp_path)["run.json"] == before
    RunDir.create_or_resume(tmp_path, IDENTITY).close()


def test_a_directory_in_which_nothing_was_ever_answered_may_become_another_run(tmp_path: Path) -> None:
    RunDir.create_or_resume(tmp_path, IDENTITY).close()
    other = {**IDENTITY, "endpoint": "chat"}
    with RunDir.create_or_resume(tmp_path, other) as run:
        assert not run.complete
    assert read_run(tmp_path)["identity"]["endpoint"] == "chat"


def test_a_second_job_is_refused_with_who_holds_the_directory(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY):
        with pytest.raises(RunDirError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            RunDir.create_or_resume(tmp_path, IDENTITY)
        assert status(tmp_path).running
    RunDir.create_or_resume(tmp_path, IDENTITY).close()


HOLD = """
import sys, os, signal
from pathlib import Path
from storage.record import GroupCommit, open_record
from storage.recovery import recover
from storage.rundir import RunDir
run = RunDir.create_or_resume(Path(sys.argv[1]), {"a": 1})
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_job_lets_go_and_the_next_says_whom_it_took_over_from(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(RunDirError, match=f"in use by process {process.pid}"):
        RunDir.create_or_resume(tmp_path, {"a": 1})
    found = status(tmp_path)
    assert found.running
    assert found.holder is not None
    assert found.holder.pid == process.pid
    process.kill()
    process.communicate()
    assert not status(tmp_path).running
    with RunDir.create_or_resume(tmp_path, {"a": 1}) as run:
        assert run.session == 1
        assert len(run.notes) == 1
        assert f"process {process.pid}" in run.notes[0]
    with RunDir.create_or_resume(tmp_path, {"a": 1}) as run:
        assert run.notes == [], "a job that let go is not taken over from"


def test_foreign_content_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(RunDirError, match=r"holds thesis\.tex"):
        RunDir.create_or_resume(tmp_path, IDENTITY)
    assert snapshot(tmp_path) == before


def test_output_of_the_batch_system_is_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").write_text("x")
    RunDir.create_or_resume(tmp_path, IDENTITY).close()


def test_a_record_without_run_json_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(ok_line(0))
    with pytest.raises(RunDirError, match="no run directory"):
        RunDir.create_or_resume(tmp_path, IDENTITY)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunDirError, match="not a directory"):
        RunDir.create_or_resume(tmp_path / "run", IDENTITY)
    with pytest.raises(RunDirError, match="Not a directory"):
        RunDir.create_or_resume(tmp_path / "run" / "below", IDENTITY)


@pytest.mark.parametrize("operation", ["make_dirs", "open", "write", "sync", "rename", "sync_dir"])
def test_a_directory_that_cannot_be_written_is_a_clear_error_and_leaves_no_lock(operation: str) -> None:
    disk = FakeDisk(fail={operation: errno.EROFS})
    with pytest.raises(RecordError, match=r"cannot write to the run directory /run: Read-only file system\."):
        RunDir.create_or_resume(Path("/run"), IDENTITY, disk=disk)
    assert not disk.held
    disk = FakeDisk(fail={operation: errno.EACCES})
    with pytest.raises(RunDirError, match=r"cannot use /run as run directory: Permission denied\."):
        RunDir.create_or_resume(Path("/run"), IDENTITY, disk=disk)
    assert not disk.held
    with pytest.raises(RecordError, match=r"No space left on device\. Free space.*, or give another run directory"):
        RunDir.create_or_resume(Path("/run"), IDENTITY, disk=FakeDisk(fail={operation: errno.ENOSPC}))


def test_that_what_is_recorded_is_safe_is_said_where_anything_is(tmp_path: Path) -> None:
    error = OSError(errno.EROFS, "Read-only file system")
    assert "is safe" not in str(unusable(tmp_path, error))
    (tmp_path / RECORD_NAME).touch()
    assert "system. What is recorded is safe; free space" in str(unusable(tmp_path, error))


def test_a_place_where_nothing_can_be_made_is_said_to_be_one() -> None:
    with pytest.raises(RunDirError, match=r"cannot use /proc/run as run directory: nothing can be made there"):
        RunDir.create_or_resume(Path("/proc/run"), IDENTITY)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format":"llmpi-run","version":1}', "\udcff"])
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for use in (status, lambda path: RunDir.create_or_resume(path, IDENTITY)):
        with pytest.raises(RunDirError, match=r"run\.json"):
            use(tmp_path)


def test_a_run_json_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format":"llmpi-run","version":99}')
    with pytest.raises(RunDirError, match="version 99"):
        RunDir.create_or_resume(tmp_path, IDENTITY)


def test_a_crash_while_run_json_is_replaced_leaves_the_old_one() -> None:
    disk = FakeDisk()
    run = RunDir.create_or_resume(Path("/run"), IDENTITY, disk=disk)
    disk.fail["rename"] = errno.EIO
    with pytest.raises(RecordError):
        run.mark_complete()
    assert read_run(Path("/run"), disk.crash())["complete"] is False


def test_a_power_cut_at_any_operation_leaves_a_run_that_resumes_with_all_it_acknowledged() -> None:
    path = Path("/run")
    lines = [ok_line(index) for index in range(4)]
    for cut_after in range(1000):
        disk = FakeDisk(cut_after=cut_after)
        acknowledged, finished = 0, False
        try:
            run = RunDir.create_or_resume(path, IDENTITY, disk=disk)
            run.set_total(len(lines))
            commit = GroupCommit(open_record(disk, run.record_path), run.record_path)
            for start in (0, 2):
                commit.add(lines[start : start + 2], 0.0)
                acknowledged += commit.commit()
            run.mark_complete()
            run.close()
            finished = True
        except PowerCutError:
            pass
        for torn_bytes in (0, 7, len(lines[0]), len(lines[0]) + 7):
            after = disk.crash(torn_bytes)
            run = RunDir.create_or_resume(path, IDENTITY, disk=after)
            found = recover(after, run.record_path)
            assert found.ok >= acknowledged
            assert found.ok == 4 or not run.complete
            assert found.states.all()
            assert run.complete or not finished
        if finished:
            assert cut_after > 20
            return
    pytest.fail("the run never came to its end")


def test_a_directory_that_a_dead_start_left_is_durable_before_anything_is_recorded_in_it() -> None:
    """Its name was not synced when that start died: a power cut would take it away with all that is in it."""
    storage = Storage(Path("/runs"))
    disk = SimulatedDisk(storage, Outside())
    disk.make_dirs(Path("/runs/run"))
    assert Path("/runs/run") not in storage.durable_names
    with RunDir.create_or_resume(Path("/runs/run"), IDENTITY, disk=disk):
        assert Path("/runs/run") in storage.durable_names


def test_stop_reaches_the_running_job_and_is_gone_for_the_next(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        assert not run.stop_requested()
        holder = request_stop(tmp_path)
        assert holder is not None
        assert holder.pid == os.getpid()
        assert run.stop_requested()
    assert not (tmp_path / "stop").exists()
    (tmp_path / "stop").write_text("left by a job that was killed")
    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        assert not run.stop_requested()


def test_a_stop_that_is_asked_for_while_the_input_is_prepared_is_kept(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY):
        pass
    (tmp_path / "stop").write_text("left by a job that was killed")
    held = lock_run(tmp_path)
    assert not (tmp_path / "stop").exists()
    request_stop(tmp_path)
    with RunDir.create_or_resume(tmp_path, IDENTITY, held=held) as run:
        assert run.stop_requested()


@pytest.mark.parametrize("away", ["removed", "renamed", "emptied"])
def test_nothing_is_acknowledged_once_the_directory_is_gone(tmp_path: Path, away: str) -> None:
    path = tmp_path / "run"
    with RunDir.create_or_resume(path, IDENTITY) as run:
        core = GroupCommit(open_record(OsDisk(), run.record_path), run.record_path, check_held=run.check_held)
        core.add([ok_line(0)], 0.0)
        assert core.commit() == 1
        if away == "renamed":
            path.rename(tmp_path / "other")
        else:
            shutil.rmtree(path)
        if away == "emptied":
            path.mkdir()
        core.add([ok_line(1)], 0.0)
        with pytest.raises(RecordError, match="was removed or renamed"):
            core.commit()
        with pytest.raises(RecordError, match="was removed or renamed"):
            run.stop_requested()


def test_a_stop_that_comes_as_soon_as_the_job_has_its_lock_is_kept(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY):
        pass

    class Asked(OsDisk):
        def try_lock(self, path: Path) -> Lock | None:
            lock = super().try_lock(path)
            request_stop(tmp_path)
            return lock

    with RunDir.create_or_resume(tmp_path, IDENTITY, disk=Asked()) as run:
        assert run.stop_requested()


def test_several_may_ask_for_a_stop_at_once(tmp_path: Path) -> None:
    class Between(OsDisk):
        """A second one asks whenever the first has opened a file."""

        def open_append(self, path: Path) -> AppendFile:
            file = super().open_append(path)
            request_stop(tmp_path)
            return file

    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        request_stop(tmp_path, Between())
        assert run.stop_requested()


def test_stop_without_a_job_or_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory"):
        request_stop(tmp_path)
    RunDir.create_or_resume(tmp_path, IDENTITY).close()
    with pytest.raises(RunDirError, match="no job is running"):
        request_stop(tmp_path)
    assert not (tmp_path / "stop").exists()


def test_status_follows_a_run_to_its_end_and_writes_nothing(tmp_path: Path) -> None:
    run = RunDir.create_or_resume(tmp_path, IDENTITY)
    run.set_total(2)
    run.record_path.write_bytes(ok_line(0) + ok_line(1)[:30])
    before = snapshot(tmp_path)
    found = status(tmp_path)
    assert (found.ok, found.failed, found.total, found.done) == (1, 0, 2, 1)
    assert found.torn_bytes == 30
    assert found.running
    assert found.exit_code == 3
    assert found.sessions == 1
    assert snapshot(tmp_path) == before
    run.record_path.write_bytes(ok_line(0) + ok_line(1))
    assert status(tmp_path).exit_code == 3, "all recorded, but not finished"
    run.mark_complete({"output_tokens": 6})
    run.close()
    found = status(tmp_path)
    assert found.exit_code == 0
    assert found.complete
    assert not found.running
    run.record_path.write_bytes(ok_line(0) + encode_failure("id", 1, 1, 1, 0, "test", "no"))
    assert status(tmp_path).exit_code == 1
    run.record_path.write_bytes(ok_line(0))
    assert status(tmp_path).exit_code == 3, "the record decides, not the flag"


def test_a_complete_run_stays_as_it_is(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        run.set_total(0)
        run.mark_complete()
        with pytest.raises(BugError):
            run.mark_complete()
    before = (tmp_path / "run.json").read_bytes()
    with RunDir.create_or_resume(tmp_path, IDENTITY, {"other": 1}) as run:
        assert run.complete
        assert run.resumed
        assert run.total == 0
        run.add_session_facts({"ranks": 2})
    assert (tmp_path / "run.json").read_bytes() == before


def judge(lives: bool) -> Judge:
    return Judge(is_alive=lambda holder: lives, pause=lambda seconds: None)


def test_without_locks_a_living_holder_is_believed_and_a_dead_one_is_not() -> None:
    disk, path = FakeDisk(locks_work=False), Path("/run")
    first = RunDir.create_or_resume(path, IDENTITY, disk=disk, judge=judge(True))
    assert "has no locks" in first.notes[0]
    with pytest.raises(RunDirError, match="in use by"):
        RunDir.create_or_resume(path, IDENTITY, disk=disk, judge=judge(True))
    assert status(path, disk, judge(True)).running
    assert not status(path, disk, judge(False)).running
    second = RunDir.create_or_resume(path, IDENTITY, disk=disk, judge=judge(False))
    assert "ended without stopping" in second.notes[0]
    second.close()
    first.close()


def test_a_holder_on_another_host_is_taken_to_live_and_how_to_free_it_is_said(tmp_path: Path) -> None:
    elsewhere = Holder("another-host", 1, "2026-01-01T00:00:00Z")
    assert alive(elsewhere)
    with RunDir.create_or_resume(tmp_path, IDENTITY):
        (tmp_path / "lock").write_text(json.dumps(vars(elsewhere)))
        with pytest.raises(RunDirError, match=r"process 1 on another-host .* remove .*lock"):
            RunDir.create_or_resume(tmp_path, IDENTITY)


def test_a_process_number_used_again_is_not_the_holder() -> None:
    me = this_process(0.0)
    assert alive(me)
    if me.started_ticks:
        assert not alive(Holder(me.host, me.pid, me.since, me.started_ticks + 1))
    assert not alive(Holder(me.host, (1 << 22) + 5, me.since))


def test_an_unreadable_lock_file_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"host": 3')
    assert read_holder(OsDisk(), tmp_path / "lock") is None
    assert read_holder(OsDisk(), tmp_path / "none") is None


def test_a_complete_run_that_lost_answers_can_be_taken_up_again(tmp_path: Path) -> None:
    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        run.mark_complete()
    with RunDir.create_or_resume(tmp_path, IDENTITY) as run:
        assert run.complete
        run.reopen()
        assert not run.complete
        assert len(run.sessions) == 2
        run.add_session_facts({"ranks": 3})
    assert read_run(tmp_path)["sessions"][1]["ranks"] == 3


def test_where_there_is_no_run_it_is_said_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "slurm").mkdir(parents=True)  # the scripts' folder alone makes no run of Slurm's
    with pytest.raises(RunDirError, match=r"checkout is no run directory: it has no run\.json"):
        status(tmp_path / "checkout")
    (tmp_path / "waits" / "slurm").mkdir(parents=True)
    (tmp_path / "waits" / "slurm" / "jobs.jsonl").write_text('{"submitted": "17"}\n')
    for ask in (status, request_stop):
        with pytest.raises(
            RunDirError, match=r"no job has begun the run in .*waits yet: .*squeue.*scancel.*waits/slurm"
        ):
            ask(tmp_path / "waits")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"`llmpi study show .*study`"):
        status(tmp_path / "study")
