"""How many texts an engine embeds a second, against `llama_cpp.Llama.embed` in the same run.

usage: python benchmarks/embeddings.py [MODEL] [--inputs N] [--tokens N] [--threads N] [--repeats N] [--json]

Without MODEL a random BERT with the shape of all-MiniLM-L6-v2 is made (6 layers, 384 wide, weights of 16 bits): what
weights say does not change how long they take. Texts are random words of two letters. Ours: each text is a request of
its own, all handed to the engine at once, the clock running to the last answer, tokenising included. The peer, in a
process of its own: a call a text, as it is mostly used, and one call with all texts and flash attention, which is its
best. Repeats alternate, medians count. Loading is in no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coordinator.bench_engine import BenchEngine
from scheduling.requests import Request
from tests.tiny_bert import MINILM, build_tiny_bert, words
from workers.protocol import EngineConfig, Job

CTX_TOKENS = 512

# Reads lists of texts, a line each, and answers with the seconds that each took.
PEER = """
import json, sys, time
import llama_cpp
job = json.loads(sys.stdin.readline())
model = llama_cpp.Llama(
    job["model"], n_ctx=job["ctx"], n_batch=job["ctx"], n_ubatch=job["ctx"], n_threads=job["threads"],
    n_threads_batch=job["threads"], flash_attn=job["lists"], embedding=True, n_gpu_layers=job["gpu_layers"],
    verbose=False,
)
for line in sys.stdin:
    texts = json.loads(line)
    began = time.monotonic()
    if job["lists"]:
        model.embed(texts, normalize=True)
    else:
        for text in texts:
            model.embed(text, normalize=True)
    print(time.monotonic() - began, flush=True)
"""


class Peer:
    """`llama_cpp.Llama` for embeddings in a process of its own."""

    def __init__(self, model: str, threads: int, gpu_layers: int, *, lists: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._tell(
            {"model": model, "ctx": CTX_TOKENS, "threads": threads, "gpu_layers": gpu_layers, "lists": lists}
        )  # fmt: skip

    def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def run(self, texts: list[str]) -> float:
        """Seconds that it takes."""
        assert self._process.stdout is not None
        self._tell(texts)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def run_ours(engine: BenchEngine, texts: list[str]) -> float:
    jobs = [
        Job(key, 0, False, Request(custom_id=str(key), kind="embedding", inputs=(text,)))
        for key, text in enumerate(texts)
    ]
    began_s = time.monotonic()
    engine.run(jobs)
    return time.monotonic() - began_s


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(
        model=model, slots=1, ctx_tokens=CTX_TOKENS, threads=options.threads, ubatch_tokens=options.ubatch,
        gpu_layers=options.gpu_layers, lanes_at_start=("embed",),
    )  # fmt: skip
    engine = BenchEngine(config)
    one_by_one = Peer(model, options.threads, options.gpu_layers, lists=False)
    in_lists = Peer(model, options.threads, options.gpu_layers, lists=True)
    runs = {
        "ours": lambda texts: run_ours(engine, texts),
        "peer_one_by_one": one_by_one.run,
        "peer_in_lists": in_lists.run,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    random = np.random.default_rng(0)
    for repeat in range(options.repeats + 1):
        count = options.inputs if repeat else 8  # the first one warms up
        texts = [words(random, options.tokens - 2) for _ in range(count)]
        for name, run in runs.items():
            took_s = run(texts)
            if repeat:
                seconds[name].append(took_s)
    engine.close()
    one_by_one.close()
    in_lists.close()
    rates = {name: [options.inputs / one for one in took] for name, took in seconds.items()}
    medians = {f"{name}_inputs_per_s": statistics.median(values) for name, values in rates.items()}
    ours, best = medians["ours_inputs_per_s"], medians["peer_in_lists_inputs_per_s"]
    return {
        "model": engine.loaded.model_desc, "backend": engine.loaded.backend, "inputs": options.inputs,
        "tokens_each": options.tokens, **medians, "ours_tokens_per_s": ours * options.tokens,
        "ratio_to_one_by_one": ours / medians["peer_one_by_one_inputs_per_s"],
        "ratio_to_lists": ours / best, "all_inputs_per_s": rates,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16, help="of each input, the two around it included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = f"{folder}/random-minilm.gguf"
            build_tiny_bert(Path(model), shape=MINILM)
        figures = measure(model, options)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{figures['model']} on {figures['backend']}, {options.inputs} inputs of {options.tokens} tokens, medians")
    for name, title in (("ours", "ours"), ("peer_one_by_one", "a call a text"), ("peer_in_lists", "one call for all")):
        values = figures["all_inputs_per_s"][name]
        print(f"{title:18} {figures[f'{name}_inputs_per_s']:9.1f} inputs/s   ({min(values):.1f} to {max(values):.1f})")
    print(f"ratio: {figures['ratio_to_one_by_one']:.2f} to one by one, {figures['ratio_to_lists']:.2f} to its best")


if __name__ == "__main__":
    main()
