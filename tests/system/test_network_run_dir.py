"""Run directories and the model store on a real network file system, which two hosts have mounted each for itself.

sshfs knows the locks of its own mount alone, and goes by sizes that it has seen up to 20 s before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduling.errors import RunDirError
from storage.files import OsDisk
from storage.joblock import Holder, JobLock, Judge, beat_path, holder_of, rewrite
from storage.recovery import recover
from tests import network_mounts
from tests.launch import ROOT, Argument, run_alone, start_alone
from tests.network_mounts import NetworkMount, network_mount
from tests.storage.samples import ok_line
from tests.system.runs import PATIENCE_S, Gate, Run, check_one_clear_line, prompts, until, wait_gone, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

REQUESTS = 60
IDS = [f"r{k}" for k in range(REQUESTS)]
OTHER_HOST = ("unshare", "-u", "sh", "-c", 'hostname other-host; exec "$@"', "sh", sys.executable, "-m", "llmpi")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[NetworkMount]:
    network_mounts.require()
    with network_mount(tmp_path / "server", tmp_path / "here") as mount:
        yield mount


@pytest.fixture
def there(here: NetworkMount, tmp_path: Path) -> Iterator[NetworkMount]:
    """Another host's mount of the same folder."""
    with network_mount(here.folder, tmp_path / "there") as mount:
        yield mount


def words(folder: Path, run: Path) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(folder / "in.jsonl", lines)
    simulated = ("--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", "0.0")
    return ("batch", "-m", "any", *simulated, "-i", given, "-o", run, "-q")


def on_other_host(*arguments: Argument) -> subprocess.CompletedProcess[str]:
    command = [*OTHER_HOST, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def until_recorded(run: Run) -> None:
    until(lambda: run.lines_so_far() > 0, "answers in the record")


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_mount_that_goes_ends_the_job_in_order_and_what_was_acknowledged_is_there_when_it_is_back(
    here: NetworkMount, tmp_path: Path, how: str
) -> None:
    gate, job = Gate.closed(tmp_path / "gate"), words(tmp_path, here.point / "run")
    served = Run(here.folder / "run")
    with start_alone(*job, env=gate.env) as started:
        until_recorded(served)
        getattr(here, how)()
        gate.open()
        said = check_one_clear_line(started.wait(PATIENCE_S), 3, "same command again")
    # What is being written at that moment is aborted or an input/output error; whatever comes later is not connected.
    assert re.search("not connected|connection abort|input/output error", said, re.IGNORECASE), said
    before = served.by_id()
    if how == "kill":
        check_one_clear_line(run_alone(*job), 3, "not connected", "same command again")
    subprocess.run(["umount", "--lazy", str(here.point)], check=False, capture_output=True)
    with network_mount(here.folder, here.point):
        done = run_alone(*job)
        assert done.rc == 0, done.output
        run = Run(here.point / "run")
        run.check_whole(IDS)
        assert all(run.by_id()[name] == line for name, line in before.items())


def test_two_hosts_have_one_run_directory_and_only_one_works_in_it(
    here: NetworkMount, there: NetworkMount, tmp_path: Path
) -> None:
    gate, run = Gate.closed(tmp_path / "gate"), Run(here.point / "run")
    with start_alone(*words(tmp_path, run.path), env=gate.env) as started:
        until_recorded(run)
        os.listdir(there.point / "run")
        for refused in (
            run_alone(*words(tmp_path, run.path)).stderr,
            on_other_host(*words(tmp_path, there.point / "run")).stderr,
        ):
            assert f"in use by process {started.process.pid} on" in refused
        status = on_other_host("status", there.point / "run", "--json")
        told = json.loads(status.stdout)
        assert (told["running"], told["done"]) == (True, len(run.record()))
        processes = started.processes()
        os.killpg(started.process.pid, signal.SIGKILL)
        wait_gone(processes)
    before = run.by_id()
    done = on_other_host(*words(tmp_path, there.point / "run"))
    assert done.returncode == 0, done.stderr
    assert "ended without stopping in order" in done.stderr
    served = Run(here.folder / "run")
    served.check_whole(IDS)
    assert all(served.by_id()[name] == line for name, line in before.items())
    report = run_alone("report", run.path, "--json")
    assert json.loads(report.stdout)["requests"] == REQUESTS, report.output


def test_what_another_host_wrote_since_this_one_looked_counts(here: NetworkMount, there: NetworkMount) -> None:
    """A lock that was free, and a record that was shorter, when this host looked last."""
    disk, beats = OsDisk(), itertools.count(1)
    lock, record = Path("run") / "lock", Path("run") / "results.jsonl"

    def time_goes_by(seconds: float) -> None:
        rewrite(disk, beat_path(here.point / lock), b"%09d" % next(beats))

    judge = Judge(is_alive=lambda holder: True, pause=time_goes_by)
    (here.point / "run").mkdir()
    rewrite(disk, here.point / lock, b"")
    (here.point / record).write_bytes(ok_line(0))
    os.listdir(there.point / "run")
    assert (there.point / lock).read_bytes() == b""
    assert (there.point / record).read_bytes() == ok_line(0)

    held = JobLock(disk, here.point / lock, Holder("a", 1, "now"), judge)
    (here.point / record).write_bytes(ok_line(0) + ok_line(1))
    assert (there.point / lock).read_bytes() == b"", "this file system remembers nothing: the test shows nothing"
    assert holder_of(disk, there.point / lock, judge) == (True, Holder("a", 1, "now"))
    with pytest.raises(RunDirError, match="in use by process 1 on a"):
        JobLock(disk, there.point / lock, Holder("b", 2, "now"), judge)
    assert recover(disk, there.point / record).done == 2
    assert (here.folder / record).read_bytes() == ok_line(0) + ok_line(1), "nothing was cut off"
    held.release()


def test_two_hosts_that_add_one_model_to_the_store_at_once_both_succeed(
    here: NetworkMount, there: NetworkMount, tiny_model: Path
) -> None:
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    adding = [
        subprocess.Popen(
            [*OTHER_HOST, "models", "add", str(tiny_model), "--name", "tiny"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**env, "LLMPI_HOME": str(mount.point)},
        )
        for mount in (here, there)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in adding]
    assert [process.returncode for process in adding] == [0, 0], said
    blobs = here.folder / "models" / "blobs"
    assert [path.name for path in blobs.iterdir()] == [f"sha256-{digest}"]
    assert list((here.folder / "models" / "partial").iterdir()) == []
    for mount in (here, there):
        done = run_alone("models", "verify", "tiny", env={"LLMPI_HOME": str(mount.point)})
        assert done.rc == 0, done.output
