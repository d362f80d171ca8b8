"""What one long request costs many short ones: total tokens a second with it, over those of the short ones alone.

usage: python benchmarks/long_among_short.py MODEL [--requests N] [--prompt-tokens N] [--output-tokens N]
           [--long-tokens N] [--place SHARE] [--slots N] [--device auto|gpu|cpu] [--repeats N] [--one-size]

Each repeat starts an engine for the short requests alone, then one for the same requests with a long one among them, as
fitting sizes them; with `--one-size` also one whose slots are all sized for the long one. Loading is in no figure. The
long request is handed in at its place in the line (0: first, 1: last).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from coordinator.bench_engine import BenchEngine, engine_of
from coordinator.bench_load import Load
from coordinator.config import JobConfig
from coordinator.setup import Setup, prepare
from scheduling.lengths import Lengths
from scheduling.modelsize import CELLS_TOGETHER
from workers.protocol import Job

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


def jobs_of(options: argparse.Namespace, load: Load, vocab_tokens: int, repeat: int, *, with_long: bool) -> list[Job]:
    """The requests in the order in which they are handed in."""
    jobs = load.jobs(vocab_tokens, repeat)
    if with_long:
        size = options.long_tokens - options.output_tokens
        prompt = [(31 * place + repeat) % vocab_tokens for place in range(size)]
        jobs.insert(round(options.place * len(jobs)), load.job(len(jobs), prompt, options.output_tokens))
    return jobs


def speed(
    options: argparse.Namespace, setup: Setup, load: Load, repeat: int, *, with_long: bool, ctx: int | None
) -> float:
    """Total tokens a second."""
    config = JobConfig(
        model=options.model, device=options.device, slots=options.slots or "auto", ctx="auto" if ctx is None else ctx
    )
    bench = BenchEngine(engine_of(config, setup, lengths_of(options, with_long=with_long)))
    try:
        vocab_tokens = bench.loaded.vocab_tokens
        bench.run(load.jobs(vocab_tokens, WARM_UP)[:8])
        jobs = jobs_of(options, load, vocab_tokens, repeat, with_long=with_long)
        return bench.run(jobs).total_tokens_per_s
    finally:
        bench.close()


def show(name: str, speeds: Sequence[float], alone: Sequence[float]) -> None:
    ratios = [one / other for one, other in zip(speeds, alone, strict=True)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"{name:>22} {statistics.median(speeds):12,.0f} {statistics.median(ratios):8.3f}  ({spread})")


def main() -> None:
    options = parse()
    setup = prepare(JobConfig(model=options.model, device=options.device))
    if setup.problem is not None:
        raise SystemExit(str(setup.problem))
    load = Load(
        requests=options.requests, prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens,
        output_tokens_max=options.output_tokens,
    )  # fmt: skip
    kinds: dict[str, tuple[bool, int | None]] = {"short ones alone": (False, None), "with the long one": (True, None)}
    if options.one_size:
        kinds["all slots as long"] = (True, options.long_tokens)
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(options.repeats):
        for name, (with_long, ctx) in kinds.items():
            speeds[name].append(speed(options, setup, load, repeat, with_long=with_long, ctx=ctx))
    sizes = f"{options.prompt_tokens} + {options.output_tokens} tokens"
    print(f"{options.requests} requests of {sizes}, one of {options.long_tokens:,} in all")
    print(f"{'':>22} {'tokens/s':>12} {'ratio':>8}  (spread)")
    for name, found in speeds.items():
        show(name, found, speeds["short ones alone"])


if __name__ == "__main__":
    main()
