"""The example hostfiles: the MPI library they are for reads them and starts as many ranks as they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import ROOT, Launcher

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


def _ranks_started(mpirun: Launcher, option: str, hostfile: Path, slots: int) -> str:
    done = mpirun(slots, program=("-c", COUNT_RANKS), mpi_options=(option, str(hostfile)), timeout_s=120)
    assert done.rc == 0, done.output
    return done.stdout


@pytest.mark.parametrize("example", ["openmpi.txt", "openmpi-cpu.txt"])
def test_openmpi_example_gives_all_its_slots(mpirun: Launcher, tmp_path: Path, example: str) -> None:
    if mpirun.kind != "openmpi":
        pytest.skip("this environment has MPICH; the example is for Open MPI")
    hostfile, slots = _on_this_host(example, tmp_path)
    assert f"size {slots}" in _ranks_started(mpirun, "--hostfile", hostfile, slots)


def test_mpich_example_gives_all_its_slots(mpirun_mpich: Launcher, tmp_path: Path) -> None:
    hostfile, slots = _on_this_host("mpich.txt", tmp_path)
    assert f"size {slots}" in _ranks_started(mpirun_mpich, "-f", hostfile, slots)
