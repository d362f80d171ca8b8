"""What Python takes of a step: the real stepper over a model that takes no time.

usage: python benchmarks/step_overhead.py [--slots 1,8,64] [--steps N] [--repeats N] [--vocab N] [--json]

Greedy requests that never end, in batches as they are shaped for a GPU. The figure is processor time of the stepping
thread for a step, in microseconds: the median of the repeats, smallest to largest. `device`: the device finds the
largest logits; `host`: rows of logits are looked at here, as where a model is split by tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.requests import Request, Sampling
from workers.backlog import Backlog
from workers.meter import Meter
from workers.protocol import Job
from workers.seating import Decoder
from workers.shape import PASS_TOKENS_GPU, PATIENCE_GPU, Shape
from workers.shortlist import Shortlist
from workers.slots import Ints, Places
from workers.stepper import Stepper, Vocabulary
from workers.task import Lane, Task
from workers.text import PieceTable

PROMPT_TOKENS, BATCH_TOKENS, WARM_UP = 128, 2048, 100
SHAPE = Shape(steady=True, pad_tokens=PASS_TOKENS_GPU, moves=True, patience=PATIENCE_GPU, keeps=True)


class NoModel(Decoder):
    """Every pass is over at once, and the same tokens come out of each."""

    def __init__(self, slots: int, vocab_tokens: int, chooses: bool) -> None:
        self.batch_tokens, self.asynchronous = BATCH_TOKENS, SHAPE.steady
        self.token, self.pos, self.seq = (np.zeros(BATCH_TOKENS, np.int32) for _ in range(3))
        self.wanted = np.zeros(BATCH_TOKENS, np.int8)
        self._best: Ints | None = np.full(slots, 5, np.int32) if chooses else None
        shape = (slots, vocab_tokens if not chooses else 1)
        self._logits = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def decode(self, rows: int) -> int:
        return 0

    def want_lists(self, wanted: bool, temperature: float = 0.0) -> None:
        pass

    def best(self, rows: int) -> Ints | None:
        return None if self._best is None else self._best[:rows]

    def shortlist(self, rows: int) -> Shortlist | None:
        return None

    def logits(self, rows: int, places: Places | None = None) -> npt.NDArray[np.float32]:
        return self._logits[:rows]

    def forget(self, seq: int, first: int = 0) -> None:
        pass

    def copy(self, source: int, target: int, length: int) -> None:
        pass

    def clear(self) -> None:
        pass


def step_us(slots: int, chooses: bool, steps: int, vocab_tokens: int) -> float:
    """Processor time of a step in microseconds."""
    backlog, total = Backlog(), WARM_UP + steps
    pieces = PieceTable(vocab_tokens, lambda _: b"x", lambda _: "x")
    stepper = Stepper(
        backlog.open(Lane.GENERATE), NoModel(slots, vocab_tokens, chooses), slots, PROMPT_TOKENS + total + 2,
        vocabulary=Vocabulary(np.zeros(vocab_tokens, np.bool_), pieces), backlog=backlog,
        meter=Meter(lambda _: None, time.monotonic()), send=lambda _: None, shape=SHAPE,
    )  # fmt: skip
    for key in range(slots):
        sampling = Sampling(max_tokens=total + 1, temperature=0.0, ignore_eos=True)
        request = Request(custom_id=str(key), kind="completion", prompt="", sampling=sampling)
        task = Task(Job(key, 0, False, request), 0.0)
        backlog.add([task])
        backlog.next_raw()
        task.prompt, task.limit = np.arange(PROMPT_TOKENS, dtype=np.int32), total + 1
        backlog.ready(task)
    for _ in range(WARM_UP):
        stepper.step()
    began_s = time.thread_time()
    for _ in range(steps):
        stepper.step()
    return 1e6 * (time.thread_time() - began_s) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what Python takes of a step.")
    parser.add_argument("--slots", default="1,8,64")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    rows = []
    for slots in map(int, chosen.slots.split(",")):
        for where in ("device", "host"):
            found = [step_us(slots, where == "device", chosen.steps, chosen.vocab) for _ in range(chosen.repeats)]
            rows.append({"slots": slots, "chosen_by": where, "us": statistics.median(found), "us_min": min(found),
                         "us_max": max(found)})  # fmt: skip
    if chosen.json:
        print(json.dumps(rows))
        return
    print(f"{'slots':>5} {'chosen by':10} {'us a step':>10}")
    for row in rows:
        print(
            f"{row['slots']:>5} {row['chosen_by']:10} {row['us']:>10.0f}  ({row['us_min']:.0f} to {row['us_max']:.0f})"
        )


if __name__ == "__main__":
    main()
