"""Jobs on a real Slurm of two nodes (tests/slurm_cluster.py), from the scripts of slurm/ as they stand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch import ROOT, Launcher
from tests.slurm_cluster import Cluster, SlurmJob
from tests.system.runs import Run, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 40
IDS = [f"r{k}" for k in range(REQUESTS)]
SIMULATED = ("-m", "any-name", "--engine", "simulated", "--ctx", "256", "--slots", "4", "--time-scale", "0.02")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def submit(slurm: Cluster, script: str, launcher: Launcher, run: Run, *more: str, options: tuple[str, ...]) -> SlurmJob:
    """A job on the requests `IDS`, with the mpirun and the llmpi that belong together first in its PATH."""
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(run.path.parent / "in.jsonl", lines)
    path = os.pathsep.join((str(launcher.python.parent), os.environ["PATH"]))
    arguments: tuple[str | Path, ...] = (run.path, *SIMULATED, "-i", given, *more)
    return slurm.submit(
        ROOT / "slurm" / script, *arguments, options=options, env={"PATH": path}, cwd=run.path.parent
    )  # fmt: skip


def hosts_of(run: Run) -> list[str]:
    """The host of each worker of the last session, by rank."""
    return [rank["host"].decode() for rank in run.metrics()["ranks"]]


def test_two_nodes_are_two_hosts_with_gpus_of_their_own(slurm: Cluster) -> None:
    shown = slurm.run(
        "srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", "bash", "-c",
        'echo "$(hostname) $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"',
    ).stdout  # fmt: skip
    assert sorted(shown.split("\n")[:-1]) == ["n1 0 0 0", "n1 1 1 1", "n2 2 0 0", "n2 3 1 1"]


def test_mpirun_in_a_batch_script_starts_ranks_on_both_nodes(slurm: Cluster, mpirun: Launcher, run: Run) -> None:
    job = submit(slurm, "mpirun.sbatch", mpirun, run, options=("--nodes=2", "--ntasks=4", "--ntasks-per-node=2"))
    assert job.wait() == 0, job.output
    run.check_whole(IDS)
    assert hosts_of(run) == ["n1", "n2", "n2"]
    assert run.about()["sessions"][0]["slurm_job"] == job.number
