"""The example hostfiles: the MPI library they are for reads them and starts as many ranks as they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import PATIENCE_S, ROOT, Launcher

pytestmark = [pytest.mark.system, pytest.mark.mpi, pytest.mark.slow]

COUNT_RANKS = "from mpi4py import MPI; print('size', MPI.COMM_WORLD.size) if not MPI.COMM_WORLD.rank else None"


def _on_this_host(example: str, scratch: Path) -> tuple[Path, int]:
    """A copy of the example that names this machine alone, on one line; and its number of slots."""
    text = (ROOT / "hostfiles" / example).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    slots = sum(int(re.split(r"slots=|:", line)[1]) for line in lines)
    first = re.sub(r"\d+$", str(slots), lines[0])
    copy = scratch / example
    copy.write_text("\n".join(["# a comment, as the example has", re.sub(r"^[\w-]+", "localhost", first)]) + "\n")
    return copy, slots


@pytest.mark.parametrize(
    ("mpirun", "option", "example"),
    [
        ("openmpi", "--hostfile", "openmpi.txt"),
        ("openmpi", "--hostfile", "openmpi-cpu.txt"),
        ("mpich", "-f", "mpich.txt"),
    ],
    indirect=["mpirun"],
)
def test_example_gives_all_its_slots(mpirun: Launcher, tmp_path: Path, option: str, example: str) -> None:
    hostfile, slots = _on_this_host(example, tmp_path)
    done = mpirun(slots, program=("-c", COUNT_RANKS), mpi_options=(option, str(hostfile)), timeout_s=PATIENCE_S)
    assert done.rc == 0, done.output
    assert f"size {slots}" in done.stdout
