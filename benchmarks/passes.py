"""What a decode step costs from several contexts at once, with tokens chosen on the host or on the GPU.

usage: python benchmarks/passes.py MODEL [--layouts 1x128,2x64,4x32] [--read-every N] [--steps N] [--json]

Each context is a thread that gives every one of its sequences a token, step after step, as the engine does, without any
of the engine around it. `host`: all logits are fetched, numpy finds the largest. `device`: the GPU finds them. `lists`:
the GPU lists the likeliest tokens too. With --read-every each context reads four prompts of 127 tokens once in so many
steps. `call`: what `llama_decode` takes to return; `wait`: until tokens are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.llama import LlamaModel
from workers.llama_backend import gpu_names, start_backend
from workers.llama_contexts import LlamaContext
from workers.protocol import EngineConfig

PROMPT_TOKENS = 127
BATCH_TOKENS = 2048
PROMPTS_AT_ONCE = 4
WARM_STEPS = 10
WAYS = ("host", "device", "lists")


@dataclass(frozen=True)
class Row:
    """Milliseconds: a step of all contexts together, and medians of its parts as one context sees them."""

    contexts: int
    sequences: int
    choose: str
    step_ms: float
    call_ms: float
    wait_ms: float
    tokens_per_s: float


class Worker:
    """One context and its thread."""

    def __init__(self, context: LlamaContext, sequences: int, lists: bool, read_every: int) -> None:
        self.context, self.sequences, self.lists, self.read_every = context, sequences, lists, read_every
        self.length = np.full(sequences, PROMPT_TOKENS)
        self.call_s: list[float] = []
        self.wait_s: list[float] = []

    def read(self, ids: npt.NDArray[np.int64]) -> None:
        context, rows = self.context, ids.size * PROMPT_TOKENS
        for sequence in ids.tolist():
            context.forget(sequence)
        context.seq[:rows] = np.repeat(ids, PROMPT_TOKENS)
        context.pos[:rows] = np.tile(np.arange(PROMPT_TOKENS), ids.size)
        context.token[:rows] = np.arange(rows) % 20_000 + 5
        context.wanted[:rows] = 0
        if context.decode(rows):
            raise SystemExit("llama_decode failed")
        self.length[ids] = PROMPT_TOKENS

    def run(self, steps: int, begin: threading.Barrier, end: threading.Barrier) -> None:
        context, count = self.context, self.sequences
        most = BATCH_TOKENS // PROMPT_TOKENS
        for first in range(0, count, most):
            self.read(np.arange(first, min(count, first + most)))
        for step in range(-WARM_STEPS, steps):
            if not step:
                self.call_s.clear()
                self.wait_s.clear()
                begin.wait()
            if self.read_every and step % self.read_every == 0:
                first = step % max(1, count - PROMPTS_AT_ONCE)
                self.read(np.arange(first, min(count, first + PROMPTS_AT_ONCE)))
            context.want_lists(self.lists)
            context.seq[:count], context.pos[:count] = np.arange(count), self.length
            context.token[:count], context.wanted[:count] = np.arange(count) + 5 + step % 100, 1
            self.length += 1
            began_s = time.perf_counter()
            if context.decode(count):
                raise SystemExit("llama_decode failed")
            called_s = time.perf_counter()
            if context.best(count) is None:
                context.logits(count).argmax(axis=1)
            if self.lists:
                context.shortlist(count)
            self.call_s.append(called_s - began_s)
            self.wait_s.append(time.perf_counter() - called_s)
        end.wait()


def measure(model_path: str, contexts: int, sequences: int, choose: str, read_every: int, steps: int) -> Row:
    config = EngineConfig(
        model=model_path, slots=sequences, ctx_tokens=PROMPT_TOKENS + WARM_STEPS + steps + 1, batch_tokens=BATCH_TOKENS,
        ubatch_tokens=BATCH_TOKENS, sample_on="host" if choose == "host" else "device",
    )  # fmt: skip
    model = LlamaModel(config)
    made = [model.context(config, sequences, 4, whole_passes=True) for _ in range(contexts)]
    workers = [Worker(context, sequences, choose == "lists", read_every) for context in made]
    begin, end = threading.Barrier(contexts + 1), threading.Barrier(contexts + 1)
    threads = [threading.Thread(target=worker.run, args=(steps, begin, end), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    begin.wait()
    began_s = time.perf_counter()
    end.wait()
    wall_s = time.perf_counter() - began_s
    for thread in threads:
        thread.join()
    call_s = statistics.median(value for worker in workers for value in worker.call_s)
    wait_s = statistics.median(value for worker in workers for value in worker.wait_s)
    return Row(
        contexts, sequences, choose, 1e3 * wall_s / steps, 1e3 * call_s, 1e3 * wait_s,
        contexts * sequences * steps / wall_s,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decode steps of several contexts.")
    parser.add_argument("model")
    parser.add_argument("--layouts", default="1x128,2x64,4x32", help="contexts x sequences, comma-separated")
    parser.add_argument("--read-every", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    start_backend()
    if not chosen.json:
        print(" ".join(gpu_names()) or "CPU")
        print(f"{'layout':>8} {'choose':8} {'step ms':>8} {'call':>6} {'wait':>6} {'tokens/s':>8}")
    rows = []
    for layout in chosen.layouts.split(","):
        contexts, sequences = (int(number) for number in layout.split("x"))
        for choose in WAYS:
            row = measure(chosen.model, contexts, sequences, choose, chosen.read_every, chosen.steps)
            rows.append(row)
            if not chosen.json:
                print(
                    f"{layout:>8} {choose:8} {row.step_ms:8.2f} {row.call_ms:6.2f} {row.wait_ms:6.2f} "
                    f"{row.tokens_per_s:8,.0f}",
                    flush=True,
                )
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
