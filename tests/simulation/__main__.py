"""`python -m tests.simulation`: many seeds on all processors. `make simulate SEEDS=N FIRST_SEED=K` calls it.

Exit status 0 only if everything held in every seed. A seed in which something did not prints one line that repeats it,
then its story. The last line counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType

try:
    from tests.simulation.agenda import ViolationError
    from tests.simulation.bugs import BUGS, planted
    from tests.simulation.case import Outcome, folder_in_memory, in_simulation, simulate
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("coordinator", "scheduling", "storage", "tests", "workers"):
        raise
    sys.exit(
        f"{sys.executable} has no {error.name}, which simulated jobs need: `make requirements` installs everything but "
        "llama.cpp, or name a Python that has it (make simulate PYTHON=…)"
    )

SEEDS_TOLD_MAX = 5
"""After so many seeds in which something did not hold, no more are told."""
SEED_S = 300
"""Real seconds after which a seed is taken to hang."""

_inside = contextlib.ExitStack()
_folder = Path()


def _enter(parent: Path, bug: str | None) -> None:
    """Make this process ready for many seeds, until it ends."""
    global _folder
    _folder = parent / f"{os.getpid():08}"
    _inside.enter_context(in_simulation(_folder))
    if bug is not None:
        _inside.enter_context(planted(bug))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _hangs)


def _hangs(number: int, frame: FrameType | None) -> None:
    raise ViolationError(f"the seed has not ended after {SEED_S} real seconds")


def _simulate(seed: int) -> Outcome:
    signal.alarm(SEED_S)
    try:
        return simulate(seed, _folder)
    finally:
        signal.alarm(0)


def outcomes(seeds: Sequence[int], jobs: int, bug: str | None = None) -> Iterator[Outcome]:
    """What came of each seed, in order. `bug`: one of `bugs.BUGS` to be planted."""
    chunk = max(1, min(16, len(seeds) // (4 * jobs)))
    with (
        folder_in_memory() as folder,
        ProcessPoolExecutor(jobs, initializer=_enter, initargs=(folder, bug)) as pool,
    ):
        yield from pool.map(_simulate, seeds, chunksize=chunk)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--seeds", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--jobs", type=int, default=processors, help="processes (default: one a processor)")
    parser.add_argument("--digests", action="store_true", help="print the digest of each seed's trace")
    parser.add_argument("--bug", choices=BUGS, help="plant this one, to see it found")
    options = parser.parse_args(arguments)
    since_s = time.monotonic()
    faults: Counter[str] = Counter()
    seeds = sessions = requests = failures = 0
    for outcome in outcomes(range(options.first_seed, options.first_seed + options.seeds), options.jobs, options.bug):
        seeds += 1
        sessions += outcome.sessions
        requests += outcome.requests
        faults += outcome.faults
        if options.digests:
            print(f"seed {outcome.seed}: {outcome.events} events, {outcome.digest}")
        if outcome.violation:
            failures += 1
            if failures <= SEEDS_TOLD_MAX:
                tell(outcome)
    took_s = time.monotonic() - since_s
    kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
    held = "all hold" if not failures else f"{failures} DO NOT HOLD"
    print(
        f"{seeds} seeds, {held}: {requests} requests in {sessions} sessions; {faults.total()} faults ({kinds}); "
        f"{took_s:.1f} s, {seeds / took_s:.1f} seeds/s"
    )
    return 1 if failures else 0


def tell(outcome: Outcome) -> None:
    """One line that repeats the seed, then its story."""
    print(f"seed {outcome.seed} fails: make simulate SEEDS=1 FIRST_SEED={outcome.seed}")
    print(f"    {outcome.violation}")
    for line in outcome.story:
        print(f"    {line}")


if __name__ == "__main__":
    sys.exit(main())
