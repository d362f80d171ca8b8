"""The tests' own launcher: what it starts ends, at the latest at the timeout, with everything below it."""

from __future__ import annotations

import re

import pytest

from tests.launch import Launcher, alive

pytestmark = [pytest.mark.system, pytest.mark.mpi, pytest.mark.slow]

SAY_RANK = "from mpi4py import MPI; print('rank', MPI.COMM_WORLD.rank, 'of', MPI.COMM_WORLD.size)"
# Each rank starts a child, says so and waits for ever.
WAIT_FOR_EVER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("child", child.pid, flush=True)
child.wait()
"""


def test_more_ranks_than_cores_start_and_their_output_returns(mpirun: Launcher) -> None:
    done = mpirun(3, program=("-c", SAY_RANK), timeout_s=60)
    assert done.rc == 0, done.output
    # MPI's own libraries may have something to say on stdout too.
    ranks = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert ranks == [f"rank {rank} of 3" for rank in range(3)]


def test_a_rank_that_fails_gives_its_exit_status(mpirun: Launcher) -> None:
    assert mpirun(1, program=("-c", "raise SystemExit(3)"), timeout_s=60).rc == 3


def test_timeout_shows_the_output_and_leaves_no_process(mpirun: Launcher) -> None:
    with pytest.raises(AssertionError, match="no end within 5 s") as failure:
        mpirun(2, program=("-c", WAIT_FOR_EVER), timeout_s=5)
    children = [int(pid) for pid in re.findall(r"^child (\d+)$", str(failure.value), re.MULTILINE)]
    assert len(children) == 2
    assert not any(alive(pid) for pid in children)
