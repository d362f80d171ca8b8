"""What ends a launcher that does not end by itself: here a shell that is called like one and waits for ever."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from coordinator.launcher_end import is_sibling, launchers
from tests.launch import ROOT

pytestmark = pytest.mark.slow

GUARD = (
    "from coordinator.launcher_end import guard_launcher; guard_launcher(0.0, {term_s}); print('guarded', flush=True)"
)


@contextmanager
def launched(folder: Path, name: str, python: str, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A program of this name that runs some Python, waits for it, and then for ever."""
    launcher = folder / name
    shutil.copy("/bin/sh", launcher)
    script = f'{before}\n"$0" -c "$1"\nwhile :; do read -r line || exec sleep 600; done'
    process = subprocess.Popen(
        [launcher, "-c", script, sys.executable, python], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("before", "signal"), [("", -15), ("trap '' TERM", -9)])
def test_a_launcher_that_does_not_end_is_ended(tmp_path: Path, before: str, signal: int) -> None:
    with launched(tmp_path, "mpirun", GUARD.format(term_s=0.2), before) as process:
        assert process.wait(60) == signal


@pytest.mark.parametrize("also", ["", "trap '' TERM;"])
def test_a_rank_that_is_stopped_goes_with_its_launcher_and_no_other_process_does(tmp_path: Path, also: str) -> None:
    before = f"{also} sleep 600 & kill -STOP $!; echo $!; sleep 600 & echo $!"
    with launched(tmp_path, "mpirun", GUARD.format(term_s=0.2), before) as process:
        assert process.stdout is not None
        stopped, busy = (psutil.Process(int(process.stdout.readline())) for _ in range(2))
        try:
            assert process.wait(60) < 0
            give_up_at = time.monotonic() + 30
            while alive(stopped) and time.monotonic() < give_up_at:
                time.sleep(0.05)
            assert not alive(stopped)
            assert alive(busy), "MPI ends those that run"
        finally:
            for child in (stopped, busy):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def alive(process: psutil.Process) -> bool:
    """Also nobody's dead child is there for a while."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_what_is_no_launcher_is_left_alone(tmp_path: Path) -> None:
    with launched(tmp_path, "bash", "from coordinator.launcher_end import launchers; print(launchers())") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[]\n"
    assert launchers() == []


def test_ranks_of_one_host_have_one_parent_and_others_have_not() -> None:
    child = subprocess.Popen(["sleep", "600"])
    try:
        assert not is_sibling(child.pid)
        assert not is_sibling(os.getpid())
        assert not is_sibling(2**22 + 1)
        asked = f"from coordinator.launcher_end import is_sibling; print(is_sibling({child.pid}))"
        done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"
    finally:
        child.kill()
        child.wait()
