"""Gathering takes no more memory for more rows: the benchmark's own measurement, with fewer of them."""

from __future__ import annotations

import json

import pytest

from tests.launch import ROOT, Launcher

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

ROWS = 2_000_000
"""156 MB of rows: whoever kept them would need that, and whoever copied its own as a whole 78 MB."""
RANK_0_BYTES_MAX = 150_000_000
OTHERS_BYTES_MAX = 60_000_000


@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_memory_of_a_gather_is_bounded_at_every_rank(mpirun: Launcher) -> None:
    done = mpirun(3, "--rank", "--rows", ROWS, program=[ROOT / "benchmarks" / "gather_memory.py"])
    assert done.rc == 0, done.output
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["rows"] == ROWS
    grown = [after - before for _, before, after in told["ranks"]]
    assert grown[0] < RANK_0_BYTES_MAX, told
    assert max(grown[1:]) < OTHERS_BYTES_MAX, told
