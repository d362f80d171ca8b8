"""A whole run whose world ends, or whose disk fails, at each of its operations on disk in turn.

The real thing runs in this process: command's main loop, session, control plane, worker, record, run directory,
intervals, metrics. Only the engine is the null one, and what the product does in threads is done in turn, so that
operations come in the same order each time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import pytest

from coordinator import intervals, lead, loop, serve, setup, versions
from coordinator.batchoptions import BatchOptions
from coordinator.config import JobConfig
from coordinator.launch import detect
from coordinator.lead import Lead
from coordinator.rundata import make_metrics
from coordinator.setup import Setup, prepare
from coordinator.signals import StopSignals
from coordinator.surroundings import Surroundings
from scheduling.errors import EXIT_OK, EXIT_RESUMABLE, LlmpiError, RunDirError
from storage import metrics
from storage.files import Disk, OsDisk
from storage.record import GroupCommit, open_mark, open_record
from storage.runstatus import status
from storage.segments import latest
from storage.staging import Staged
from tests.storage.crash_disk import MODELS, CrashDisk, Model
from tests.storage.fake_disk import PowerCutError

pytestmark = pytest.mark.slow

REQUESTS = 6
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


class InTurn(Executor):
    """What would be done in a thread is done at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Writer:
    """`storage.record.RecordWriter` without its thread: a commit a turn. `acknowledged_lines`: what it promised."""

    acknowledged_lines: list[bytes] = []  # noqa: RUF012 - of all sessions of a test

    def __init__(
        self, disk: Disk, path: Path, clock: Callable[[], float], commit_interval_s: float, commit_bytes: int,
        check_held: Callable[[], None],
    ) -> None:  # fmt: skip
        self._file = open_record(disk, path)
        self._core = GroupCommit(self._file, path, 0.0, 1, open_mark(disk, path, self._file))
        self._lines: list[bytes] = []
        self.backlog_bytes = 0

    @property
    def fsyncs(self) -> int:
        return self._core.fsyncs

    def append(self, lines: Sequence[bytes]) -> None:
        self._core.add(lines, 0.0)
        self._lines += lines

    def acknowledged(self) -> int:
        count = self._core.commit()
        Writer.acknowledged_lines += self._lines[:count]
        del self._lines[:count]
        return count

    def close(self) -> None:
        self.acknowledged()
        self._file.close()


class Job:
    """The same `llmpi batch` again and again, each time on another disk over the same folder."""

    def __init__(self, folder: Path, requests: int = REQUESTS) -> None:
        self.root = folder / "disk"
        self.run_dir = self.root / "run"
        self.input = folder / "in.jsonl"
        if not self.root.exists():
            self.root.mkdir()
            lines = [{"custom_id": f"r{k}", "prompt": f"{k}" * (1 + 100 * k)} for k in range(requests)]
            self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.config = JobConfig(
            model="none", engine="null", slots=3, prefetch=0, device="cpu", null_answer_bytes=150,
            metrics_interval_s=1e-9,
        )  # fmt: skip
        self.setup: Setup = prepare(self.config)

    def session(self, disk: Disk | None = None) -> int:
        """Once, to whatever end. Returns the exit status, or raises."""
        options = BatchOptions(input=self.input, output=self.run_dir, quiet=True)
        around = Surroundings(disk=disk or OsDisk(), recorder=Writer, executor=InTurn)
        job = Lead(self.setup, options, detect({}), None, Staged(), StopSignals(), around)
        try:
            return job.run()
        finally:
            for worker in job.session.hosted:
                worker.close()

    def cut(self, **options: Any) -> CrashDisk:
        """A session on a disk whose world ends where `options` say; that is found again in the disk."""
        disk = CrashDisk(self.root, **options)
        try:
            self.session(disk)
        except PowerCutError:
            assert disk.dead
        disk.let_go()
        return disk

    def check_between(self) -> None:
        """What holds whenever nobody works on the run: what was acknowledged is there, and `status` tells the truth."""
        record = self.run_dir / "results.jsonl"
        content = record.read_bytes() if record.exists() else b""
        for line in Writer.acknowledged_lines:
            assert content.count(line) == 1, "an acknowledged answer is lost"
        try:
            told = status(self.run_dir)
        except RunDirError:
            assert not Writer.acknowledged_lines
            assert not (self.run_dir / "run.json").exists()
            return
        assert not told.running
        assert told.done >= len(Writer.acknowledged_lines)
        assert told.exit_code == (0 if told.complete else 3)
        if told.complete:
            self.check_whole()

    def check_whole(self) -> None:
        """Each request exactly once, and metrics.h5 says what the record says."""
        lines = [json.loads(line) for line in (self.run_dir / "results.jsonl").read_bytes().splitlines()]
        assert Counter(line["custom_id"] for line in lines) == Counter(f"r{k}" for k in range(REQUESTS))
        with h5py.File(self.run_dir / "metrics.h5", "r") as file:
            rows, attributes = file["requests"][:], dict(file.attrs)
        assert rows["index"].tolist() == [line["llmpi"]["index"] for line in lines]
        for name in ("prompt_tokens", "output_tokens"):
            assert rows[name].sum() == sum(line["llmpi"][name] for line in lines)
        assert "sums_differ" not in attributes

    def finish(self) -> None:
        """The same command again on a disk that is right: it does what is left, once."""
        assert self.session() == 0
        self.check_between()
        told = status(self.run_dir)
        assert (told.complete, told.done, told.torn_bytes) == (True, REQUESTS, 0)
        self.check_whole()


