"""`llmpi bench engine`: how fast one engine process answers, against llama.cpp's own benchmark in the same run.

Ours: all requests are handed to the engine at once; the clock runs from that moment to the last answer, so reading
prompts, choosing tokens, the reuse of slots and the emptying at the end all count. Prompts are random tokens, all
different. Peer: llama-batched-bench (no sampling, no reuse of slots, prompts and output in two phases) at the same
number of sequences. Repeats of both alternate, so that a machine that slows down slows both. Both count prompt and
output tokens; it feeds all of them to the model, we do not feed the last one of each request, which nobody asks about.

One engine answers all repeats, after a short warm-up: loading is in no figure, nor is it in the peer's.
"""

from __future__ import annotations

import select
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coordinator.bench_load import Interrupts, Load
from coordinator.bench_peers import NAME as PEER
from coordinator.bench_peers import BatchedBench
from coordinator.config import JobConfig
from coordinator.engines import engine_config, fitted_placements
from coordinator.setup import Setup, prepare
from coordinator.simulated import simulated_engine
from scheduling.errors import EXIT_OK, ConfigError, EngineError
from scheduling.histogram import LogHistogram
from scheduling.lengths import Lengths
from scheduling.placement import plan_alone
from workers.protocol import Answer, EngineConfig, EngineFailed, EngineLoaded, Frame, FromEngine, Job, Stats
from workers.supervisor import EngineProcess

WARM_UP = 1 << 30
"""Number of the repeat that is not counted."""
TELL_EVERY_S = 15.0
POLL_S = 0.05
CLOSE_S = 10.0


