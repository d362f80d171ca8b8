"""What choosing tokens costs a step, against greedy. `python benchmarks/sampling.py [--threads N] [--contexts 1,4]`

Each context is a thread that chooses for its own rows, all in one process, with `--threads` threads for each that
help, as in the engine. Logits are normal with a standard deviation of 8: peaked as a real model's are, where random
weights would give nearly flat ones. Columns: wall time of a step as each context sees it, processor time of a step,
and Python's share: the processor time of the same step with a vocabulary of 1,000 on one thread, where the arrays cost
little. The step keeps the interpreter's lock, which only one context can have, for about that long at most (handing
parts to the pool aside). `--json` prints the rows as JSON instead of a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.requests import Sampling
from workers.choosing import choose, largest
from workers.parameters import Parameters
from workers.sampling import RowSampler
from workers.threads import Threads

SCALE = 8.0
SMALL_VOCABULARY = 1000
HISTORY_TOKENS = 512
CASES = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(temperature=0.8),
    "top_p": Sampling(temperature=0.8, top_p=0.95),
    "min_p": Sampling(temperature=0.8, min_p=0.05),
    "top_p + min_p": Sampling(temperature=0.8, top_p=0.95, min_p=0.05),
    "top_k 40": Sampling(temperature=0.8, top_k=40),
    "top_k 40 + top_p": Sampling(temperature=0.8, top_k=40, top_p=0.95),
    "greedy + penalties": Sampling(temperature=0.0, repeat_penalty=1.1, presence_penalty=0.5),
    "min_p + penalties": Sampling(temperature=0.8, min_p=0.05, repeat_penalty=1.1, presence_penalty=0.5),
}


@dataclass(frozen=True)
class Row:
    """`over_greedy`: wall time over that of greedy with as many contexts."""

    case: str
    contexts: int
    wall_ms: float
    processor_ms: float
    python_ms: float
    over_greedy: float


class Context:
    """Logits, histories and samplers of one context."""

    def __init__(self, index: int, rows: int, vocab: int, threads: Threads) -> None:
        rng = np.random.default_rng(index)
        self._logits = (rng.standard_normal((rows, vocab), np.float32) * np.float32(SCALE)).astype(np.float32)
        self._history = rng.integers(0, vocab, (rows, HISTORY_TOKENS)).astype(np.int32)
        self._rows: npt.NDArray[np.int64] = np.arange(rows)
        self._vocab, self._threads = vocab, threads

    def steps(self, sampling: Sampling, count: int) -> None:
        """Penalties are taken off the same logits again and again; that does not change what it costs."""
        samplers = [RowSampler(sampling, seed, 0, self._vocab) for seed in range(self._rows.size)]
        for step in range(count):
            if samplers[0].plain:
                largest(self._logits, self._rows, self._threads)
            else:
                numbers = np.full(self._rows.size, step)
                asked = Parameters(samplers, numbers, self._vocab)
                choose(self._logits, self._rows, asked, self._history.__getitem__, self._threads)


def measure(contexts: list[Context], sampling: Sampling, count: int) -> tuple[float, float]:
    """(wall, processor) milliseconds of a step."""
    for context in contexts:
        context.steps(sampling, 1)
    threads = [threading.Thread(target=context.steps, args=(sampling, count)) for context in contexts]
    began_s, began_processor_s = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s, processor_s = time.perf_counter() - began_s, time.process_time() - began_processor_s
    return 1000 * wall_s / count, 1000 * processor_s / count / len(contexts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="for each context")
    parser.add_argument("--contexts", default="1,4")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    if not options.json:
        print(f"{options.rows} rows x {options.vocab:,}, {options.threads} threads a context, ms a step")
        print("contexts case                    wall  processor  Python's share  wall / greedy")
    for count in map(int, options.contexts.split(",")):
        # As in the engine: one pool, as many helpers for each context.
        pool = ThreadPoolExecutor(max(1, (options.threads - 1) * count))
        threads = Threads(pool, options.threads)
        contexts = [Context(index, options.rows, options.vocab, threads) for index in range(count)]
        small = [Context(0, options.rows, SMALL_VOCABULARY, Threads())]
        greedy_ms = 0.0
        for case, sampling in CASES.items():
            wall_ms, processor_ms = measure(contexts, sampling, options.steps)
            _, python_ms = measure(small, sampling, 10 * options.steps)
            greedy_ms = greedy_ms or wall_ms
            row = Row(case, count, wall_ms, processor_ms, python_ms, wall_ms / greedy_ms)
            found.append(row)
            if not options.json:
                print(
                    f"{row.contexts:8d} {row.case:20s} {row.wall_ms:7.2f} {row.processor_ms:10.2f}"
                    f" {row.python_ms:15.2f} {row.over_greedy:14.1f}",
                    flush=True,
                )
        pool.shutdown()
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
