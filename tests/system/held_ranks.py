"""Jobs whose engines are simulated and stand at a gate until what is to happen has happened, so that it meets work
whatever the machine is like, and jobs that are altered. Whatever happens, the answers are those of an undisturbed run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import Argument, Finished, Job, Launcher, run_alone
from tests.system.runs import PATIENCE_S, Gate, Run, engines_of, prompts, ranks_of, until, write_lines

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