@dataclass(kw_only=True)
class Repeat:
    """One repeat. Times in seconds; step parts are summed over the contexts' threads."""

    wall_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    reading_steps: int = 0
    interrupts: int = 0
    interrupts_left_out: int = 0
    """Long prompts that came, and those that should have while the one before was unanswered."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    decode_s: float = 0.0
    sample_s: float = 0.0
    busy_s: float = 0.0
    slot_s: float = 0.0
    gaps: LogHistogram = field(default_factory=LogHistogram)
    answers: list[Answer] = field(default_factory=list)

    @property
    def total_tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.wall_s

    def figures(self, contexts: int) -> dict[str, float]:
        steps = max(1, self.steps)
        return {
            "total_tokens_per_s": self.total_tokens_per_s,
            "output_tokens_per_s": self.output_tokens / self.wall_s,
            "requests_wall_s": self.wall_s,
            "steps": self.steps,
            "reading_steps_share": self.reading_steps / steps,
            "interrupts": self.interrupts,
            "interrupts_left_out": self.interrupts_left_out,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "step_ms": 1e3 * self.busy_s * contexts / steps,
            "decode_ms": 1e3 * self.decode_s / steps,
            "sample_ms": 1e3 * self.sample_s / steps,
            "rest_ms": 1e3 * max(0.0, self.busy_s * contexts - self.decode_s - self.sample_s) / steps,
            "mean_running": self.slot_s / self.wall_s,
            "itl_p50_ms": 1e3 * self.gaps.percentile(0.5),
            "itl_p99_ms": 1e3 * self.gaps.percentile(0.99),
        }


class BenchEngine:
    """An engine process and what it says, for as long as the benchmark runs."""

    def __init__(self, config: EngineConfig, log_path: Path | None = None) -> None:
        """Start it and wait until it has loaded. Raises EngineError with the reason if it cannot."""
        began_s = time.monotonic()
        self._engine = EngineProcess(config, log_path=log_path)
        self.contexts = config.contexts
        loaded: list[EngineLoaded] = []
        while not loaded:
            loaded = [message for message in self._listen() if isinstance(message, EngineLoaded)]
        self.loaded = loaded[0]
        self.ready_s = time.monotonic() - began_s

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return self._engine.pid

    def close(self) -> None:
        self._engine.close(CLOSE_S)

    def run(self, jobs: list[Job], concurrency: int | None = None, interrupts: Interrupts | None = None) -> Repeat:
        """Have `jobs` answered, `interrupts` coming in between. Raises EngineError if one fails."""
        waiting = iter(jobs)
        began_s = time.monotonic()
        self._submit(waiting, concurrency or len(jobs))
        repeat, open_jobs, between = Repeat(wall_s=0.0), len(jobs), set[int]()
        prompt_tokens = output_tokens = 0
        told_s = began_s
        # The counters of the last steps may follow the last answer.
        while open_jobs or between or repeat.output_tokens < output_tokens:
            if (now_s := time.monotonic()) - told_s >= TELL_EVERY_S:
                told_s = now_s
                say(f"{len(jobs) - open_jobs} of {len(jobs)} requests, {repeat.output_tokens:,} output tokens so far")
            if interrupts is not None and open_jobs:
                due = interrupts.due(time.monotonic() - began_s, idle=not between)
                between.update(job.key for job in due)
                self._engine.submit(due)
            for message in self._listen():
                if isinstance(message, Stats):
                    _add(repeat, message)
                elif isinstance(message, Frame):
                    for answer in message.finished:
                        if answer.error is not None:
                            raise EngineError(f"request {answer.key} failed: {answer.error}")
                        prompt_tokens += answer.prompt_tokens
                        output_tokens += answer.output_tokens
                    mine = [answer for answer in message.finished if answer.key not in between]
                    between.difference_update(answer.key for answer in message.finished)
                    repeat.answers += mine
                    open_jobs -= len(mine)
                    if mine and open_jobs:
                        self._submit(waiting, len(mine))
                    elif mine:
                        repeat.wall_s = time.monotonic() - began_s
        repeat.prompt_tokens, repeat.output_tokens = prompt_tokens, output_tokens
        if interrupts is not None:
            repeat.interrupts, repeat.interrupts_left_out = interrupts.made, interrupts.left_out
        return repeat

    def _submit(self, waiting: Iterator[Job], count: int) -> None:
        self._engine.submit([job for _, job in zip(range(count), waiting, strict=False)])

    def _listen(self) -> list[FromEngine]:
        fd = self._engine.fileno()
        select.select([] if fd is None else [fd], [], [], POLL_S)
        messages = self._engine.poll()
        for message in messages:
            if isinstance(message, EngineFailed):
                raise EngineError(f"the engine cannot go on: {message.reason}")
        if not messages and not self._engine.alive:
            raise EngineError(f"the engine has ended: {self._engine.exit_reason()}")
        return messages


def _add(repeat: Repeat, stats: Stats) -> None:
    repeat.output_tokens += stats.output_tokens
    repeat.steps += stats.steps
    repeat.reading_steps += stats.reading_steps
    repeat.drafted_tokens += stats.drafted_tokens
    repeat.accepted_tokens += stats.accepted_tokens
    repeat.decode_s += stats.decode_s
    repeat.sample_s += stats.sample_s
    repeat.busy_s += stats.busy_s
    repeat.slot_s += stats.slot_s
    repeat.gaps.add_sparse(stats.itl_buckets, stats.itl_counts)


def run_bench_engine(
    config: JobConfig, load: Load, *, repeats: int, peers: Path | None, sequences: tuple[int, ...], as_json: bool
) -> int:
    """Measure and print. `sequences`: what the peer tries, its best counts; none: as many as we have slots.

    Raises:
        UserError: what cannot be measured, and why.
        EngineError: an engine failed.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}: it must be 1 or more")
    if peers is not None and (load.sigma or load.shared_prefix_tokens or load.interrupt_tokens):
        raise ConfigError(
            f"--peers with --sigma, --shared-prefix or --interrupt-tokens: {PEER} has none of them, there is no ratio"
        )
    setup = prepare(config)
    if setup.problem is not None:
        raise setup.problem
    engine = first_engine(setup, load.lengths())
    peer = None
    if peers is not None:
        sequences = sequences or (engine.slots,)
        peer = BatchedBench(peers, engine, load.prompt_tokens, load.output_tokens, sequences)
    bench = BenchEngine(engine)
    try:
        vocab_tokens = bench.loaded.vocab_tokens
        say(f"ready after {bench.ready_s:.1f} s; warming up")
        bench.run(load.jobs(vocab_tokens, WARM_UP)[: engine.slots], load.concurrency)
        ours: list[Repeat] = []
        theirs: list[dict[int, float]] = []
        for repeat in range(repeats):
            interrupts = load.interrupts(vocab_tokens, repeat)
            ours.append(bench.run(load.jobs(vocab_tokens, repeat), load.concurrency, interrupts))
            say(f"repeat {repeat + 1} of {repeats}: {ours[-1].total_tokens_per_s:,.0f} tokens/s in all")
            if peer is not None:
                theirs.append(peer.total_tokens_per_s())
                say(f"{PEER}: {max(theirs[-1].values()):,.0f} tokens/s in all")
    finally:
        bench.close()
    found = _summary(engine, load, bench, ours, theirs)
    if as_json:
        from coordinator.values import print_json

        print_json(found)
    else:
        _print_table(found)
    return EXIT_OK


