"""Peak resident memory of rank 0 while prompts of 1 KB go through the real way of a request, precheck included.

usage: python benchmarks/rank0_memory.py [--requests N] [--json]

Runs `mpirun -n 3 llmpi bench dispatch` without the peer twice, with a tenth of the requests and with all of them, so
that what grows with the input shows. The figure is rank 0's own (getrusage), taken before its peer would run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path


def peak_bytes(requests: int) -> dict[str, float]:
    """One run; its own figures."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("no mpirun beside this Python or on the PATH")
    command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", "3", sys.executable, "-m", "llmpi"]
    command += ["bench", "dispatch", "--json", "--requests", str(requests), "--peer-requests", "0"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = {count: peak_bytes(count) for count in (options.requests // 10, options.requests)}
    if options.json:
        print(json.dumps({str(count): found for count, found in runs.items()}))
        return
    print(f"{'requests':>10} {'input':>9} {'rank 0 peak':>12} {'requests/s':>11}")
    for count, found in runs.items():
        size = count * found["prompt_bytes"] / 1e6
        print(f"{count:10,} {size:6.0f} MB {found['rank0_peak_bytes'] / 1e6:9.0f} MB {found['requests_per_s']:11,.0f}")


if __name__ == "__main__":
    main()
