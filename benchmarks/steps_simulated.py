"""How the steps of a context are filled, in simulated time: the real stepper over passes that take what a GPU's do.

usage: python benchmarks/steps_simulated.py [--requests N] [--slots N] [--json]

Prompts of 128 tokens, output lengths all 128 or lognormal with that mean (sigma 1, at most 1,024). A pass that decodes
takes 1.2 ms and 68 us a row, one that reads 3.5 ms and 17 us a token: fitted to one of two contexts of a 1B on an H100.
Nothing else takes time, so what differs between rows of the table is what the rules for reading and waiting cost. With
`whole`, prompts are read as fast as batches hold them, whoever waits for a token meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.requests import Request, Sampling
from scheduling.servicetime import EXAMPLE
from workers import pace
from workers.backlog import Backlog
from workers.meter import Meter
from workers.protocol import Frame, Job
from workers.shape import PASS_TOKENS_GPU, PATIENCE_GPU, Shape
from workers.simulated import VOCAB, SimulatedContext
from workers.stepper import Stepper, Vocabulary
from workers.task import Lane, Task
from workers.text import PieceTable

PROMPT_TOKENS, CTX_TOKENS, BATCH_TOKENS = 128, 1280, 2048


class Passes(SimulatedContext):
    """Passes take simulated time."""

    def __init__(self, slots: int) -> None:
        self.now_s = 0.0
        self.read_passes = self.read_tokens = 0
        super().__init__(EXAMPLE, slots, CTX_TOKENS, BATCH_TOKENS, clock=lambda: self.now_s)

    def _pass_s(self, pos: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], chosen: int) -> float:
        rows = int(counts.sum())
        if chosen:
            return 1.2e-3 + 68e-6 * rows
        self.read_passes += 1
        self.read_tokens += rows
        return 3.5e-3 + 17e-6 * rows

    def _wait(self, pass_s: float, goes_on: bool) -> None:
        self.now_s += pass_s


@dataclass(frozen=True)
class Row:
    """`decoding`: slots that put out tokens, averaged over time. `tail_s`: from the last request's start to the end."""

    lengths: str
    reading: str
    total_tokens_per_s: float
    decoding: float
    tokens_a_reading_pass: float
    gaps_p99_over_p50: float
    tail_s: float


def lengths_of(kind: str, count: int) -> npt.NDArray[np.int64]:
    if kind == "fixed":
        return np.full(count, 128)
    drawn = np.random.default_rng(0).lognormal(np.log(128) - 0.5, 1.0, count)
    return np.clip(drawn, 1, 1024).astype(np.int64)


def run(kind: str, reading: str, count: int, slots: int) -> Row:
    passes, backlog, left = Passes(slots), Backlog(), count

    def send(frame: Frame) -> None:
        nonlocal left
        left -= len(frame.finished)

    shape = Shape(steady=True, pad_tokens=PASS_TOKENS_GPU, moves=True, patience=PATIENCE_GPU, keeps=True)
    stepper = Stepper(
        backlog.open(Lane.GENERATE), passes, slots, CTX_TOKENS,
        vocabulary=Vocabulary(np.zeros(VOCAB, np.bool_), PieceTable(VOCAB, lambda _: b"x", lambda _: "x")),
        backlog=backlog, meter=Meter(lambda _: None, 0.0), send=send, shape=shape, clock=lambda: passes.now_s,
    )  # fmt: skip
    lengths, rng = lengths_of(kind, count), np.random.default_rng(1)
    for key, length in enumerate(lengths.tolist()):
        sampling = Sampling(max_tokens=length, temperature=0.0, ignore_eos=True)
        task = Task(
            Job(key, 0, False, Request(custom_id=str(key), kind="completion", prompt="", sampling=sampling)), 0.0
        )
        backlog.add([task])
        backlog.next_raw()
        task.prompt, task.limit = rng.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32), length
        backlog.ready(task)
    gaps: list[float] = []
    weights: list[float] = []
    last_start_s = decoding_s = 0.0
    while left:
        began_s = passes.now_s
        waiting = backlog.available(0)
        stepper.step()
        took_s, decoding = passes.now_s - began_s, stepper._slots.decoding
        if waiting:
            last_start_s = passes.now_s
        gaps.append(took_s)
        weights.append(decoding)
        decoding_s += took_s * decoding
    order = np.argsort(gaps)
    share = np.cumsum(np.array(weights)[order]) / sum(weights)
    p50, p99 = (float(np.array(gaps)[order][np.searchsorted(share, q)]) for q in (0.5, 0.99))
    return Row(
        kind, reading, float(lengths.sum() + count * PROMPT_TOKENS) / passes.now_s, decoding_s / passes.now_s,
        passes.read_tokens / max(1, passes.read_passes), p99 / p50, passes.now_s - last_start_s,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the steps of one context in simulated time.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    paced: Callable[..., int] = pace.Pace.allowed
    rows = []
    for reading, rule in (("paced", paced), ("whole", lambda *_: BATCH_TOKENS)):
        pace.Pace.allowed = rule  # type: ignore[method-assign]
        rows += [run(kind, reading, chosen.requests, chosen.slots) for kind in ("fixed", "lognormal")]
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(
        f"{'lengths':10} {'reading':8} {'tokens/s':>9} {'decoding':>9} {'pass reads':>12} {'P99/P50':>8} {'tail s':>7}"
    )
    for row in rows:
        print(
            f"{row.lengths:10} {row.reading:8} {row.total_tokens_per_s:9,.0f} {row.decoding:9.1f} "
            f"{row.tokens_a_reading_pass:12.0f} {row.gaps_p99_over_p50:8.2f} {row.tail_s:7.2f}"
        )


if __name__ == "__main__":
    main()
