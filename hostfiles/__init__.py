"""Example hostfiles: copy one, put your hosts in, and give it to mpirun.

Open MPI writes `host slots=N`, MPICH and Intel MPI write `host:N`. N is the number of ranks that the host gets:
its GPUs (rank 0 takes the one that no other rank is given), or, without GPUs, a few for its processors.
"""

from __future__ import annotations

from importlib import resources


def names() -> list[str]:
    """The examples there are, sorted."""
    return sorted(entry.name for entry in resources.files(__name__).iterdir() if entry.name.endswith(".txt"))


def text(name: str) -> str:
    """An example's text. Raises FileNotFoundError for a name that `names` does not list."""
    if name not in names():
        raise FileNotFoundError(f"no hostfile example {name!r}: there are {', '.join(names())}")
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
