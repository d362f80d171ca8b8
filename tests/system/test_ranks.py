"""Ranks and hosts that die, stop or cannot be reached, under real mpirun; the engines are simulated (`held_ranks`)."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import Argument, Launcher
from tests.system.held_ranks import (
    LEASE,
    OPEN_MPI,
    Held,
    altered,
    check_resumes,
    check_whole,
    collectives,
    held,
)
from tests.system.runs import (
    PATIENCE_S,
    check_ranks_add_up,
    until,
    wait_gone,
)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]


# ---------------------------------------------------------------- killed


@OPEN_MPI
def test_with_fault_tolerance_the_others_do_the_work_of_a_killed_rank(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path, ranks=4, ulfm=True) as case:
        case.workers()[0].kill()
        done = case.end()
    assert done.rc == 0, done.output
    assert "its process has died; its work goes to the others" in done.stderr
    assert "metrics: 3 of 4 ranks took part" in done.stdout
    check_whole(case.run, undisturbed)
    assert collectives(case.run) == "3 of 4 ranks"
    assert case.run.about()["sessions"][-1]["fault_tolerant"] is True
    assert {line["llmpi"]["attempt"] for line in case.run.record()} == {1, 2}
    check_ranks_add_up(case.run)
    assert case.run.metrics()["ranks"]["rank"].tolist() == [1, 2, 3]


def test_without_it_the_launcher_ends_the_job_which_can_be_resumed(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path) as case:
        processes = case.job.processes()
        case.workers()[0].kill()
        done = case.end()
        wait_gone(processes)
    assert done.rc == {"openmpi": 137, "mpich": 9}[mpirun.kind], done.output
    assert case.run.about()["sessions"][-1]["fault_tolerant"] is False
    check_resumes(case, undisturbed)


DIE_WITHIN = """
import os, signal, sys
from coordinator import cli
from coordinator.mpi_collectives import Collectives
gather = Collectives.gather_rows
def dying(self, rows, take):
    if self.rank == 2 and self.size == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    gather(self, rows, take)
Collectives.gather_rows = dying
cli.main()
"""


@OPEN_MPI
def test_when_a_rank_dies_within_a_collective_the_others_gather_among_themselves(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    done, run = altered(mpirun, tmp_path, DIE_WITHIN, ranks=4, ulfm=True)
    assert done.rc == 0, done.output
    check_whole(run, undisturbed)
    assert collectives(run) == "3 of 4 ranks"
    assert "sums_differ" not in run.about()["sessions"][-1]
    check_ranks_add_up(run)


# ---------------------------------------------------------------- leaders


def ranked(case: Held) -> dict[int, psutil.Process]:
    """The ranks whose engines stand at the gate, once all do."""
    until(lambda: len(case.gate.held()) == 4, "four engines at work")
    return {int(rank.environ()["OMPI_COMM_WORLD_RANK"]): rank for rank in case.workers()}


@OPEN_MPI
def test_when_a_leader_is_killed_its_member_goes_on_and_keeps_what_it_had(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path, "--fanout", 2, ranks=5, ulfm=True) as case:
        ranked(case)[1].kill()
        done = case.end()
    assert done.rc == 0, done.output
    assert "2 leaders carry messages between rank 0 and 4 workers" in done.stderr
    check_whole(case.run, undisturbed)
    assert done.stderr.count("its work goes to the others") == 1, "that of the leader alone"
    assert collectives(case.run) == "4 of 5 ranks"
    check_ranks_add_up(case.run)


@OPEN_MPI
def test_a_leader_that_stops_for_ever_holds_none_of_its_group_up(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path, "--fanout", 2, *LEASE, ranks=5, ulfm=True) as case:
        ranked(case)[3].suspend()
        done = case.end()
    assert done.rc == 0, done.output
    assert done.stderr.count("has been silent for") == 1, "the stopped one alone"
    check_whole(case.run, undisturbed)
    assert collectives(case.run) == "4 of 5 ranks"


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    ("mpirun", "ulfm"), [("openmpi", False), ("openmpi", True), ("mpich", False)], indirect=["mpirun"]
)
def test_a_rank_that_stops_for_ever_holds_nobody_up(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any], ulfm: bool
) -> None:
    with held(mpirun, tmp_path, *LEASE, ranks=4, ulfm=ulfm) as case:
        stopped = case.workers()[0]
        processes = case.job.processes()
        stopped.suspend()
        done = case.end()
        wait_gone(processes)
    assert done.rc == 0, done.output
    assert "has been silent for" in done.stderr
    check_whole(case.run, undisturbed)
    assert collectives(case.run).startswith("3 of 4 ranks" if ulfm else "none for the last session")
    check_ranks_add_up(case.run)


@OPEN_MPI
def test_a_rank_that_goes_on_after_its_lease_takes_work_again(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    with held(mpirun, tmp_path, *LEASE) as case:
        first, second = until(lambda: len(found := case.workers()) == 2 and found, "both ranks at work")
        first.suspend()
        until(lambda: "has been silent for" in case.job.stderr, "that it is taken for lost")
        second.suspend()  # so that work is left when the first one takes it again
        first.resume()
        case.gate.open()
        until(lambda: "takes work again" in case.job.stderr, "the return of the first")
        second.resume()
        done = case.end()
    assert done.rc == 0, done.output
    check_whole(case.run, undisturbed)
    assert collectives(case.run) == "3 ranks"
    session, metrics = case.run.about()["sessions"][-1], case.run.metrics()
    assert "sums_differ" not in session
    # What a rank answered for an attempt that was no longer its own is in its own books alone.
    assert session["late_answers_dropped"] > 0
    assert int(metrics["ranks"]["requests"].sum()) == len(metrics["requests"]) + session["late_answers_dropped"]


# ---------------------------------------------------------------- rank 0


@OPEN_MPI
@pytest.mark.parametrize(
    ("how", "ulfm", "more", "said"),
    [
        (signal.SIGKILL, True, (), "rank 0 has died: its engine has ended, and it leaves"),
        (signal.SIGSTOP, False, ("--rank0-lease", 5), "nothing was heard of rank 0 for"),
    ],
    ids=["killed", "stopped"],
)
def test_when_rank_0_is_killed_or_stops_for_too_long_nobody_stays_and_the_run_can_be_resumed(
    mpirun: Launcher,
    tmp_path: Path,
    undisturbed: Mapping[str, Any],
    how: signal.Signals,
    ulfm: bool,
    more: tuple[Argument, ...],
    said: str,
) -> None:
    with held(mpirun, tmp_path, *more, ranks=4, ulfm=ulfm) as case:
        case.workers()
        processes = case.job.processes()
        case.rank0().send_signal(how)
        done = case.job.wait(PATIENCE_S)
        wait_gone(processes)
    assert done.rc == 4, done.output
    assert said in done.stderr
    check_resumes(case, undisturbed)


# ---------------------------------------------------------------- an error of its own, and what is too much


FAIL_ONCE = """
from coordinator import cli
from workers.worker import Worker
on_welcome = Worker.on_welcome
def failing(self, message):
    on_welcome(self, message)
    if self._options.rank == 1:
        raise KeyError("a bug of a test")
