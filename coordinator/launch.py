"""Who started us: settled before MPI is initialised.

`detect` reads the launcher's variables. `check_singleton` compares their claim with what MPI then found: N
processes that each believe to be alone would answer every request N times.

This module must not import mpi4py: importing it may initialise MPI.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Launch:
    """What the environment claims. None: it does not say. `details` holds the variables that told."""

    launcher: str
    """none, openmpi, mpich (any Hydra), pals or slurm."""
    size_claimed: int | None
    rank_claimed: int | None
    local_rank: int | None
    details: dict[str, str]

    @property
    def speaks(self) -> bool:
        """True for the one process that prints what concerns all, also when all believe to be alone."""
        return not self.rank_claimed


@dataclass(frozen=True, slots=True)
class _Signs:
    """A launcher, the variables that must be there to recognise it, and those for size and rank."""

    launcher: str
    needs: tuple[str, ...]
    size: str
    rank: str


# The order matters: mpirun inside a Slurm job starts its daemons as a step, so ranks carry Slurm's variables too;
# and srun --mpi=pmi2 sets PMI_SIZE without Hydra's MPI_LOCALRANKID.
_KNOWN = (
    _Signs("openmpi", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    _Signs("mpich", ("PMI_SIZE", "MPI_LOCALRANKID"), "PMI_SIZE", "PMI_RANK"),
    _Signs("pals", ("PALS_RANKID",), "PMI_SIZE", "PALS_RANKID"),
    _Signs("slurm", ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    _Signs("mpich", ("PMI_SIZE", "PMI_RANK"), "PMI_SIZE", "PMI_RANK"),
)


def detect(environ: Mapping[str, str]) -> Launch:
    """The launcher of this process. A plain call inside a batch script has none: SLURM_NTASKS is the job's."""
    for signs in _KNOWN:
        if all(environ.get(name) for name in signs.needs):
            told = {name: environ[name] for name in (*signs.needs, signs.size, signs.rank) if name in environ}
            size, rank = _number(environ.get(signs.size)), _number(environ.get(signs.rank))
            from workers.hosts import local_rank  # of a rank: `llmpi --help` has no use for what that loads

            return Launch(signs.launcher, size, rank, local_rank(environ), told)
    return Launch("none", None, None, None, {})


def check_singleton(launch: Launch, mpi_size: int, environ: Mapping[str, str], library: str = "") -> None:
    """Raise ConfigError if the launcher started several tasks and MPI sees only this one.

    `library` is MPI's own description of itself, if known: it makes the advice exact. All tasks raise; only the
    one whose `Launch.speaks` need print.
    """
    claimed = launch.size_claimed or 1
    if mpi_size != 1 or claimed <= 1:
        return
    alone = f"started {claimed} tasks, but to MPI each of them is alone"
    if launch.launcher == "slurm":
        offered = "PMIx" if "PMIX_NAMESPACE" in environ else "PMI-2" if "PMI_RANK" in environ else "no PMI"
        if "open mpi" in library.lower():
            way = "Open MPI needs `srun --mpi=pmix …`"
        elif "mpich" in library.lower() or "intel" in library.lower():
            way = "this MPI needs `srun --mpi=pmi2 …`"
        else:
            way = "use `srun --mpi=pmix …` for Open MPI or `srun --mpi=pmi2 …` for MPICH"
        raise ConfigError(
            f"srun {alone}: Slurm offered {offered}, which this MPI does not speak. Of the two ways out, {way} "
            "(`srun --mpi=list` shows what there is); the other is `mpirun --bind-to none …` in the batch script."
        )
    theirs = {"openmpi": "Open MPI's mpirun", "mpich": "MPICH's mpirun", "pals": "PALS's mpiexec"}[launch.launcher]
    ours = f" ({library.split(',')[0].strip()})" if library else ""
    beside = Path(sys.executable).parent / "mpirun"
    way = f"use {beside}" if beside.exists() else "use the mpirun of the MPI that mpi4py was installed with"
    raise ConfigError(
        f"{theirs} {alone}: this Python's mpi4py uses another MPI{ours}. Start with the mpirun that belongs to "
        f"it: {way}."
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