@pytest.fixture(autouse=True)
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "acknowledged_lines", [])
    # Hundreds of sessions: what takes long in each and is nothing to these tests is left out.
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 16)
    monkeypatch.setattr(serve, "calm_collector", contextlib.nullcontext)
    told = cache(versions.package_versions)
    for module in (setup, lead):
        monkeypatch.setattr(module, "package_versions", told)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def fresh(job: Job) -> None:
    """As if nothing had ever been there."""
    shutil.rmtree(job.run_dir, ignore_errors=True)
    Writer.acknowledged_lines.clear()


def test_an_undisturbed_run_reaches_every_kind_of_operation(job: Job) -> None:
    disk = job.cut()
    job.check_whole()
    kinds = {call.split()[0] for call in disk.calls}
    assert kinds >= {"open", "write", "sync", "truncate", "rename", "sync_dir", "remove", "lock", "make_dirs", "fill"}
    changed = {Path(call.split()[1]).name for call in disk.calls}
    assert changed >= {"results.jsonl", "results.synced", "lock", ".run.json.tmp", "session-0000.seg"}


def everywhere(job: Job) -> list[tuple[int, bool]]:
    """Every place at which the world can end: before an operation, and in the middle of it where that tells.

    Half a file that is renamed only when it is whole tells nothing.
    """
    fresh(job)
    calls = job.cut().calls
    places = [(place, False) for place in range(len(calls))]
    places += [(place, True) for place, call in enumerate(calls) if call.startswith("write") and ".tmp" not in call]
    return sorted(places)


def test_wherever_the_world_ends_the_run_resumes_with_each_request_exactly_once(job: Job) -> None:
    seen: set[int] = set()
    for place, half in everywhere(job):
        fresh(job)
        disk = job.cut(cut_at=place, half=half)
        assert disk.dead
        acknowledged = list(Writer.acknowledged_lines)
        for model in MODELS:
            Writer.acknowledged_lines[:] = acknowledged
            disk.survive(model, seed=place)
            job.check_between()
            if (left := fingerprint(job)) not in seen:
                job.finish()
                seen.add(left)
    assert len(seen) > 50


def fingerprint(job: Job) -> int:
    """Of all names and contents. What differs between two runs that end alike is times."""
    files = [path for path in sorted(job.root.rglob("*")) if path.is_file()]
    times = re.compile(rb'"[a-z0-9]+_(s|at)":\s*[^,}]+|"since": [^,]+|"created":\s*\d+|"crc32":"[0-9a-f]*')
    return hash(tuple((str(path), times.sub(b"", path.read_bytes())) for path in files if path.suffix != ".h5"))


@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_is_ended_again_and_again_is_done_at_last(job: Job, model: Model) -> None:
    for seed in range(4):
        dice = random.Random(seed)
        fresh(job)
        for _ in range(100):
            disk = job.cut(cut_at=dice.randrange(90), half=dice.random() < 0.5)
            if not disk.dead:
                break
            disk.survive(model, seed=dice.randrange(1 << 30))
            job.check_between()
        job.finish()


def test_a_world_that_ends_while_intervals_are_written_loses_none_that_was(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TICK_S", 0.0)
    monkeypatch.setattr(intervals, "GATHER_S", 0.0)
    fresh(job)
    calls = job.cut().calls
    written = [place for place, call in enumerate(calls) if "metrics.d" in call]
    assert sum("rename" in calls[place] for place in written) >= 3
    for place in written:
        fresh(job)
        disk = job.cut(cut_at=place, half=True)
        renames = [k for k, call in enumerate(disk.calls) if call.startswith("rename run/metrics.d")]
        durable = bool(renames) and any("sync_dir run/metrics.d" in call for call in disk.calls[renames[0] : place])
        acknowledged = list(Writer.acknowledged_lines)
        for model in MODELS:
            Writer.acknowledged_lines[:] = acknowledged
            disk.survive(model, seed=place)
            job.check_between()
            found = latest(job.run_dir / "metrics.d", ("ranks",)).arrays["ranks"]
            if durable:
                assert [len(ranks) for ranks in found] == [1]
            if place % 5 == 0:
                job.finish()


def test_a_disk_that_fails_ends_the_job_with_status_3_and_one_line(job: Job) -> None:
    dice = random.Random(1)
    for place, half in everywhere(job):
        fresh(job)
        number = dice.choice(NUMBERS)
        disk = CrashDisk(job.root, fail_at=place, number=number, for_good=dice.random() < 0.5, half=half)
        check_refusal(job, disk, number)
        disk.let_go()
        job.check_between()
        if dice.random() < 0.4:
            job.finish()


def check_refusal(job: Job, disk: CrashDisk, number: int) -> None:
    """It ends as it should, or does not care: what only tidies up may fail."""
    code, said = EXIT_OK, ""
    try:
        code = job.session(disk)
    except LlmpiError as error:
        code, said = error.exit_code, str(error)
    if code == EXIT_OK:
        job.check_whole()
        return
    assert code == EXIT_RESUMABLE, said
    assert "\n" not in said
    assert os.strerror(number) in said
    assert "same command again" in said


def test_metrics_made_anew_are_the_same_bytes(job: Job) -> None:
    """After a run that was not disturbed, one that was resumed, and one that was killed and has no end."""
    made = job.run_dir / "metrics.h5"
    for place in (None, 41, 60):
        fresh(job)
        if place is not None:
            job.cut(cut_at=place).survive("killed")
            make_metrics(job.run_dir)
            killed = made.read_bytes()
            make_metrics(job.run_dir)
            assert made.read_bytes() == killed
        assert job.session() == 0
        written = made.read_bytes()
        made.unlink()
        make_metrics(job.run_dir)
        assert made.read_bytes() == written
        job.check_whole()
