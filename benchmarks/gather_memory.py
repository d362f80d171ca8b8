"""Peak resident memory of each rank while rows of requests are gathered at rank 0, by the code that a run uses.

usage: python benchmarks/gather_memory.py [--rows N] [--ranks N] [--json]

Starts mpirun with as many ranks, each with its share of synthetic rows, and calls `coordinator.collect.collect` over
MPI, twice: with a tenth of the rows and with all of them. Rank 0 has no rows of its own, as in a run whose rank 0
only coordinates; it must see every row once. The figure that counts is how much more than before the gather a rank
needs (getrusage), which must not grow with the rows: rank 0 keeps none, and the others send theirs piece by piece.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BOUND_BYTES = 256 << 20
"""Most that gathering may take at any rank, beside the rows that it has: two chunks of 64 MiB, and what counting one
chunk takes."""
BLOCK_ROWS = 4096


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(rows: int) -> None:
    """One rank: its rows, then the gather. Rank 0 prints what all ranks measured."""
    from coordinator.collect import collect
    from coordinator.mpi import World
    from coordinator.mpi_collectives import Collectives
    from scheduling.tables import REQUEST
    from storage.summary import check_reduced
    from workers.metrics import RankMetrics

    world = World()
    sources = world.size - 1
    metrics = RankMetrics(world.rank, 0, "host")
    own = 0 if world.rank == 0 else rows // sources + int(world.rank <= rows % sources)
    random = np.random.default_rng(world.rank)
    for start in range(0, own, BLOCK_ROWS):
        block = np.zeros(min(BLOCK_ROWS, own - start), REQUEST)
        block["index"] = np.arange(start, start + len(block)) * sources + world.rank - 1
        block["prompt_tokens"], block["output_tokens"], block["ok"] = 100, 7, 1
        for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s"):
            block[name] = random.lognormal(size=len(block))
        metrics.requests.extend(block)
        metrics.finished += len(block)
        metrics.prompt_tokens += 100 * len(block)
        metrics.output_tokens += 7 * len(block)
    before, began = peak_bytes(), time.monotonic()
    indexes = [0]

    def take(came: Any) -> None:
        indexes[0] += int(came["index"].sum())

    gathered = collect(Collectives(world), [metrics] if world.rank else [], 1.0, take)
    took_s = time.monotonic() - began
    figures = np.zeros((world.size, 3), np.int64)
    figures[world.rank] = own * REQUEST.itemsize, before, peak_bytes()
    figures = Collectives(world).sum(figures)
    if world.rank == 0:
        check_reduced(gathered.reduced, gathered.rows)
        if gathered.rows.sums.requests != rows or indexes[0] != rows * (rows - 1) // 2:
            raise SystemExit("not every row came once")
        print(json.dumps({"rows": rows, "took_s": took_s, "ranks": figures.tolist()}), flush=True)


def measure(rows: int, ranks: int) -> dict[str, Any]:
    """Figures of one gather: for each rank bytes of its rows, its peak before the gather and after it."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("no mpirun beside this Python or on the PATH")
    command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable, __file__]
    done = subprocess.run([*command, "--rank", "--rows", str(rows)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.rows)
        return
    runs = [measure(rows, options.ranks) for rows in (options.rows // 10, options.rows)]
    if options.json:
        print(json.dumps(runs))
    else:
        print(f"{'rows':>10} {'rank':>4} {'its rows':>9} {'peak before':>12} {'peak after':>11} {'gather took':>12}")
        for run in runs:
            for rank, (own, before, after) in enumerate(run["ranks"]):
                sizes = f"{own / 1e6:6.0f} MB {before / 1e6:9.0f} MB {after / 1e6:8.0f} MB"
                print(f"{run['rows']:10,} {rank:4} {sizes} {run['took_s']:10.1f} s")
    most = max(after - before for run in runs for _, before, after in run["ranks"])
    if most > BOUND_BYTES:
        sys.exit(f"gathering took {most / 1e6:.0f} MB at a rank: the bound is {BOUND_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
