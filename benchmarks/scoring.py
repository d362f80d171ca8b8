"""What scoring says against llama.cpp's logits, and what it gains by computing a context once.

usage: python benchmarks/scoring.py MODEL [--contexts 200] [--continuations 4] [--context-tokens 100]
                                          [--continuation-tokens 10] [--threads 2] [--repeats 3] [--json]

Equality: 20 contexts with a continuation each (random token ids), an engine of its own for each, against log-softmax in
64 bits of the logits that `llama_cpp` gives for the same batches; then all of them in one engine at once, where batches
have other shapes and llama.cpp's kernels round otherwise.

Speed: `--contexts` x `--continuations` in one engine, (a) as `continuations` of one request for each context, (b) as a
request for each pair with echo, one after another, as evaluations send them, (c) the same in an order in which no
neighbours share anything, of which no more is kept than fits into the cells. Tokens that are scored (all pairs'
contexts and continuations, as if none were shared) a second, and tokens that were computed. The order of (a) to (c) is
turned with each repeat; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scheduling.errors import EngineError
from scheduling.requests import Request, Sampling
from workers.protocol import Answer, EngineConfig, EngineFailed, Frame, Job, Stats
from workers.supervisor import EngineProcess

CTX_TOKENS = 512
CHECKED = 20

REFERENCE = """
import json, sys
import llama_cpp, numpy
job = json.load(sys.stdin)
model = llama_cpp.Llama(
    job["model"], n_ctx=job["ctx"], n_batch=job["ctx"], n_ubatch=job["ctx"], n_threads=job["threads"],
    n_threads_batch=job["threads"], flash_attn=False, n_gpu_layers=0, logits_all=True, verbose=False,
)
def rows(tokens, past, every):
    model._batch.set_batch(batch=tokens, n_past=past, logits_all=every)
    model._ctx.decode(model._batch)
    count = len(tokens) if every else 1
    logits = numpy.ctypeslib.as_array(model._ctx.get_logits(), (count, model.n_vocab())).astype(numpy.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
found = []
for context, continuation in job["pairs"]:
    model._ctx.kv_cache_clear()
    known = numpy.concatenate([rows(context, 0, False), rows(continuation[:-1], len(context), True)])
    found.append(known[numpy.arange(len(continuation)), continuation].tolist())
json.dump(found, sys.stdout)
"""

Tokens = list[int]
Pair = tuple[Tokens, Tokens]


class Engine:
    """An engine process, and how many tokens it has computed."""

    def __init__(self, model: str, threads: int) -> None:
        self._engine = EngineProcess(
            EngineConfig(
                model=model, slots=32, ctx_tokens=CTX_TOKENS, batch_tokens=CTX_TOKENS, ubatch_tokens=CTX_TOKENS,
                threads=threads, sampling_threads=threads, gpu_layers=0, flash_attention=False,
            )
        )  # fmt: skip
        self.computed = 0

    def ask(self, requests: list[Request]) -> tuple[list[Answer], float]:
        """Answers in the order of `requests`, and the seconds from handing over to the last one."""
        began_s = time.perf_counter()
        self._engine.submit([Job(key, 0, False, request) for key, request in enumerate(requests)])
        answers: dict[int, Answer] = {}
        while len(answers) < len(requests):
            self._hear(answers)
            time.sleep(0.001)
        return [answers[key] for key in range(len(requests))], time.perf_counter() - began_s

    def _hear(self, answers: dict[int, Answer]) -> None:
        for frame in self._engine.poll():
            if isinstance(frame, EngineFailed):
                raise EngineError(frame.reason)
            if isinstance(frame, Frame):
                answers.update({answer.key: answer for answer in frame.finished})
            if isinstance(frame, Stats):
                self.computed += frame.prompt_tokens
        if not self._engine.alive:
            raise EngineError(self._engine.exit_reason())

    def close(self) -> None:
        self._engine.close(5.0)
        self._hear_rest()

    def _hear_rest(self) -> None:
        self.computed += sum(frame.prompt_tokens for frame in self._engine.poll() if isinstance(frame, Stats))


def together(context: Tokens, continuations: list[Tokens]) -> Request:
    return Request(
        custom_id="", kind="completion", prompt=tuple(context), logprobs=0,
        continuations=tuple(tuple(tokens) for tokens in continuations), sampling=Sampling(max_tokens=0),
    )  # fmt: skip


def apart(tokens: Tokens) -> Request:
    """A pair as lm-evaluation-harness sends it, but for the token more that it does not use."""
    return Request(
        custom_id="", kind="completion", prompt=tuple(tokens), logprobs=1, echo=True, sampling=Sampling(max_tokens=0)
    )


def logprobs_of(answer: Answer) -> Any:
    packed = answer.choices[0].logprobs
    if packed is None:
        raise EngineError(answer.error or "an answer without log-probabilities")
    return np.frombuffer(packed.logprobs, np.float32).astype(np.float64)


def equality(model: str, pairs: list[Pair], threads: int) -> dict[str, float]:
    """Differences of each token's log-probability to the reference, alone and with the others."""
    job = {"model": model, "ctx": CTX_TOKENS, "threads": threads, "pairs": pairs}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    expected = [np.array(one) for one in json.loads(done.stdout)]
    requests = [together(context, [continuation]) for context, continuation in pairs]
    alone = []
    for request, wanted in zip(requests, expected, strict=True):
        engine = Engine(model, threads)
        (answer,), _ = engine.ask([request])
        engine.close()
        alone.append(np.abs(logprobs_of(answer) - wanted))
    engine = Engine(model, threads)
    answers, _ = engine.ask(requests)
    engine.close()
    crowd = [np.abs(logprobs_of(answer) - wanted) for answer, wanted in zip(answers, expected, strict=True)]
    return {
        "tokens": sum(one.size for one in expected),
        "alone_max": float(np.concatenate(alone).max()),
        "together_median": float(np.median(np.concatenate(crowd))),
        "together_max": float(np.concatenate(crowd).max()),
    }


def speed(model: str, ways: dict[str, list[Request]], tokens: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each way: tokens scored a second and tokens computed, medians over the repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, int] = {}
    names = list(ways)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            engine = Engine(model, threads)
            engine.ask([apart([1, 2, 3])])  # loaded, and the scoring context opened
            _, took_s = engine.ask(ways[name])
            engine.close()
            seconds[name].append(took_s)
            computed[name] = engine.computed
    return [
        {
            "way": name, "requests": len(ways[name]), "computed_tokens": computed[name],
            "scored_tokens_per_s": tokens / statistics.median(seconds[name]),
            "spread_s": [min(seconds[name]), max(seconds[name])],
        }
        for name in names
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, default=200)
    parser.add_argument("--continuations", type=int, default=4)
    parser.add_argument("--context-tokens", type=int, default=100)
    parser.add_argument("--continuation-tokens", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random = np.random.default_rng(0)

    def drawn(count: int) -> Tokens:
        return [int(token) for token in random.integers(1_000, 40_000, count)]

    work = [
        (drawn(options.context_tokens), [drawn(options.continuation_tokens) for _ in range(options.continuations)])
        for _ in range(options.contexts)
    ]
    equal = equality(options.model, [(context, rest[0]) for context, rest in work[:CHECKED]], options.threads)
    pairs = [context + tokens for context, rest in work for tokens in rest]
    ways = {
        "a request for each context": [together(context, rest) for context, rest in work],
        "a request for each pair": [apart(tokens) for tokens in pairs],
        "the same, neighbours apart": [apart(pairs[k]) for j in range(options.continuations)
                                       for k in range(j, len(pairs), options.continuations)],
    }  # fmt: skip
    rows = speed(options.model, ways, sum(map(len, pairs)), options.threads, options.repeats)
    if options.json:
        print(json.dumps({"equality": equal, "speed": rows}))
        return
    print(
        f"{equal['tokens']:.0f} tokens; largest difference to the logits {equal['alone_max']:.1e} alone, "
        f"{equal['together_max']:.1e} (median {equal['together_median']:.1e}) with others"
    )
    print(f"{'way':28} {'requests':>8} {'computed':>9} {'scored tokens/s':>16}")
    for row in rows:
        print(f"{row['way']:28} {row['requests']:8} {row['computed_tokens']:9} {row['scored_tokens_per_s']:16.0f}")


if __name__ == "__main__":
    main()
