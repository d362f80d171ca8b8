"""What one long request costs many short ones: total tokens a second with it, over those of the short ones alone.

usage: python benchmarks/long_among_short.py MODEL [--requests N] [--prompt-tokens N] [--output-tokens N]
           [--long-tokens N] [--place SHARE] [--slots N] [--threads N] [--device auto|gpu|cpu] [--repeats N]
           [--one-size]

Each repeat starts an engine for the short requests alone, one for the long one, and one for all, sized by what fits;
with `--one-size` also one whose slots are all sized for the long one. Loading is in no figure. The long request is
handed in at its place in the line (0: first, 1: last). What its own tokens cost is no loss: 'one after the other' has
the times of both alone over the time of both together. On a busy machine processor time says more than the clock; with
`--threads 1` no thread of the engine waits for another.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import msgspec
import psutil

from coordinator.bench_engine import BenchEngine, first_engine
from coordinator.bench_load import Load
from coordinator.config import JobConfig
from coordinator.setup import prepare
from scheduling.lengths import Lengths
from scheduling.modelsize import CELLS_TOGETHER
from workers.protocol import EngineConfig, Job

SHORT, LONG, BOTH, ONE_SIZE = "short ones", "the long one", "both", "both, one size"
WARM_UP = 1 << 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--long-tokens", type=int, default=16_000)
    parser.add_argument("--place", type=float, default=0.0)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-size", action="store_true")
    return parser.parse_args()


def lengths_of(options: argparse.Namespace, *, with_long: bool) -> Lengths:
    """What a look-ahead would find."""
    short = options.prompt_tokens + options.output_tokens
    counts = {-(-short // CELLS_TOGETHER): options.requests}
    if not with_long:
        return Lengths(options.requests, counts, short, whole=True)
    counts[-(-options.long_tokens // CELLS_TOGETHER)] = 1
    return Lengths(options.requests + 1, counts, options.long_tokens, whole=True)


def jobs_of(options: argparse.Namespace, load: Load, vocab_tokens: int, repeat: int) -> dict[str, list[Job]]:
    """What is asked in turn, in the order in which it is handed in."""
    short = load.jobs(vocab_tokens, repeat)
    prompt = [(31 * place + repeat) % vocab_tokens for place in range(options.long_tokens - options.output_tokens)]
    long = load.job(len(short), prompt, options.output_tokens)
    place = round(options.place * len(short))
    return {SHORT: short, LONG: [long], BOTH: [*short[:place], long, *short[place:]]}


@dataclass(frozen=True)
class Measured:
    """What one engine took for one kind of jobs."""

    tokens_per_s: float
    wall_s: float
    processor_s: float


def measure(engine: EngineConfig, options: argparse.Namespace, load: Load, repeat: int, kind: str) -> Measured:
    """`kind` of the jobs, by an engine of their own."""
    bench = BenchEngine(engine)
    try:
        vocab_tokens = bench.loaded.vocab_tokens
        bench.run(load.jobs(vocab_tokens, WARM_UP)[:8])
        process = psutil.Process(bench.pid)
        before = process.cpu_times()
        done = bench.run(jobs_of(options, load, vocab_tokens, repeat)[kind])
        after = process.cpu_times()
        processor_s = after.user + after.system - before.user - before.system
        return Measured(done.total_tokens_per_s, done.wall_s, processor_s)
    finally:
        bench.close()


def show(name: str, values: list[float], form: str) -> None:
    spread = f"{min(values):{form}} to {max(values):{form}}"
    print(f"{name:>40} {statistics.median(values):>10{form}}  ({spread})")


def main() -> None:
    options = parse()
    config = JobConfig(
        model=options.model, device=options.device, slots=options.slots or "auto", threads=options.threads
    )
    setup = prepare(config)
    if setup.problem is not None:
        raise SystemExit(str(setup.problem))
    load = Load(
        requests=options.requests, prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens,
        output_tokens_max=options.output_tokens,
    )  # fmt: skip
    alone = first_engine(setup, lengths_of(options, with_long=False))
    among = first_engine(setup, lengths_of(options, with_long=True))
    engines = {SHORT: alone, LONG: among, BOTH: among}
    if options.one_size:
        engines[ONE_SIZE] = msgspec.structs.replace(among, ctx_tokens=options.long_tokens, long_slots=0)
    found: dict[str, list[Measured]] = {kind: [] for kind in engines}
    for repeat in range(options.repeats):
        for kind, engine in engines.items():
            found[kind].append(measure(engine, options, load, repeat, BOTH if kind == ONE_SIZE else kind))
    sizes = f"{options.prompt_tokens} + {options.output_tokens} tokens"
    print(f"{options.requests} requests of {sizes}, one of {options.long_tokens:,} in all; medians")
    for kind, repeats in found.items():
        show(f"{kind}, tokens/s", [one.tokens_per_s for one in repeats], ",.0f")
    for kind in found:
        if kind in (BOTH, ONE_SIZE):
            rows = list(zip(found[kind], found[SHORT], found[LONG], strict=True))
            speeds = [one.tokens_per_s / short.tokens_per_s for one, short, _ in rows]
            times = [(short.wall_s + long.wall_s) / one.wall_s for one, short, long in rows]
            show(f"{kind} / short ones alone", speeds, ".3f")
            show(f"{kind} / one after the other", times, ".3f")
            busy = [(short.processor_s + long.processor_s) / one.processor_s for one, short, long in rows]
            show("the same in processor time", busy, ".3f")


if __name__ == "__main__":
    main()
