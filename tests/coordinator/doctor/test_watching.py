"""A start of MPI that does not end is ended from outside; one that ends is left alone."""

from __future__ import annotations

import signal

import pytest

from tests.launch import Finished, start_alone

pytestmark = [pytest.mark.slow]

# As MPI does, the wait holds Python's lock.
HANGS = """
import ctypes
from coordinator.doctor.watching import watched
with watched(1.0, speaks=SPEAKS):
    ctypes.PyDLL(None).sleep(SECONDS)
print("started", flush=True)
"""


def run(*, speaks: bool, seconds: int) -> Finished:
    code = HANGS.replace("SPEAKS", str(speaks)).replace("SECONDS", str(seconds))
    with start_alone(program=("-c", code)) as job:
        return job.wait(120.0)


@pytest.mark.parametrize("speaks", [True, False])
def test_a_start_that_hangs_is_ended_and_one_rank_says_so(speaks: bool) -> None:
    done = run(speaks=speaks, seconds=100)
    assert done.rc == -signal.SIGKILL
    assert ("llmpi: MPI did not start within 1 s" in done.stderr) == speaks
    assert done.stdout == ""


def test_a_start_that_ends_is_left_alone() -> None:
    done = run(speaks=True, seconds=0)
    assert (done.rc, done.stdout, done.stderr) == (0, "started\n", "")
