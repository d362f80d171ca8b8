"""Ranks and hosts that die, stop or cannot be reached, under real mpirun; the engines are simulated.

Engines stand at a gate until what is to happen has happened, so that it meets work whatever the machine is like.
Whatever happens, the answers are those of an undisturbed run.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.signals import REPEAT_S
from tests.launch import Argument, Finished, Job, Launcher, run_alone
from tests.system.runs import (
    PATIENCE_S,
    Gate,
    Run,
    check_ranks_add_up,
    drain_signal,
    engines_of,
    prompts,
    ranks_of,
    until,
    wait_gone,
    write_lines,
)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 120
IDS = [f"r{k}" for k in range(REQUESTS)]
ULFM = ("--with-ft", "ulfm")
LEASE = ("--lease", 3)
OPEN_MPI = pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)


def words(folder: Path, run: Run, *more: Argument) -> tuple[Argument, ...]:
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(folder / "in.jsonl", lines)
    simulated = ("--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", "0.0")
    # Without copies what a rank that stops has is done by others only when it is lost.
    return ("batch", "-m", "any", *simulated, "-i", given, "-o", run.path, "--no-copies", *more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder / "run")
    done = run_alone(*words(folder, run))
    assert done.rc == 0, done.output
    return answers(run)


def answers(run: Run) -> dict[str, Any]:
    return {name: line["response"]["body"]["choices"] for name, line in run.by_id().items()}


@dataclass(frozen=True)
class Held:
    """A job whose engines stand at the gate with requests that run."""

    run: Run
    job: Job
    gate: Gate
    command: tuple[Argument, ...]

    def workers(self) -> list[psutil.Process]:
        """Ranks whose engines stand at the gate."""
        found: list[psutil.Process] = until(
            lambda: [engine.parent() for engine in self.gate.held()], "an engine with requests that run"
        )
        return found

    def rank0(self) -> psutil.Process:
        """The rank without an engine."""
        parents = until(lambda: {engine.ppid() for engine in engines_of(self.job)}, "engines")
        [found] = [rank for rank in ranks_of(self.job) if rank.pid not in parents]
        return found

    def end(self) -> Finished:
        self.gate.open()
        return self.job.wait(PATIENCE_S)


@contextmanager
def held(mpirun: Launcher, folder: Path, *more: Argument, ranks: int = 3, ulfm: bool = False) -> Iterator[Held]:
    gate, run = Gate.closed(folder / "gate"), Run(folder / "run")
    command = words(folder, run, *more)
    with mpirun.start(ranks, *command, env=gate.env, mpi_options=ULFM if ulfm else ()) as job:
        yield Held(run, job, gate, command)


def altered(
    mpirun: Launcher, folder: Path, program: str, *, ranks: int, runner: Sequence[str] = (), ulfm: bool = False,
    more: tuple[Argument, ...] = (),
) -> tuple[Finished, Run]:  # fmt: skip
    """A job from its start to its end, begun by a `program` that changes something and then calls the command line."""
    path, run = folder / "altered.py", Run(folder / "run")
    path.write_text(program)
    mpi_options = ULFM if ulfm else ()
    given = words(folder, run, *more)
    return mpirun(ranks, *given, program=[*runner, path], mpi_options=mpi_options, timeout_s=PATIENCE_S), run


def check_resumes(case: Held, undisturbed: Mapping[str, Any]) -> None:
    """Not complete, said so by its status; the same command, without a launcher, does the rest."""
    before = case.run.by_id()
    status = run_alone("status", case.run.path, "--json")
    assert status.rc == 3, status.output
    assert json.loads(status.stdout)["done"] == len(before) < REQUESTS
    done = run_alone(*case.command)
    assert done.rc == 0, done.output
    check_whole(case.run, undisturbed)
    assert before.items() <= case.run.by_id().items()


def check_whole(run: Run, undisturbed: Mapping[str, Any]) -> None:
    run.check_whole(IDS)
    assert answers(run) == undisturbed
    assert run_alone("status", run.path).rc == 0


def collectives(run: Run) -> str:
    return str(run.metrics()["attrs"]["collectives"])


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


# ---------------------------------------------------------------- as the job ends


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
    soon = ("--lease", 5, "--rank0-lease", 5)
    done, run = altered(mpirun, tmp_path, STOP_AT_THE_END % where, ranks=3, more=soon)
    assert done.rc != 0, done.output
    assert said in done.stderr
    assert run_alone("status", run.path).rc == status
    assert run_alone(*words(tmp_path, run, *soon)).rc == 0
    check_whole(run, undisturbed)


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
