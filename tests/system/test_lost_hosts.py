"""A job on two hosts (network namespaces) that loses one: its daemon is killed, or its link is cut."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.hosts import Hosts, cannot, hosts
from tests.launch import ROOT, Argument, Launcher, run_alone
from tests.system.runs import PATIENCE_S, Gate, Run, lives, prompts, until, wait_gone, write_lines

pytestmark = [
    pytest.mark.system, pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot() or "-"),
    pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True),
]  # fmt: skip

REQUESTS = 60
IDS = [f"r{k}" for k in range(REQUESTS)]


@dataclass(frozen=True)
class OnTwoHosts:
    """A job with two ranks on each host whose engines stand at the gate. `process` is mpirun, on the first host."""

    made: Hosts
    run: Run
    gate: Gate
    process: subprocess.Popen[str]
    command: tuple[Argument, ...]

    def all_processes(self) -> list[psutil.Process]:
        mpirun = psutil.Process(self.process.pid)
        return [mpirun, *mpirun.children(recursive=True)]


@contextmanager
def started(mpirun: Launcher, folder: Path, *more: Argument) -> Iterator[OnTwoHosts]:
    gate, run = Gate.closed(folder / "gate"), Run(folder / "run")
    given = write_lines(folder / "in.jsonl", prompts(REQUESTS, max_tokens=20, ignore_eos=True))
    simulated = ("--engine", "simulated", "--ctx", 256, "--slots", 2, "--time-scale", "0.0")
    job = ("batch", "-m", "any", *simulated, "-i", given, "-o", run.path, "-q", "--no-copies", *more)
    with hosts(2, folder) as made:
        words = [str(mpirun.mpirun), *made.options(2), "-n", "4", "-x", "PYTHONPATH", str(mpirun.python), "-m", "llmpi"]
        env = {**os.environ, **mpirun.env, **gate.env, "TMPDIR": str(folder)}
        with (folder / "said").open("w") as said:
            process = subprocess.Popen(
                made.command([*words, *map(str, job)]), env=env, cwd=ROOT, stdout=said, stderr=said, text=True,
                start_new_session=True,
            )  # fmt: skip
        case = OnTwoHosts(made, run, gate, process, job)
        everyone: list[psutil.Process] = []
        try:
            until(lambda: process.poll() is not None or len(gate.held()) == 3, "three engines at work")
            assert process.poll() is None, (folder / "said").read_text()
            everyone = case.all_processes()
            yield case
        finally:
            for left in filter(lives, everyone):
                left.kill()
            process.wait(PATIENCE_S)


def test_a_killed_daemon_leaves_a_run_that_is_not_complete_and_can_be_resumed(mpirun: Launcher, tmp_path: Path) -> None:
    with started(mpirun, tmp_path) as case:
        processes = case.all_processes()
        launchers = {engine.parent().parent() for engine in case.gate.held()}
        [daemon] = [process for process in launchers if process.name() == "prted"]
        daemon.kill()
        case.process.wait(PATIENCE_S)  # with whatever status: often 0
        wait_gone(processes)
    assert len(case.run.by_id()) < REQUESTS
    assert run_alone("status", case.run.path).rc == 3
    done = run_alone(*case.command)
    assert done.rc == 0, done.output
    case.run.check_whole(IDS)


def test_a_cut_link_costs_the_ranks_beyond_it_and_everything_ends(mpirun: Launcher, tmp_path: Path) -> None:
    with started(mpirun, tmp_path, "--lease", 3, "--rank0-lease", 5) as case:
        processes = case.all_processes()
        subprocess.run(["ip", "-n", case.made.names[1], "link", "set", "eth0", "down"], check=True)
        case.gate.open()
        case.process.wait(PATIENCE_S)
        wait_gone(processes)
    said = (tmp_path / "said").read_text()
    for rank in (2, 3):
        assert f"rank {rank} on {case.made.names[1]}: rank {rank} has been silent for" in said
    assert f"llmpi: no answer from rank 2 on {case.made.names[1]}" in said
    case.run.check_whole(IDS)
    assert str(case.run.metrics()["attrs"]["collectives"]).startswith("none for the last session")
    assert run_alone("status", case.run.path).rc == 0
