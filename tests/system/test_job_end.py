"""Ranks that die or stop as a job ends, under real mpirun; the engines are simulated."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from coordinator.signals import REPEAT_S
from tests.launch import Launcher, run_alone
from tests.system.held_ranks import LEASE, OPEN_MPI, altered, check_resumes, check_whole, collectives, held, words
from tests.system.runs import PATIENCE_S, drain_signal, until, wait_gone

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]


@pytest.mark.parametrize("mpirun", ["openmpi", "mpich"], indirect=True)
def test_a_second_signal_ends_the_job_though_a_rank_is_stopped(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path, *LEASE) as case:
        processes = case.job.processes()
        case.workers()[0].suspend()
        until(lambda: "has been silent for" in case.job.stderr, "that it is taken for lost")
        asking = drain_signal(mpirun)
        case.job.process.send_signal(asking)
        until(lambda: "draining (" in case.job.stderr, "that it drains")
        time.sleep(2 * REPEAT_S)  # what comes sooner is the same request
        case.job.process.send_signal(asking)
        until(lambda: "stopped now" in case.job.stderr, "that it stops now")
        done = case.job.wait(PATIENCE_S)
        wait_gone(processes)
    assert done.rc == 3, done.output
    assert "llmpi: no answer from rank " in done.stderr
    check_resumes(case, undisturbed)


DIE_LEAVING = """
import os, signal
from coordinator import cli
from coordinator.farewell import Farewell
say = Farewell.say
def dying(self, *patience):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return say(self, *patience)
Farewell.say = dying
cli.main()
"""


@OPEN_MPI
def test_when_a_rank_dies_as_the_job_ends_the_others_leave_without_it(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    done, run = altered(mpirun, tmp_path, DIE_LEAVING, ranks=4, ulfm=True)
    assert done.rc == 0, done.output
    check_whole(run, undisturbed)
    assert collectives(run) == "4 ranks"


STOP_IN_MPIS_END = """
import os, signal
from coordinator import cli, mpi
from coordinator.farewell import Farewell
mpi.END_S = mpi.GRACE_S = 3.0
say = Farewell.say
def stopping(*given):
    answer = say(*given)
    while "2" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
        os.kill(os.getpid(), signal.SIGSTOP)
    return answer
Farewell.say = stopping
cli.main()
"""


@pytest.mark.parametrize(
    ("mpirun", "ulfm"), [("openmpi", False), ("openmpi", True), ("mpich", False)], indirect=["mpirun"]
)
def test_a_rank_that_stops_within_mpis_end_holds_nobody_up(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any], ulfm: bool
) -> None:
    _, run = altered(mpirun, tmp_path, STOP_IN_MPIS_END, ranks=4, ulfm=ulfm)
    check_whole(run, undisturbed)


STOP_AT_THE_END = """
import os, signal
from coordinator import cli, ending
from coordinator.farewell import Farewell
def stopping(*given):
    while True:  # launchers let it go on before they end it
        os.kill(os.getpid(), signal.SIGSTOP)
%s = stopping
cli.main()
"""


@pytest.mark.parametrize("mpirun", ["openmpi", "mpich"], indirect=True)
@pytest.mark.parametrize(
    ("where", "said", "status"),
    [
        ("ending.make_metrics", "nothing was heard of rank 0 for", 3),
        ("Farewell.hear", "rank 0 does not leave: ending the job", 0),
    ],
    ids=["in its metrics", "in its goodbye"],
)
def test_when_rank_0_stops_for_ever_at_the_end_nobody_stays(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any], where: str, said: str, status: int
) -> None:
    soon = ("--lease", 10, "--rank0-lease", 5)
    done, run = altered(mpirun, tmp_path, STOP_AT_THE_END % where, ranks=3, more=soon)
    assert done.rc != 0, done.output
    assert said in done.stderr
    assert run_alone("status", run.path).rc == status
    assert run_alone(*words(tmp_path, run, *soon)).rc == 0
    check_whole(run, undisturbed)


STOP_AT_THE_START = """
import os, signal
from coordinator import cli, config, handshake, mpi
from coordinator.farewell import Farewell
config.WELCOME_LEAST_S = mpi.RANK0_S = 5.0
def stopping(*given):
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)
def refusing(*given):
    return ["as the test will have it"]
%s
cli.main()
"""


@pytest.mark.parametrize("mpirun", ["openmpi", "mpich"], indirect=True)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("handshake.Handshake.step = stopping", "nothing was heard of rank 0 for"),
        ("handshake.differences, Farewell.hear = refusing, stopping", "rank 0 does not leave: ending the job"),
    ],
    ids=["before it welcomes anybody", "when it has refused everybody"],
)
def test_when_rank_0_stops_for_ever_at_the_start_nobody_stays(
    mpirun: Launcher, tmp_path: Path, what: str, said: str
) -> None:
    done, _ = altered(mpirun, tmp_path, STOP_AT_THE_START % what, ranks=3, more=("--rank0-lease", 5))
    assert done.rc != 0, done.output
    assert said in done.stderr


STOP_BEFORE_MPI = """
import os, signal
from coordinator import watch
watch.START_S = watch.GRACE_S = 5.0
while %r in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    os.kill(os.getpid(), signal.SIGSTOP)
from coordinator import cli
cli.main()
"""


@pytest.mark.parametrize("rank", ["0", "2"])
@pytest.mark.parametrize(
    ("mpirun", "ulfm"), [("openmpi", False), ("openmpi", True), ("mpich", False)], indirect=["mpirun"]
)
def test_a_rank_that_does_not_come_to_mpis_start_is_not_waited_for(
    mpirun: Launcher, tmp_path: Path, rank: str, ulfm: bool
) -> None:
    done, _ = altered(mpirun, tmp_path, STOP_BEFORE_MPI % rank, ranks=3, ulfm=ulfm)
    assert done.rc != 0, done.output
    assert done.stderr.count("llmpi: not all ranks came to MPI's start within ") == 1


STOP_WHEN_CALLED_TOGETHER = """
import os, signal, time
from coordinator import cli, ending
from workers.worker import Worker
make_metrics, on_collect = ending.make_metrics, Worker.on_collect
def slowly(*given):
    time.sleep(10.0)
    return make_metrics(*given)
def stopping(*given):
    while os.environ["OMPI_COMM_WORLD_RANK"] == "2":
        os.kill(os.getpid(), signal.SIGSTOP)
    return on_collect(*given)
ending.make_metrics, Worker.on_collect = slowly, stopping
cli.main()
"""


@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_metrics_are_made_for_as_long_as_it_takes_though_not_all_ranks_came(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    """Rank 1 waits without having entered a collective, for longer than rank 0 may be silent while it is driven."""
    soon = ("--lease", 5, "--rank0-lease", 5)
    done, run = altered(mpirun, tmp_path, STOP_WHEN_CALLED_TOGETHER, ranks=3, more=soon)
    assert "nothing was heard of rank 0" not in done.stderr
    assert "no answer from rank 2" in done.stderr
    check_whole(run, undisturbed)
