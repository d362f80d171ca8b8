"""What the engine is meant to reach, each figure against its peer in the same run, as one table.

usage: python benchmarks/engine_goals.py --model NAME=FILE [--model NAME=FILE ...] [--peers DIR] [--only ROW,...]
           [--repeats N] [--scale F] [-o FILE]

Rows are named as the table prints them (`--list`). A row runs `llmpi bench engine`, `llmpi batch` or a peer, and
divides. Goals hold for the full size (`--scale 1`) on a GPU and for the models that they name: `1b` (Llama-3.2-1B's
shape, Q8_0), `8b` (Llama-3.1-8B's, Q4_0), `1b-x8` (1b with logits of scale 8), `cpu` (SmolLM2-135M). A smaller scale
asks for fewer requests: it shows that a row works, not what it reaches. Results go to FILE as JSON lines, one a row,
as soon as they are known, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAIN = ("--no-speculate",)
"""Random weights soon repeat themselves, which is easily guessed: that would flatter us where few sequences run."""
LENGTHS = ("--prompt-tokens", 128, "--output-tokens", 128)
GIVEN_MIN = 0.9
"""Of the long prompts that were to come. With fewer, gaps are those of another load."""
SAMPLED = ("--temperature", 0.8, "--top-p", 0.95, "--min-p", 0.05)
Found = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What rows need to run: where things are, and how much of everything."""

    models: dict[str, Path]
    peers: Path | None
    repeats: int
    scale: float
    cached: dict[tuple[str, ...], Found] = field(default_factory=dict)
    """Figures of runs that several rows need."""

    def requests(self, full: int) -> int:
        return max(8, round(full * self.scale))

    def engine(self, model: str, *options: object) -> Found:
        """`llmpi bench engine` on `model`."""
        words = [sys.executable, "-m", "llmpi", "bench", "engine", "-m", str(self.models[model]), "--json"]
        words += ["--repeats", str(self.repeats), *map(str, options)]
        key = tuple(words)
        if key not in self.cached:
            self.cached[key] = run_json(words)
        return self.cached[key]

    def with_peers(self) -> tuple[object, ...]:
        if self.peers is None:
            raise MissingError("needs --peers")
        return ("--peers", self.peers)

    def server(self, model: str, at_once: int, *options: object) -> Found:
        """The best of llama-server's grid."""
        self.with_peers()
        words = [
            sys.executable, str(Path(__file__).parent / "llama_server.py"), str(self.models[model]), "--json",
            "--peers", str(self.peers), "--at-once", str(at_once), *map(str, options),
        ]  # fmt: skip
        return run_json(words)


class MissingError(Exception):
    """A row cannot be run here, and why."""


def run_json(words: list[str], env: dict[str, str] | None = None) -> Found:
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, env=env)
    if done.returncode:
        raise MissingError(f"failed with {done.returncode}: {' '.join(words)}")
    found: Found = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def ratio(over: Found, under: Found, name: str = "total_tokens_per_s") -> Found:
    """`over` against `under`, with the figures that it is made of."""
    found = {"ratio": over[name] / under[name], "ours": over[name], "peer": under[name]}
    for whose, figures in (("ours", over), ("peer", under)):
        found |= {f"{whose}_{end}": figures[f"{name}_{end}"] for end in ("min", "max") if f"{name}_{end}" in figures}
    return found


# ---------------------------------------------------------------- rows


def batched_128(bench: Bench, model: str) -> Found:
    found = bench.engine(model, "--slots", 128, "--requests", bench.requests(512), *LENGTHS, *bench.with_peers())
    return picked(found, found["peer_total_tokens_per_s"], found["ratio"])


