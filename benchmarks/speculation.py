"""Output tokens a second of one request at a time, with speculation and without, in turn.

usage: python benchmarks/speculation.py MODEL [--draft-model FILE] [--concurrency N] [--repeats N] [--json]

Two kinds of prompts: those whose answer repeats their text (copying, corrections, quoting, code), and questions of
examples/prompts.jsonl, whose answers do not. 'auto' is what llmpi does unless told otherwise: it drafts where that is
faster by what it measured. 'always' drafts as much as it can. 'never' is what both are compared with, each repeat with
the one beside it.

Random weights accept nothing and real text a lot, so only a real model's figures mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec

from coordinator.bench_engine import BenchEngine, Repeat, first_engine
from coordinator.config import JobConfig
from coordinator.setup import prepare
from scheduling.requests import Message, Request, Sampling, parse_request
from workers.protocol import EngineConfig, Job

EXAMPLES = Path(__file__).parent.parent / "examples" / "prompts.jsonl"
MODES = ("never", "auto", "always")
CTX_TOKENS = 1024

PASSAGE = (
    "The lighthouse at Cape Varden was built in 1847 by the engineer Tomas Lindqvist. It stands 38 metres high and its "
    "light can be seen from 24 nautical miles. In 1921 the old oil lamp was replaced by an electric one, and in 1985 "
    "the last keeper, Maria Solberg, left the tower. Today the building is a museum with 12,000 visitors a year."
)
CODE = """def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        subtotal += item.price * item.quantity
    tax = subtotal * tax_rate
    return subtotal + tax


def print_invoice(items, tax_rate):
    for item in items:
        print(item.name, item.quantity, item.price)
    print("Total:", total_price(items, tax_rate))
"""
REPEATING = (
    f"Repeat the following text word for word:\n\n{PASSAGE}",
    f"Correct the spelling of this text and write it again:\n\n{PASSAGE.replace('built', 'bilt')}",
    f"List every sentence of this text that contains a year, quoting it:\n\n{PASSAGE}",
    f"Summarise this text in two sentences:\n\n{PASSAGE}",
    f"Extract all names and years from this text as a list:\n\n{PASSAGE}",
    f"Copy this code exactly, without any change:\n\n```python\n{CODE}```",
    f"Rename the variable subtotal to amount and print the whole code again:\n\n```python\n{CODE}```",
    f"Add a docstring to each function and print the whole code again:\n\n```python\n{CODE}```",
)


def questions(count: int) -> list[str]:
    """The last message of the first `count` example prompts that are chats."""
    requests = [parse_request(line) for line in EXAMPLES.read_bytes().splitlines()]
    return [request.messages[-1].content for request in requests if request.messages][:count]


def jobs_of(prompts: tuple[str, ...] | list[str], tokens: int) -> list[Job]:
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    return [
        Job(key, 0, False, Request(
            custom_id=str(key), kind="chat", messages=(Message("user", text),), sampling=sampling
        ))
        for key, text in enumerate(prompts)
    ]  # fmt: skip


def engine_of(options: argparse.Namespace) -> EngineConfig:
    """One engine as a batch would start it, with as many slots as requests run at once."""
    config = JobConfig(
        model=options.model, slots=options.concurrency, contexts=1, ctx=CTX_TOKENS, threads=options.threads,
        device=options.device, draft_model=options.draft_model, draft_max=options.draft_max,
    )  # fmt: skip
    setup = prepare(config)
    if setup.problem is not None:
        sys.exit(str(setup.problem))
    return first_engine(setup)


def measure(engine: EngineConfig, kinds: dict[str, list[Job]], repeats: int) -> list[dict[str, Any]]:
    """A row of figures for each kind of prompts and mode."""
    engines = {mode: BenchEngine(msgspec.structs.replace(engine, speculate=mode)) for mode in MODES}
    found: dict[tuple[str, str], list[Repeat]] = {}
    try:
        for one in engines.values():
            one.run(next(iter(kinds.values()))[:2], engine.slots)
        for repeat in range(repeats):
            for kind, jobs in kinds.items():
                for mode in MODES if repeat % 2 == 0 else reversed(MODES):
                    found.setdefault((kind, mode), []).append(engines[mode].run(jobs, engine.slots))
                print(f"repeat {repeat + 1} of {repeats}: {kind}", file=sys.stderr, flush=True)
    finally:
        for one in engines.values():
            one.close()
    return [row(kind, mode, found[kind, mode], found[kind, "never"]) for kind in kinds for mode in MODES]


def row(kind: str, mode: str, ours: list[Repeat], plain: list[Repeat]) -> dict[str, Any]:
    speeds = [one.output_tokens / one.wall_s for one in ours]
    ratios = [speed * other.wall_s / other.output_tokens for speed, other in zip(speeds, plain, strict=True)]
    return {
        "prompts": kind, "speculate": mode, "output_tokens_per_s": statistics.median(speeds),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "output_tokens": ours[0].output_tokens, "steps": statistics.median(one.steps for one in ours),
        "drafted_tokens": statistics.median(one.drafted_tokens for one in ours),
        "accepted_tokens": statistics.median(one.accepted_tokens for one in ours),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft-model")
    parser.add_argument("--draft-max", type=int, default=15)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kinds = {
        "repeating": jobs_of(REPEATING, options.output_tokens),
        "questions": jobs_of(questions(len(REPEATING)), options.output_tokens),
    }
    found = measure(engine_of(options), kinds, options.repeats)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{'prompts':10} {'speculate':10} {'tokens/s':>9} {'ratio':>6} {'(from, to)':>13} {'steps':>6} "
        f"{'drafted':>8} {'accepted':>8}"
    )
    for one in found:
        spread = f"({one['ratio_min']:.2f}, {one['ratio_max']:.2f})"
        print(
            f"{one['prompts']:10} {one['speculate']:10} {one['output_tokens_per_s']:9.1f} {one['ratio']:6.2f} "
            f"{spread:>13} {one['steps']:6.0f} {one['drafted_tokens']:8.0f} {one['accepted_tokens']:8.0f}"
        )


if __name__ == "__main__":
    main()
