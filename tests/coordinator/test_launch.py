"""Launchers told apart by their variables, and singletons refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coordinator.launch import Launch, check_singleton, detect
from scheduling.errors import ConfigError
from tests.launch import ROOT

OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_RANK": "2",
    "PRTE_LAUNCHED": "1",
}
HYDRA = {"PMI_SIZE": "3", "PMI_RANK": "0", "PMI_FD": "9", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "0"}
IN_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = IN_JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP_PMI2 = STEP | {"PMI_SIZE": "4", "PMI_RANK": "3", "PMI_FD": "15"}
DAEMONS_STEP = IN_JOB | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environ", "launcher", "size", "rank", "local"),
    [
        ({}, "none", None, None, None),
        (OPENMPI, "openmpi", 3, 2, 1),
        (HYDRA, "mpich", 3, 0, 0),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpich", 2, 1, None),
        (STEP, "slurm", 4, 3, 1),
        (STEP_PMI2, "slurm", 4, 3, 1),
        (IN_JOB, "none", None, None, None),
        (DAEMONS_STEP | OPENMPI, "openmpi", 3, 2, 1),
        (DAEMONS_STEP | HYDRA, "mpich", 3, 0, 0),
        ({"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "8", "PMI_RANK": "5"}, "pals", 8, 5, 1),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "none", None, None, None),
    ],
)
def test_launcher_is_told_by_its_variables(
    environ: dict[str, str], launcher: str, size: int | None, rank: int | None, local: int | None
) -> None:
    found = detect(environ)
    assert (found.launcher, found.size_claimed, found.rank_claimed, found.local_rank) == (
        launcher,
        size,
        rank,
        local,
    )


def test_details_hold_the_variables_that_told() -> None:
    assert detect(STEP).details == {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(("environ", "speaks"), [({}, True), (HYDRA, True), (OPENMPI, False), (STEP, False)])
def test_one_task_speaks_for_all(environ: dict[str, str], speaks: bool) -> None:
    assert detect(environ).speaks is speaks


@pytest.mark.parametrize(
    ("environ", "mpi_size"),
    [({}, 1), (OPENMPI, 3), (STEP, 4), (IN_JOB, 1), (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 1)],
)
def test_what_fits_is_no_singleton(environ: dict[str, str], mpi_size: int) -> None:
    check_singleton(detect(environ), mpi_size, environ)


@pytest.mark.parametrize(
    ("environ", "library", "said"),
    [
        (
            STEP_PMI2,
            "Open MPI v5.0.11",
            ["srun started 4 tasks", "PMI-2", "Open MPI needs `srun --mpi=pmix", "mpirun"],
        ),
        (
            STEP | {"PMIX_NAMESPACE": "x"},
            "MPICH Version: 5.0",
            ["offered PMIx", "this MPI needs `srun --mpi=pmi2"],
        ),
        (STEP, "", ["no PMI", "--mpi=pmix", "--mpi=pmi2", "srun --mpi=list"]),
        (OPENMPI, "MPICH Version: 5.0", ["Open MPI's mpirun started 3 tasks", "another MPI (MPICH Version: 5.0)"]),
        (HYDRA, "Open MPI v5.0.11, package: x", ["MPICH's mpirun started 3 tasks", "(Open MPI v5.0.11)"]),
    ],
)
def test_singletons_are_refused_with_the_fix(environ: dict[str, str], library: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_singleton(detect(environ), 1, environ, library)
    assert [clause for clause in said if clause not in str(caught.value)] == []


def test_launch_is_a_plain_value() -> None:
    assert detect({}) == Launch("none", None, None, None, {})


@pytest.mark.parametrize("module", ["launch", "ownmpirun"])
def test_module_does_not_import_mpi(module: str) -> None:
    code = f"import sys, coordinator.{module}; sys.exit('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
