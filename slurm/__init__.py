"""Batch scripts for Slurm, to be used as they stand: `sbatch [options] SCRIPT RUN_DIR -m MODEL -i REQUESTS …`.

mpirun.sbatch starts the ranks with mpirun inside the job, which works with any Slurm. srun.sbatch starts them as
a step, where Slurm's PMI and MPI fit each other, and takes heterogeneous jobs. Both take job arrays, whose tasks share
the requests. The run stops by itself before the time limit (docs/stopping.md), and both end with the status that the
record tells, for a launcher's own status cannot be trusted. docs/slurm.md has the commands. study.sbatch
is mpirun.sbatch for a scaling study (docs/studies.md).
"""

from __future__ import annotations

from importlib import resources


def names() -> list[str]:
    """The scripts there are, sorted."""
    return sorted(entry.name for entry in resources.files(__name__).iterdir() if entry.name.endswith(".sbatch"))


def text(name: str) -> str:
    """A script's text. Raises FileNotFoundError for a name that `names` does not list."""
    if name not in names():
        raise FileNotFoundError(f"no Slurm script {name!r}: there are {', '.join(names())}")
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
