"""What a schedule costs on simulated workers, against what is possible. `python benchmarks/simulated_schedules.py`

The goals' two cases come first: lognormal lengths (sigma 1), one slot a worker, one of 8 workers five times slower,
69 and 2,000 requests. The rest of the table varies the spread, the number of workers and the slots. Each row gives
medians over seeds of: work stealing over zero-latency list scheduling of the same order, work stealing over
round-robin, work stealing over the lower bound, and the share of slot-seconds that were free while unstarted work
existed. Exit code 1 if a goal is missed. `--json` prints the rows as JSON instead of a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.simulator import list_schedule, lower_bound, simulate


@dataclass(frozen=True)
class Case:
    """Lognormal lengths with median 1 s; the last of the workers is `slower` times slower than the others."""

    requests: int
    workers: int = 8
    slots: int = 1
    sigma: float = 1.0
    slower: float = 5.0


@dataclass(frozen=True)
class Row:
    """Medians over seeds; `over_list_p90` is the 90th percentile."""

    case: Case
    seeds: int
    over_list: float
    over_list_p90: float
    over_round_robin: float
    over_bound: float
    list_over_bound: float
    free_share: float


GOALS = (Case(69), Case(2000))
OTHERS = (
    *(Case(69, sigma=sigma) for sigma in (0.5, 2.0)),
    *(Case(2000, sigma=sigma) for sigma in (0.5, 2.0)),
    *(Case(9 * workers, workers=workers) for workers in (2, 4, 16, 64)),
    *(Case(100 * workers, workers=workers) for workers in (2, 16)),
    *(Case(9 * 8 * slots, slots=slots) for slots in (4, 16)),
    *(Case(30 * 8 * slots, slots=slots) for slots in (4, 16)),
    Case(69, slower=1.0),
    Case(69, slower=20.0),
)


def measure(case: Case, seeds: int) -> Row:
    """Play `case` with lengths of `seeds` different seeds."""
    speeds = [1.0] * (case.workers - 1) + [1.0 / case.slower]
    found = []
    for seed in range(seeds):
        lengths_s = np.random.default_rng(seed).lognormal(0.0, case.sigma, case.requests).tolist()
        stealing = simulate(lengths_s, speeds, "work-stealing", slots=case.slots)
        round_robin = simulate(lengths_s, speeds, "round-robin", slots=case.slots)
        best_s = list_schedule(lengths_s, speeds, case.slots)
        bound_s = lower_bound(lengths_s, speeds, case.slots)
        made_s = stealing.makespan_s
        free = stealing.free_slot_s / stealing.slot_s
        found.append((made_s / best_s, made_s / round_robin.makespan_s, made_s / bound_s, best_s / bound_s, free))
    over_list, over_round_robin, over_bound, list_over_bound, free_share = np.median(np.array(found), axis=0)
    p90 = float(np.quantile([row[0] for row in found], 0.9))
    return Row(
        case, seeds, float(over_list), p90, float(over_round_robin), float(over_bound), float(list_over_bound),
        float(free_share),
    )  # fmt: skip


def missed(small: Row, large: Row) -> list[str]:
    """The goals that these two rows miss, in words."""
    wrong = []
    if small.over_list > 1.02:
        wrong.append(f"69 requests: {small.over_list:.3f} of list scheduling, not 1.02")
    if small.over_round_robin > 0.5:
        wrong.append(f"69 requests: {small.over_round_robin:.2f} of round-robin, not 0.5")
    if large.over_bound > 1.05:
        wrong.append(f"2,000 requests: {large.over_bound:.3f} of the lower bound, not 1.05")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--goals-only", action="store_true", help="only the two cases that the goals are about")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    titles = "requests workers slots sigma slower   /list  p90  /round-robin  /bound  list/bound   free %"
    if not options.json:
        print(titles)
    for case in GOALS if options.goals_only else GOALS + OTHERS:
        row = measure(case, options.seeds if case in GOALS else max(1, options.seeds // 5))
        rows.append(row)
        if not options.json:
            print(
                f"{case.requests:8d} {case.workers:7d} {case.slots:5d} {case.sigma:5.1f} {case.slower:6.1f}"
                f" {row.over_list:7.3f} {row.over_list_p90:5.2f} {row.over_round_robin:12.3f} {row.over_bound:8.3f}"
                f" {row.list_over_bound:10.3f} {100 * row.free_share:9.3f}",
                flush=True,
            )
    wrong = missed(rows[0], rows[1])
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "goals_missed": wrong}, indent=1))
    for line in wrong:
        print(f"goal missed: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
