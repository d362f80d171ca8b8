"""What grammars and schemas cost. `python benchmarks/constrained.py MODEL [--slots N] [--requests N] [--json]`

Two tables. First the engine as a whole: the same requests, all of them held to something or none, in turn, so that a
machine that slows down slows all; the texts cannot end before their limit, so all cases make as many tokens. Then the
parts for one row of one step, in microseconds: the mask, forbidding what is not in it, telling the matcher; and what
llama.cpp's own grammar sampler takes to do all three, where the constraint is a grammar. Tokens there are drawn evenly
from what is allowed, so both walk the same texts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coordinator.bench_engine import BenchEngine
from coordinator.bench_load import Load
from scheduling.constraints import Constraint, of_grammar, of_schema
from scheduling.requests import Sampling
from workers.constraints import Constraints
from workers.llama import LlamaModel
from workers.llama_backend import start_backend
from workers.protocol import EngineConfig, Job

RECORDS = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "kind": {"enum": ["river", "lake", "sea"]},
            "depth": {"type": "integer", "minimum": 0, "maximum": 9999},
            "salt": {"type": "boolean"},
        },
        "required": ["name", "kind", "depth", "salt"],
        "additionalProperties": False,
    },
}
JSON_GRAMMAR = r"""
root   ::= "[" ws object ("," ws object){39,} "]"
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws string ":" ws value ("," ws string ":" ws value)* "}" ws
array  ::= "[" ws value ("," ws value)* "]" ws
string ::= "\"" ([^"\\\x00-\x1F] | "\\" ["\\bfnrt])* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
CASES: dict[str, Constraint | None] = {
    "nothing": None,
    "a schema": of_schema(RECORDS, "schema"),
    "a long string": of_schema({"type": "string", "minLength": 4000}, "schema"),
    "a list, as a grammar": of_grammar('root ::= ("- " [^\\r\\n]{1,20} "\\n"){40,}'),
    "JSON, as a grammar": of_grammar(JSON_GRAMMAR),
}
TEMPERATURES = (0.0, 0.8)
STRAY = 64
"""The peer lets control tokens pass by their names, and bytes that begin no character of UTF-8, but not the byte 0."""


# ---------------------------------------------------------------- the engine


def held(job: Job, constraint: Constraint | None, temperature: float) -> Job:
    sampling = msgspec.structs.replace(
        job.request.sampling, constraint=constraint, ignore_eos=constraint is None, temperature=temperature
    )
    return msgspec.structs.replace(job, request=msgspec.structs.replace(job.request, sampling=sampling))


def engine_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    load = Load(
        requests=options.requests,
        prompt_tokens=16,
        output_tokens=options.output_tokens,
        output_tokens_max=options.output_tokens,
        sampling=Sampling(),
    )
    bench = BenchEngine(
        EngineConfig(
            model=options.model,
            slots=options.slots,
            ctx_tokens=256,
            threads=options.threads,
            sampling_threads=options.threads,
            gpu_layers=options.gpu_layers,
        )
    )
    speeds: dict[tuple[str, float], list[float]] = {}
    samples: dict[tuple[str, float], list[float]] = {}
    try:
        for repeat in range(-1, options.repeats):
            jobs = load.jobs(bench.loaded.vocab_tokens, max(repeat, 0))
            for temperature in TEMPERATURES:
                for case, constraint in CASES.items():
                    some = jobs if repeat >= 0 else jobs[: options.slots]
                    done = bench.run([held(job, constraint, temperature) for job in some])
                    assert done.output_tokens == len(some) * options.output_tokens, (case, done.output_tokens)
                    if repeat >= 0:  # the one before warms up
                        speeds.setdefault((case, temperature), []).append(done.output_tokens / done.wall_s)
                        samples.setdefault((case, temperature), []).append(1e3 * done.sample_s / done.steps)
    finally:
        bench.close()
    rows = []
    for (case, temperature), found in speeds.items():
        free = speeds["nothing", temperature]
        ratios = [one / other for one, other in zip(found, free, strict=True)]
        rows.append(
            {
                "case": case,
                "temperature": temperature,
                "output_tokens_per_s": statistics.median(found),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "choose_ms_a_step": statistics.median(samples[case, temperature]),
            }
        )
    return rows


