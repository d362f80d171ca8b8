"""Makespan with and without copies of stragglers, one worker slower than the others.

usage: python benchmarks/stragglers.py [--seeds N] [--json]                  simulated clusters, lognormal lengths
       python benchmarks/stragglers.py --mpirun [--repeats N] [--slower F]   four ranks for real, and rank 0

The first plays the control plane on simulated workers (`scheduling.simulator`). The second runs `llmpi batch --engine
simulated` under mpirun, without and with copies in turn; the engine of the last rank takes F times as long. As on a GPU
a step takes hardly longer for eight sequences than for one, and long enough for a busy machine to add little. How long
an answer becomes is known to nobody before it ends: 256 tokens in the mean, about exponentially distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.control import Limits
from scheduling.servicetime import EXAMPLE, service_times_json
from scheduling.simulator import lower_bound, simulate

WORKERS = 4
RANK = "OMPI_COMM_WORLD_RANK", "PMI_RANK"


@dataclass(frozen=True)
class Case:
    """Lognormal lengths with median 1 s; the last of four workers is `slower` times slower than the others."""

    requests: int
    slots: int
    sigma: float = 1.0
    slower: float = 5.0


@dataclass(frozen=True)
class Row:
    """Over seeds: medians in seconds, median and maximum of with / without, means of the rest.

    wasted: share of all slot time in use.
    """

    case: Case
    seeds: int
    without_s: float
    with_s: float
    bound_s: float
    ratio: float
    ratio_worst: float
    copies: float
    won: float
    wasted: float


CASES = (
    Case(20, 1), Case(69, 1), Case(200, 1), Case(69, 8), Case(200, 8), Case(2000, 8), Case(2000, 64),
    Case(200, 8, sigma=0.5), Case(200, 8, sigma=2.0),
    Case(200, 8, slower=1.0), Case(200, 8, slower=1.5), Case(200, 8, slower=2.0), Case(200, 8, slower=20.0),
)  # fmt: skip


def play(case: Case, seeds: int) -> Row:
    speeds = [1.0] * (WORKERS - 1) + [1.0 / case.slower]
    found = []
    for seed in range(seeds):
        lengths_s = np.random.default_rng(seed).lognormal(0.0, case.sigma, case.requests).tolist()
        without, copying = (
            simulate(lengths_s, speeds, "work-stealing", slots=case.slots, limits=Limits(copies=copies, lease_s=None))
            for copies in (False, True)
        )
        found.append(
            (without.makespan_s, copying.makespan_s, lower_bound(lengths_s, speeds, case.slots), copying.copies,
             copying.copies_won, copying.wasted_s / sum(copying.busy_s))
        )  # fmt: skip
    table = np.array(found)
    ratios = table[:, 1] / table[:, 0]
    without_s, with_s, bound_s = np.median(table[:, :3], axis=0)
    copies, won, wasted = table[:, 3:].mean(axis=0)
    return Row(
        case, seeds, float(without_s), float(with_s), float(bound_s), float(np.median(ratios)), float(ratios.max()),
        float(copies), float(won), float(wasted),
    )  # fmt: skip


def simulated(seeds: int, as_json: bool) -> None:
    rows = []
    if not as_json:
        print("requests slots sigma slower   without s   with s  bound s   ratio  worst  copies  won  wasted %")
    for case in CASES:
        rows.append(row := play(case, seeds if case.requests <= 200 else max(1, seeds // 10)))
        if not as_json:
            print(
                f"{case.requests:8d} {case.slots:5d} {case.sigma:5.1f} {case.slower:6.1f} {row.without_s:11.2f}"
                f" {row.with_s:8.2f} {row.bound_s:8.2f} {row.ratio:7.3f} {row.ratio_worst:6.3f} {row.copies:7.1f}"
                f" {row.won:4.1f} {100 * row.wasted:9.1f}",
                flush=True,
            )
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


# ---------------------------------------------------------------- for real


def run(options: argparse.Namespace, requests: Path, run_dir: Path, seed: int, *copies: str) -> dict[str, float]:
    """One job; what its report says of the session."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("no mpirun beside this Python or on the PATH")
    command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(WORKERS + 1), sys.executable, __file__]
    command += ["--as-rank", str(options.slower), "batch", "--engine", "simulated", "-m", "none", "-i", str(requests)]
    command += ["-o", str(run_dir), "--service-times", str(requests.with_name("times.json")), "--seed", str(seed)]
    command += ["--max-tokens", "1024", "--json", "--quiet", *copies]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    if report["ok"] != options.requests or "sums_differ" in report["last_session"]:
        sys.exit(f"this run went wrong: {report}")
    last = report["last_session"]
    return {name: last[name] for name in ("wall_s", "copies", "copies_won", "wasted_tokens", "output_tokens")}


def as_rank(slower: float, arguments: list[str]) -> None:
    """Be one rank of the job. Whether its engine is slow must be in no option: those are the same on all ranks."""
    from coordinator import cli, engines
    from coordinator.simulated import simulated_engine

    rank = next(int(os.environ[name]) for name in RANK if name in os.environ)
    if rank == WORKERS:
        engines.simulated_engine = lambda config, times, placement: simulated_engine(  # type: ignore[attr-defined]
            config, times.scaled(slower), placement
        )
    sys.argv[1:] = arguments
    cli.main()


def real(options: argparse.Namespace) -> None:
    print(f"{'seed':>5} {'without s':>10} {'with s':>8} {'ratio':>7} {'copies':>7} {'won':>4} {'wasted %':>9}")
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        requests = Path(scratch) / "requests.txt"
        times = msgspec.structs.replace(EXAMPLE, decode_rows=(1, 8), decode_s=(0.036, 0.040), read_token_s=1e-4)
        requests.with_name("times.json").write_bytes(service_times_json(times))
        requests.write_text("".join(f"Item {k}: what is it?\n" for k in range(options.requests)))
        for seed in range(options.repeats):
            found = {}
            arms = ["--no-copies", "--copies"]
            for arm in arms if seed % 2 == 0 else arms[::-1]:
                found[arm] = run(options, requests, Path(scratch) / f"{seed}{arm}", seed, arm)
            without, copying = (found[arm] for arm in arms)
            ratios.append(copying["wall_s"] / without["wall_s"])
            wasted = copying["wasted_tokens"] / (copying["output_tokens"] + copying["wasted_tokens"])
            print(
                f"{seed:5d} {without['wall_s']:10.2f} {copying['wall_s']:8.2f} {ratios[-1]:7.3f}"
                f" {copying['copies']:7.0f} {copying['copies_won']:4.0f} {100 * wasted:9.1f}",
                flush=True,
            )
    print(f"median of with / without: {np.median(ratios):.3f}")


def main() -> None:
    if sys.argv[1:2] == ["--as-rank"]:
        as_rank(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mpirun", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--slower", type=float, default=5.0)
    options = parser.parse_args()
    if options.mpirun:
        real(options)
    else:
        simulated(options.seeds, options.json)


if __name__ == "__main__":
    main()