def first_engine(setup: Setup, lengths: Lengths | None = None) -> EngineConfig:
    """One engine on the first device, as a batch on this machine would start it for requests of these `lengths`."""
    config = setup.config
    placement = plan_alone(setup.host, gpus_per_rank=config.gpus_per_rank, want_gpu=config.want_gpu)[0]
    if setup.service_times is not None:
        return simulated_engine(config, setup.service_times, placement)
    placements, said = fitted_placements(config, setup.model, {0: placement}, {0: setup.host}, lengths)
    for line in said:
        say(line)
    return engine_config(config, setup.model, placements[0])


def _summary(
    engine: EngineConfig, load: Load, bench: BenchEngine, ours: list[Repeat], theirs: list[dict[int, float]]
) -> dict[str, Any]:
    figures = [repeat.figures(engine.contexts) for repeat in ours]
    found: dict[str, Any] = {
        "model": engine.model, "model_desc": bench.loaded.model_desc, "backend": bench.loaded.backend,
        "slots": engine.slots, "contexts": engine.contexts, "ctx_tokens": engine.ctx_tokens,
        "batch_tokens": engine.batch_tokens, "ubatch_tokens": engine.ubatch_tokens, "threads": engine.threads,
        "repeats": len(ours), "ready_s": bench.ready_s,
        "load": {name: value for name, value in asdict(load).items() if name != "sampling"},
    }  # fmt: skip
    found |= {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    found |= _spread("total_tokens_per_s", [one["total_tokens_per_s"] for one in figures])
    if theirs:
        by_sequences = {n: statistics.median(one[n] for one in theirs) for n in theirs[0]}
        best = max(by_sequences, key=lambda n: by_sequences[n])
        speeds = [one[best] for one in theirs]
        found |= {"peer": PEER, "peer_sequences": best, "peer_total_tokens_per_s": by_sequences[best]}
        found["peer_total_tokens_per_s_by_sequences"] = by_sequences
        found |= _spread("peer_total_tokens_per_s", speeds)
        # Each repeat against the peer's next to it, so that both saw the same machine.
        ratios = [one["total_tokens_per_s"] / peer for one, peer in zip(figures, speeds, strict=True)]
        found["ratio"] = statistics.median(ratios)
        found |= _spread("ratio", ratios)
    return found


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), f"{name}_max": max(values)}


def _print_table(found: dict[str, Any]) -> None:
    load = found["load"]
    contexts = f"{found['contexts']} context" + ("s" if found["contexts"] != 1 else "")
    print(f"{found['model_desc']} on {found['backend']}, {found['slots']} slots in {contexts}")
    print(
        f"{load['requests']} requests of {load['prompt_tokens']} + {load['output_tokens']} tokens, "
        f"median of {found['repeats']} (smallest to largest)"
    )
    rows = [
        ("total tokens/s", f"{found['total_tokens_per_s']:,.0f}", "total_tokens_per_s", ",.0f"),
        ("output tokens/s", f"{found['output_tokens_per_s']:,.0f}", "", ""),
        ("step, ms", f"{found['step_ms']:.2f}", "", ""),
        ("  decode", f"{found['decode_ms']:.2f}", "", ""),
        ("  choose tokens", f"{found['sample_ms']:.2f}", "", ""),
        ("  rest", f"{found['rest_ms']:.2f}", "", ""),
        ("running at once", f"{found['mean_running']:.1f}", "", ""),
        ("between tokens P50 / P99, ms", f"{found['itl_p50_ms']:.1f} / {found['itl_p99_ms']:.1f}", "", ""),
    ]
    if load["interrupt_tokens"]:
        rows.append(("long prompts, left out", f"{found['interrupts']:g}, {found['interrupts_left_out']:g}", "", ""))
    if found["drafted_tokens"]:
        accepted = f"{found['accepted_tokens']:,.0f} / {found['drafted_tokens']:,.0f}"
        rows.append(("drafted tokens accepted", accepted, "", ""))
    if "ratio" in found:
        name, peer = f"{PEER}, B = {found['peer_sequences']}", "peer_total_tokens_per_s"
        rows.append((name, f"{found[peer]:,.0f}", peer, ",.0f"))
        rows.append(("ratio", f"{found['ratio']:.3f}", "ratio", ".3f"))
    for name, value, spread, form in rows:
        between = f"  ({found[f'{spread}_min']:{form}} to {found[f'{spread}_max']:{form}})" if spread else ""
        print(f"  {name:30} {value:>14}{between}")


def say(line: str) -> None:
    """Progress, beside the figures on stdout."""
    print(f"llmpi: {line}", file=sys.stderr, flush=True)
