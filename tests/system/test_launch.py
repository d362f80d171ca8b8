"""The tests' own launcher: what it starts ends, at the latest at the timeout, with everything below it."""

from __future__ import annotations

import re

import pytest

from tests.launch import Launcher, alive
from tests.system.runs import until

pytestmark = [pytest.mark.system, pytest.mark.mpi, pytest.mark.slow]

# What a rank writes in several pieces, as print() does without a buffer, other ranks' pieces can come between.
SAY = """
import os
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
SAY_RANK = SAY + "from mpi4py import MPI; say('rank', MPI.COMM_WORLD.rank, 'of', MPI.COMM_WORLD.size)"
# Each rank starts a child, says so and waits for ever.
WAIT_FOR_EVER = (
    SAY
    + """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
say("child", child.pid)
child.wait()
"""
)


def test_more_ranks_than_cores_start_and_their_output_returns(mpirun: Launcher) -> None:
    done = mpirun(3, program=("-c", SAY_RANK))
    assert done.rc == 0, done.output
    # MPI's own libraries may have something to say on stdout too.
    ranks = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert ranks == [f"rank {rank} of 3" for rank in range(3)]


def test_a_rank_that_fails_gives_its_exit_status(mpirun: Launcher) -> None:
    assert mpirun(1, program=("-c", "raise SystemExit(3)")).rc == 3


def test_timeout_shows_the_output_and_leaves_no_process(mpirun: Launcher) -> None:
    def children(output: str) -> list[int]:
        return [int(pid) for pid in re.findall(r"^child (\d+)\n", output, re.MULTILINE)]

    with mpirun.start(2, program=("-c", WAIT_FOR_EVER)) as job:
        until(lambda: len(children(job.stdout)) == 2 or job.process.poll() is not None, "both ranks' children")
        with pytest.raises(AssertionError, match=r"no end within 0\.5 s") as failure:
            job.wait(0.5)
        started = children(str(failure.value))
        assert len(started) == 2
        assert not any(alive(pid) for pid in started)
