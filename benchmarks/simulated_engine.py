"""How near the simulated engine comes to the real one, at loads that its service times were not fitted on.

usage: python benchmarks/simulated_engine.py MODEL [--service-times FILE] [--slots N] [--threads N] [--repeats N]
           [--times N]

Calibrates first, unless service times are given. Then each load is given to the real engine and to the simulated one in
turn. Printed are medians, the simulated engine's error, and how far apart the real engine's own repeats are: no model
can be nearer than that. With --times N loads are N times as large, for engines with more slots
than 8. With --time-scale X the simulated engine takes X times as long, and what it took is divided by
that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from coordinator.bench_engine import BenchEngine, first_engine
from coordinator.bench_load import GREEDY, Load
from coordinator.calibrate import run_calibrate
from coordinator.config import JobConfig
from coordinator.setup import prepare

CTX_TOKENS = 1024
LOADS = {
    "full slots, 48 + 24": Load(requests=32, prompt_tokens=48, output_tokens=24, output_tokens_max=24),
    "lognormal, 32 + 24": Load(requests=40, prompt_tokens=32, output_tokens=24, output_tokens_max=192, sigma=1.0),
    "2 at once, 400 + 24": Load(requests=6, prompt_tokens=400, output_tokens=24, output_tokens_max=24, concurrency=2),
}

Figures = dict[str, float]


def loads(times: int) -> dict[str, Load]:
    """`LOADS` with so many times as many requests, also at once."""
    return {
        name if times == 1 else f"{name}, x {times}": replace(
            load, requests=load.requests * times, concurrency=load.concurrency and load.concurrency * times
        )
        for name, load in LOADS.items()
    }


def config(options: argparse.Namespace, **engine: Any) -> JobConfig:
    return JobConfig(
        model=options.model, slots=options.slots, contexts=options.contexts, ctx=CTX_TOKENS, threads=options.threads,
        **engine,
    )  # fmt: skip


def run(bench: BenchEngine, load: Load, repeat: int) -> Figures:
    done = bench.run(load.jobs(bench.loaded.vocab_tokens, repeat), load.concurrency)
    ttft = [answer.ttft_s for answer in done.answers]
    e2e = [answer.e2e_s for answer in done.answers]
    return {
        "total tokens/s": done.total_tokens_per_s,
        "TTFT P50, s": float(np.percentile(ttft, 50)),
        "end-to-end P50, s": float(np.percentile(e2e, 50)),
        "end-to-end P95, s": float(np.percentile(e2e, 95)),
    }


def unscaled(figures: Figures, scale: float) -> Figures:
    return {name: value * scale if name.endswith("/s") else value / scale for name, value in figures.items()}


def compare(options: argparse.Namespace, times: Path) -> dict[str, dict[str, dict[str, float]]]:
    """For each load and figure: real, simulated, error, spread of the real ones."""
    real = BenchEngine(first_engine(prepare(config(options))))
    simulated_config = config(options, engine="simulated", service_times=str(times), time_scale=options.time_scale)
    simulated = BenchEngine(first_engine(prepare(simulated_config)))
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for name, load in loads(options.times).items():
            theirs, ours = [], []
            for repeat in range(options.repeats):
                theirs.append(run(real, load, repeat))
                ours.append(unscaled(run(simulated, load, repeat), options.time_scale))
            found[name] = {}
            for figure in theirs[0]:
                values = [one[figure] for one in theirs]
                measured, said = median(values), median(one[figure] for one in ours)
                found[name][figure] = {
                    "real": measured,
                    "simulated": said,
                    "error": said / measured - 1.0,
                    "spread": (max(values) - min(values)) / measured,
                }
    finally:
        real.close()
        simulated.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--service-times", type=Path)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--contexts", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        times = options.service_times
        if times is None:
            times = Path(scratch) / "service-times.json"
            run_calibrate(config(options), GREEDY, repeats=3, output=times, as_json=False)
        found = compare(options, times)
    if options.json:
        print(json.dumps(found))
        return
    for load, figures in found.items():
        print(f"{load:28} {'real':>9} {'simulated':>10} {'error':>8} {'real repeats apart':>19}")
        for name, row in figures.items():
            print(
                f"  {name:20} {row['real']:9.2f} {row['simulated']:10.2f} {100 * row['error']:+6.1f} %"
                f" {100 * row['spread']:17.1f} %"
            )


if __name__ == "__main__":
    main()