# ---------------------------------------------------------------- one row


class Peer:
    """llama.cpp's grammar sampler over all tokens of a row."""

    def __init__(self, model: LlamaModel, grammar: str) -> None:
        vocab = llama_cpp.llama_model_get_vocab(model.handle)
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        self._data = (llama_cpp.llama_token_data * model.vocab_tokens)()
        self._view = np.ctypeslib.as_array(self._data)
        self._array = llama_cpp.llama_token_data_array(self._data, model.vocab_tokens, -1, False)

    def apply(self) -> None:
        self._view["id"] = np.arange(self._view.size)
        self._view["logit"] = 0.0
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(self._array))

    def allows(self) -> int:
        return int(np.count_nonzero(self._view["logit"] > -np.inf))

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token)


def microseconds(began_s: float) -> float:
    return 1e6 * (time.perf_counter() - began_s)


def row_figures(options: argparse.Namespace) -> list[dict[str, Any]]:
    start_backend()
    model = LlamaModel(EngineConfig(model=options.model, slots=1, gpu_layers=0))
    ends = np.flatnonzero(model.eog_table()).tolist()
    constraints = Constraints(model.vocab_tokens, model.piece, ends, 1)
    rows = []
    for case, constraint in CASES.items():
        if constraint is None:
            continue
        began_s = time.perf_counter()
        matcher = constraints.grammar(constraint).start()
        parts: dict[str, list[float]] = {"compile": [microseconds(began_s)]}
        peer = Peer(model, constraint.text) if constraint.kind == "grammar" else None
        random = np.random.default_rng(0)
        for _ in range(options.steps):
            began_s = time.perf_counter()
            allowed = constraints.allowed([matcher])
            parts.setdefault("mask", []).append(microseconds(began_s))
            assert allowed is not None
            logits = np.zeros((1, model.vocab_tokens), np.float32)
            began_s = time.perf_counter()
            allowed.forbid_others(logits, np.array([0]))
            parts.setdefault("forbid", []).append(microseconds(began_s))
            open_ = np.setdiff1d(np.flatnonzero(logits[0] > -np.inf), ends)
            token = int(random.choice(open_))
            began_s = time.perf_counter()
            matcher.consume(token)
            parts.setdefault("consume", []).append(microseconds(began_s))
            if peer is not None:
                began_s = time.perf_counter()
                peer.apply()
                spent = microseconds(began_s)
                assert abs(peer.allows() - open_.size) <= STRAY, (case, peer.allows(), open_.size)
                began_s = time.perf_counter()
                peer.accept(token)
                parts.setdefault("llama.cpp", []).append(spent + microseconds(began_s))
        means = {f"{name}_us": statistics.fmean(found) for name, found in parts.items()}
        rows.append({"case": case} | means | {"mask_max_us": max(parts["mask"][1:])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, engine = row_figures(options), engine_rows(options) if options.repeats else []
    if options.json:
        print(json.dumps({"engine": engine, "row": rows}, indent=1))
        return
    print(f"{options.slots} slots, {options.requests} requests of 16 + {options.output_tokens} tokens, held to …")
    print("case                  temperature  output tokens/s   / nothing (of all repeats)  choosing, ms a step")
    for row in engine:
        print(
            f"{row['case']:22s}{row['temperature']:11.1f} {row['output_tokens_per_s']:16.1f}"
            f" {row['ratio']:11.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) {row['choose_ms_a_step']:18.2f}"
        )
    print(f"\none row, mean of {options.steps} steps, µs; compiled in ms")
    print("case                    mask  (most)  forbid  consume  llama.cpp  compiled")
    for row in rows:
        peer = f"{row['llama.cpp_us']:10,.0f}" if "llama.cpp_us" in row else f"{'-':>10s}"
        print(
            f"{row['case']:22s}{row['mask_us']:6.0f} {row['mask_max_us']:7.0f} {row['forbid_us']:7.0f}"
            f" {row['consume_us']:8.0f} {peer} {row['compile_us'] / 1e3:9.1f}"
        )


if __name__ == "__main__":
    main()
