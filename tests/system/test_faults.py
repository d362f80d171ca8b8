"""Real processes that are killed at any moment, and a real disk that is full."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest

from storage.segments import read_segments
from tests.launch import ROOT, Argument, Finished, Launcher, run_alone, start_alone
from tests.system.runs import Run, check_one_clear_line, prompts, until, wait_gone, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

ONE_MPI = pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
"""What these tests are about is above MPI, and each job takes seconds."""
REQUESTS = 400
IDS = [f"r{k}" for k in range(REQUESTS)]


def words(folder: Path, run: Run, time_scale: str, *more: Argument) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(folder / "in.jsonl", lines)
    simulated = ("--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", time_scale)
    return ("batch", "-m", "any", *simulated, "-i", given, "-o", run.path, "-q", *more)


def answers(run: Run) -> dict[str, Any]:
    return {name: line["response"]["body"]["choices"] for name, line in run.by_id().items()}


@dataclass(frozen=True)
class Timed(Run):
    """A run, and how long it took, so that moments within another one can be chosen on any machine."""

    took_s: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Timed:
    began = time.monotonic()
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder / "run")
    done = run_alone(*words(folder, run, "0.0"))
    assert done.rc == 0, done.output
    return Timed(run.path, time.monotonic() - began)


def killed_once(job: tuple[Argument, ...], after_s: float) -> bool:
    """Start it and kill everything with SIGKILL so much later. False if it came to its end before."""
    with start_alone(*job) as started:
        try:
            started.process.wait(after_s)
        except subprocess.TimeoutExpired:
            processes = started.processes()
            os.killpg(started.process.pid, signal.SIGKILL)
            wait_gone(processes)
            return True
        assert started.wait(1).rc == 0, started.stderr
        return False


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_again_and_again_at_any_moment_it_ends_like_an_undisturbed_run(
    tmp_path: Path, undisturbed: Timed, seed: int
) -> None:
    dice, run = random.Random(seed), Run(tmp_path / "run")
    job = words(tmp_path, run, "0.02", "--metrics-interval", "0.2", "--commit-interval", "0.005")
    before: dict[str, Any] = {}
    for _ in range(seed):
        ended = not killed_once(job, undisturbed.took_s * dice.uniform(0.4, 1.4))
        lines = run.by_id()
        assert all(lines[name] == line for name, line in before.items()), "a recorded answer is gone or another"
        before = lines
        if ended:
            break
    done = run_alone(*job)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert all(run.by_id()[name] == line for name, line in before.items())
    assert answers(run) == answers(undisturbed)


@pytest.mark.mpi
@ONE_MPI
def test_a_killed_job_has_every_ranks_counters_and_telemetry_up_to_its_last_interval(
    mpirun: Launcher, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    job = words(tmp_path, run, "3.0", "--metrics-interval", "0.5")
    segments = run.path / "metrics.d"

    def told(kind: str) -> set[int]:
        """Of which ranks the intervals on disk tell."""
        return {int(rank) for segment in read_segments(segments, kind) for rank in segment.array["rank"]}

    with mpirun.start(3, *job) as started:
        until(lambda: told("ranks") == told("telemetry") == {1, 2}, "an interval of both ranks on disk")
        until(lambda: run.lines_so_far() > 0, "answers in the record")
        processes = started.processes()
        os.killpg(started.process.pid, signal.SIGKILL)
        wait_gone(processes)
    assert not (run.path / "metrics.h5").exists()
    report = run_alone("report", run.path, "--json")
    assert report.rc == 0, report.output
    assert sorted(rank["rank"] for rank in json.loads(report.stdout)["ranks"]) == [1, 2]
    first = (run.path / "metrics.h5").read_bytes()
    assert run_alone("report", run.path, "--rebuild", "--json").rc == 0
    assert (run.path / "metrics.h5").read_bytes() == first
    with h5py.File(run.path / "metrics.h5", "r") as file:
        assert set(file["telemetry"]["rank"]) == {1, 2}
        assert len(file["requests"]) == len(run.record())
        assert min(file["ranks"]["wall_s"]) > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of which a file leaves little; where none may be mounted, the test has no disk to fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs; with a limit on file sizes the same is tested everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def check_full(stopped: Finished, run: Run, *said: str) -> None:
    check_one_clear_line(stopped, 3, "same command again", *said)
    status = run_alone("status", run.path, "--json")
    assert status.rc == 3, status.output
    assert json.loads(status.stdout)["done"] == len(run.by_id())


@pytest.mark.mpi
@ONE_MPI
def test_a_full_disk_ends_the_job_in_order_and_it_goes_on_when_there_is_space(
    mpirun: Launcher, small_disk: Path, tmp_path: Path, undisturbed: Timed
) -> None:
    run = Run(small_disk / "run")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(820_000))
    job = words(tmp_path, run, "0.0")
    check_full(mpirun(3, *job), run, "No space left on device")
    ballast.unlink()
    done = run_alone(*job)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert answers(run) == answers(undisturbed)


def test_files_that_may_not_grow_end_the_job_in_order(tmp_path: Path, undisturbed: Timed) -> None:
    run = Run(tmp_path / "run")
    job = words(tmp_path, run, "0.0")
    # The limit is taken over by what is started; every file of a job that is left to itself grows beyond it.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        stopped = run_alone(*job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_full(stopped, run, "File too large")
    done = run_alone(*job)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert answers(run) == answers(undisturbed)


FAILING_SYNC = """
import errno, os
sync, calls = os.fsync, []
def fails(fd):
    if "results.jsonl" in os.readlink(f"/proc/self/fd/{fd}"):
        calls.append(fd)
        if len(calls) > WHOLE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    sync(fd)
os.fsync = fails
"""


def test_a_sync_that_fails_is_the_last_and_only_what_was_synced_before_is_acknowledged(
    tmp_path: Path, undisturbed: Timed
) -> None:
    run, whole = Run(tmp_path / "run"), 3
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "sitecustomize.py").write_text(f"WHOLE = {whole}\n{FAILING_SYNC}")
    job = words(tmp_path, run, "0.0", "--commit-interval", "0.005")
    path = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "failing"), str(ROOT)))}
    check_full(run_alone(*job, env=path), run, "Input/output error")
    synced = int((run.path / "results.synced").read_text())
    assert (run.path / "results.jsonl").stat().st_size == synced, "what was not synced is cut off"
    assert 0 < len(run.by_id()) < REQUESTS
    before = run.by_id()
    done = run_alone(*job)
    assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert all(run.by_id()[name] == line for name, line in before.items())
    assert answers(run) == answers(undisturbed)
