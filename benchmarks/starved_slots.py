"""What rank 0 costs the workers: slot-seconds that were free while unstarted work existed, from the run's own /ranks.

usage: python benchmarks/starved_slots.py MODEL [REQUESTS] [--ranks N] [--slots N] [--output-tokens N]

Runs `mpirun -n N llmpi batch` over REQUESTS prompts (or over examples/prompts.jsonl if no number is given) with each
schedule and prints the share of all slot-seconds that starved while there was work to start.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples" / "prompts.jsonl"


def write_requests(path: Path, count: int, output_tokens: int) -> None:
    """Short prompts with lognormal output limits (sigma 1) around a mean of `output_tokens`."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            limit = max(1, min(8 * output_tokens, round(draw.lognormvariate(0, 1) * output_tokens / 1.65)))
            line = {"custom_id": f"r{k}", "prompt": f"Item {k}:", "max_tokens": limit, "ignore_eos": True}
            file.write(json.dumps(line | {"temperature": 0}) + "\n")


def run(options: argparse.Namespace, requests: Path, schedule: str, run_dir: Path) -> dict[str, float]:
    """One job; rank rows of its report."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("no mpirun beside this Python or on the PATH")
    command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(options.ranks), sys.executable, "-m", "llmpi"]
    command += ["batch", "-m", options.model, "-i", str(requests), "-o", str(run_dir), "--schedule", schedule]
    command += ["--slots", str(options.slots), "--json", "--quiet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    ranks = report["ranks"]
    return {
        "requests": report["requests"],
        "wall_s": report["last_session"]["wall_s"],
        "starved_slot_s": sum(rank["starved_slot_s"] for rank in ranks),
        "open_slot_s": sum(rank["open_slot_s"] for rank in ranks),
        "stolen": sum(rank["stolen_in"] for rank in ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("requests", type=int, nargs="?")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=24)
    options = parser.parse_args()
    print(f"{'schedule':>14} {'requests':>9} {'wall s':>8} {'starved slot-s':>15} {'of all':>8} {'stolen':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        requests = EXAMPLES
        if options.requests is not None:
            requests = Path(scratch) / "requests.jsonl"
            write_requests(requests, options.requests, options.output_tokens)
        for schedule in ("work-stealing", "round-robin"):
            found = run(options, requests, schedule, Path(scratch) / schedule)
            share = found["starved_slot_s"] / found["open_slot_s"]
            print(
                f"{schedule:>14} {found['requests']:9.0f} {found['wall_s']:8.1f} {found['starved_slot_s']:15.2f}"
                f" {100 * share:6.2f} % {found['stolen']:7.0f}"
            )


if __name__ == "__main__":
    main()