def own_best(bench: Bench, model: str, sequences: int | None) -> Found:
    """Our own number of slots, against the peer at `sequences`, or at its best."""
    # Four times as many as there are slots at most.
    options = ("--requests", bench.requests(4096), *LENGTHS, *bench.with_peers())
    found = bench.engine(model, *options, "--peer-sequences", "32,64,128,256")
    by_sequences = {int(n): speed for n, speed in found["peer_total_tokens_per_s_by_sequences"].items()}
    peer = by_sequences[sequences] if sequences else max(by_sequences.values())
    return picked(found, peer, found["total_tokens_per_s"] / peer)


def picked(found: Found, peer: float, ratio_: float) -> Found:
    kept = (
        "slots",
        "contexts",
        "step_ms",
        "decode_ms",
        "sample_ms",
        "total_tokens_per_s_min",
        "total_tokens_per_s_max",
    )
    return {"ratio": ratio_, "ours": found["total_tokens_per_s"], "peer": peer} | {name: found[name] for name in kept}


def against_server(bench: Bench, model: str, at_once: int) -> Found:
    requests = bench.requests(max(32, 4 * at_once) if at_once < 128 else 512)
    ours = bench.engine(model, "--slots", at_once, "--requests", requests, *LENGTHS, *PLAIN)
    grid: tuple[object, ...] = ("--finalists", 1) if at_once >= 128 else ("--threads", 4, "--ubatch", 512)
    grid += ("--repeats", bench.repeats if at_once < 128 else 1)
    server = bench.server(model, at_once, "--requests", requests, *LENGTHS, *grid)
    found = ratio(ours, server["best"])
    return found | {"server": server["best"], "client_requests_per_s_max": server["client_requests_per_s_max"]}


def sampled(bench: Bench, model: str) -> Found:
    options = ("--slots", 128, "--requests", bench.requests(512), *LENGTHS)
    return ratio(bench.engine(model, *options, *SAMPLED), bench.engine(model, *options))


def lognormal(bench: Bench, model: str) -> Found:
    options = ("--slots", 128, *LENGTHS)
    fixed = bench.engine(model, *options, "--requests", bench.requests(512))
    drawn = bench.engine(model, *options, "--requests", bench.requests(2000), "--sigma", 1)
    return ratio(drawn, fixed)


def shared_prefix(bench: Bench, model: str) -> Found:
    options = (
        "--slots", 64, "--requests", bench.requests(256), "--prompt-tokens", 1032, "--shared-prefix", 1000,
        "--output-tokens", 16,
    )  # fmt: skip
    return ratio(bench.engine(model, *options), bench.engine(model, *options, "--no-prefix-reuse"))


def interrupted(bench: Bench, model: str, every_s: float = 1.0) -> Found:
    """P99 over median of the gaps between tokens, a long prompt coming in every so often: smaller is better.

    A long prompt that should come while the one before is still read is left out: then the load was not `given`. P99
    tells of steps that read where these are several in a hundred. A small model decodes many steps a second, so that
    one prompt a second is read in less than 5 % of them.
    """
    found = bench.engine(
        model, "--slots", 40, "--concurrency", 32, "--requests", bench.requests(64), "--prompt-tokens", 128,
        "--output-tokens", 512, "--ctx", 4352, "--interrupt-tokens", 4000, "--interrupt-every", every_s,
    )  # fmt: skip
    gaps = found["itl_p99_ms"] / found["itl_p50_ms"]
    kept = (
        "itl_p50_ms", "itl_p99_ms", "reading_steps_share", "total_tokens_per_s", "interrupts", "interrupts_left_out",
    )  # fmt: skip
    given = found["interrupts"] / max(1, found["interrupts"] + found["interrupts_left_out"])
    return {"ratio": gaps, "given": given} | {name: found[name] for name in kept}


def start(bench: Bench, model: str) -> Found:
    """Seconds from a worker's start to ready, less what llama-bench takes in all: smaller is better."""
    if bench.peers is None:
        raise MissingError("needs --peers")
    path = bench.models[model]
    words = [str(bench.peers / "llama-bench"), "-m", str(path), "-p", "1", "-n", "1", "-r", "1", "--no-warmup"]
    ours, theirs = [], []
    for _ in range(max(2, bench.repeats)):
        began_s = time.monotonic()
        subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        theirs.append(time.monotonic() - began_s)
        bench.cached.clear()
        ours.append(bench.engine(model, "--slots", 8, "--requests", 8, *LENGTHS, "--repeats", 1)["ready_s"])
    peer = statistics.median(theirs)
    return {"ratio": statistics.median(ours) - peer, "ours": statistics.median(ours), "peer": peer}