Worker.on_welcome = failing
cli.main()
"""


@OPEN_MPI
def test_an_exception_in_a_worker_is_told_by_rank_0_and_costs_that_worker_alone(
    mpirun: Launcher, tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    # As people start MPI programs of their own: this runner ends the job at an exception that nobody catches.
    done, run = altered(mpirun, tmp_path, FAIL_ONCE, ranks=3, runner=["-m", "mpi4py"])
    assert done.rc == 0, done.output
    assert "rank 1 on " in done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "KeyError: 'a bug of a test'" in done.stderr
    assert "MPI_ABORT" not in done.stderr.upper().replace(" ", "_")
    check_whole(run, undisturbed)
    assert collectives(run) == "3 ranks"


LARGE = """
import hashlib, sys, time
from coordinator.mpi import World
from scheduling.errors import ProtocolError
from scheduling import link
world = World()
endpoint = world.endpoint()
SIZES = [0, 1, 104_857_600, 3, 1 << 16]
def digest(data):
    return hashlib.sha256(data).hexdigest()
def sent(rank, place):
    return bytes([rank, place, 7, 255]) * (SIZES[place] // 4 + 1)
def take(count):
    came = []
    while len(came) < count:
        came += endpoint.receive()
        time.sleep(1e-3)
    return came
other = 1 - world.rank
for place, size in enumerate(SIZES):
    endpoint.post(other, sent(world.rank, place)[:size])
came = take(len(SIZES))
assert [source for source, _ in came] == [other] * len(SIZES)
assert [digest(data) for _, data in came] == [digest(sent(other, k)[:size]) for k, size in enumerate(SIZES)]
while endpoint.unsent_bytes():
    time.sleep(1e-3)
if world.rank:
    endpoint.post(0, bytes(2_000))
    time.sleep(600)
else:
    import coordinator.mpi_endpoint as limited
    limited.ENVELOPE_BYTES_MAX = 1_000
    try:
        take(1)
    except ProtocolError as error:
        print("refused:", error)
world.abort(0)
"""


def test_envelopes_of_any_size_arrive_whole_and_in_order_and_none_over_the_limit(
    mpirun: Launcher, tmp_path: Path
) -> None:
    program = tmp_path / "large.py"
    program.write_text(LARGE)
    done = mpirun(2, program=[program], timeout_s=PATIENCE_S)
    assert "refused: rank 1 sent an envelope of 2000 bytes: the limit is 1000" in done.stdout, done.output