def two_gpus(bench: Bench, model: str) -> Found:
    """Output tokens/s of `mpirun -n 3 llmpi batch` on two GPUs against `mpirun -n 2` on one, in turn."""
    pairs = []
    for repeat in range(bench.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (batch_speed(bench, model, Path(folder), workers) for workers in (1, 2))
        pairs.append((two, one))
        print(f"repeat {repeat + 1}: {two:,.0f} / {one:,.0f} = {two / one:.3f}", file=sys.stderr, flush=True)
    ratios = [two / one for two, one in pairs]
    ours, peer = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    spread = {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return {"ratio": statistics.median(ratios), "ours": ours, "peer": peer} | spread


def batch_speed(bench: Bench, model: str, folder: Path, workers: int) -> float:
    # Many waves: which rank has one of them more is then a small part of it.
    lines = bench.requests(4096) * workers
    given = folder / f"in-{workers}.jsonl"
    with given.open("w") as file:
        for k in range(lines):
            prompt = [(37 * k + 11 * place) % 30_000 for place in range(128)]
            body = {"custom_id": f"r{k}", "prompt": prompt, "max_tokens": 128, "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(body) + "\n")
    words = [
        "mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(workers + 1), sys.executable, "-m", "llmpi",
        "batch", "-m", str(bench.models[model]), "-i", str(given), "-o", str(folder / f"run-{workers}"), "--slots",
        "128", "--ctx", "256", "--coordinator-only", "--json",
    ]  # fmt: skip
    speed: float = run_json(words)["output_tokens_per_s"]
    return speed


def split_tensor(bench: Bench, model: str) -> Found:
    """One rank over two GPUs by tensors, one sequence, against llama-bench split the same way. Both begin with one
    token."""
    if bench.peers is None:
        raise MissingError("needs --peers")
    words = [
        str(bench.peers / "llama-bench"), "-m", str(bench.models[model]), "-p", "0", "-n", "128", "-sm", "tensor",
        "-fa", "1", "-r", str(bench.repeats), "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    peer = json.loads(done.stdout)[0]["avg_ts"]
    ours = bench.engine(
        model, "--slots", 1, "--requests", 8, "--prompt-tokens", 1, "--output-tokens", 128, "--gpus-per-rank", 2,
        "--split", "tensor", *PLAIN,
    )["output_tokens_per_s"]  # fmt: skip
    return {"ratio": ours / peer, "ours": ours, "peer": peer}


def cpu_batched(bench: Bench, model: str) -> Found:
    options = ("--slots", 16, "--requests", bench.requests(64), "--prompt-tokens", 64, "--output-tokens", 32)
    found = bench.engine(model, *options, "--device", "cpu", "--threads", 2, *bench.with_peers())
    return picked(found, found["peer_total_tokens_per_s"], found["ratio"])


@dataclass(frozen=True)
class Row:
    """`goal` is the least `ratio`, or the most where `most` is set. GIVEN_MIN of the load must have been given."""

    name: str
    model: str
    measure: Callable[[Bench, str], Found]
    goal: float
    most: bool = False

    def reached(self, found: Found) -> bool:
        return found.get("given", 1.0) >= GIVEN_MIN and bool(
            found["ratio"] <= self.goal if self.most else found["ratio"] >= self.goal
        )


ROWS = (
    Row("128 slots / batched-bench at 128", "1b", batched_128, 1.2),
    Row("128 slots / batched-bench at 128", "8b", batched_128, 1.05),
    Row("own slots / batched-bench at 128", "1b", lambda b, m: own_best(b, m, 128), 1.7),
    Row("own slots / batched-bench at 128", "8b", lambda b, m: own_best(b, m, 128), 1.3),
    Row("own slots / batched-bench at its best", "1b", lambda b, m: own_best(b, m, None), 1.2),
    Row("own slots / batched-bench at its best", "8b", lambda b, m: own_best(b, m, None), 1.1),
    Row("128 at once / llama-server", "1b", lambda b, m: against_server(b, m, 128), 8.0),
    Row("128 at once / llama-server", "8b", lambda b, m: against_server(b, m, 128), 3.5),
    Row("8 at once / llama-server", "1b", lambda b, m: against_server(b, m, 8), 1.0),
    Row("8 at once / llama-server", "8b", lambda b, m: against_server(b, m, 8), 1.0),
    Row("1 at once / llama-server", "1b", lambda b, m: against_server(b, m, 1), 1.0),
    Row("1 at once / llama-server", "8b", lambda b, m: against_server(b, m, 1), 1.0),
    Row("sampled / greedy", "1b-x8", sampled, 0.85),
    Row("lognormal / fixed lengths", "1b", lognormal, 0.85),
    Row("two GPUs / one, under mpirun", "1b", two_gpus, 1.95),
    Row("two GPUs / one, under mpirun", "8b", two_gpus, 1.95),
    Row("shared prefix / reuse off", "1b", shared_prefix, 3.0),
    Row("shared prefix / reuse off", "8b", shared_prefix, 3.0),
    Row("split tensor / llama-bench", "8b", split_tensor, 0.95),
    Row("gaps P99 / median, long prompts", "1b", lambda b, m: interrupted(b, m, 0.5), 4.0, most=True),
    Row("gaps P99 / median, long prompts", "8b", interrupted, 4.0, most=True),
    Row("start less llama-bench, s", "8b", start, 2.0, most=True),
    Row("16 slots / batched-bench, CPU", "cpu", cpu_batched, 1.0),
    Row("shared prefix / reuse off", "cpu", shared_prefix, 3.0),
    Row("gaps P99 / median, long prompts", "cpu", interrupted, 4.0, most=True),
    Row("start less llama-bench, s", "cpu", start, 2.0, most=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the engine is meant to reach.")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--peers", type=Path, help="folder with llama.cpp's programs")
    parser.add_argument("--only", default="", help="comma-separated beginnings of MODEL:ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("-o", "--output", type=Path, help="JSON lines, one a row")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    wanted = tuple(filter(None, chosen.only.split(",")))
    rows = [row for row in ROWS if not wanted or f"{row.model}:{row.name}".startswith(wanted)]
    if chosen.list:
        print("\n".join(f"{row.model}:{row.name}" for row in rows))
        return
    models = {name: Path(path) for name, path in (given.split("=", 1) for given in chosen.model)}
    bench = Bench(models, chosen.peers, chosen.repeats, chosen.scale)
    for row in rows:
        if row.model in models:
            measure(row, bench, chosen.output)


def measure(row: Row, bench: Bench, output: Path | None) -> None:
    began_s = time.monotonic()
    try:
        found = row.measure(bench, row.model)
    except MissingError as error:
        print(f"{row.model:6} {row.name:40} not measured: {error}", flush=True)
        return
    found |= {"row": row.name, "model": row.model, "goal": row.goal, "scale": bench.scale}
    found["measured_in_s"] = time.monotonic() - began_s
    sign, verdict = ("at most" if row.most else "at least"), ("ok" if row.reached(found) else "MISSED")
    parts = [f"{found[name]:,.4g}" for name in ("ours", "peer") if name in found]
    if "given" in found:
        parts.append(f"{found['given']:.0%} of the load")
    print(
        f"{row.model:6} {row.name:40} {found['ratio']:8.3f} ({sign} {row.goal}) {verdict}  {' / '.join(parts)}",
        flush=True,
    )
    if output is not None:
        with output.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
