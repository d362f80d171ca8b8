"""`llmpi bench …`: parsing and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.engine_options import EngineOptions
from coordinator.commands.groups import takes_groups
from coordinator.commands.job_options import GREEDY, SamplingOptions
from coordinator.commands.parameters import AsJson, Fanout, Model, Schedule
from coordinator.commands.sections import Sectioned
from coordinator.values import numbers_of

bench = typer.Typer(name="bench", help="Measure parts of the system on this machine.", no_args_is_help=True)


@bench.command()
def dispatch(
    requests: Annotated[int, typer.Option(help="Requests to send through.")] = 100_000,
    prompt_bytes: Annotated[int, typer.Option(help="Size of each prompt.")] = 1000,
    answer_bytes: Annotated[int, typer.Option(help="Size of each answer.")] = 200,
    slots: Annotated[int, typer.Option(help="Slots of each null engine.")] = 256,
    peer_requests: Annotated[
        int, typer.Option(help="Requests for the peer, MPICommExecutor one by one; 0 leaves it out.")
    ] = 10_000,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory. [default: one that is not kept]")
    ] = None,
    schedule: Schedule = "work-stealing",
    fanout: Fanout = 256,
    as_json: AsJson = False,
) -> None:
    """Measure all but the engine. Control plane, transport and durable record, with one that answers at once."""
    from coordinator.bench_dispatch import run_bench_dispatch

    raise typer.Exit(
        run_bench_dispatch(
            requests=requests, prompt_bytes=prompt_bytes, answer_bytes=answer_bytes, slots=slots,
            peer_requests=peer_requests, output=output, schedule=schedule, fanout=fanout, as_json=as_json,
        )
    )  # fmt: skip


@bench.command(cls=Sectioned)
@takes_groups
def engine(
    *,
    model: Model,
    requests: Annotated[int, typer.Option(help="Requests of each repeat.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Output tokens of each request; their mean with --sigma.")] = 128,
    output_tokens_max: Annotated[int, typer.Option(help="Most output tokens, with --sigma.")] = 1024,
    sigma: Annotated[float, typer.Option(help="Output lengths are lognormal with this sigma; 0: all the same.")] = 0.0,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    interrupt_tokens: Annotated[
        int, typer.Option(help="Tokens of a prompt that comes in between, one at a time; 0: none does.")
    ] = 0,
    interrupt_every: Annotated[float, typer.Option(help="Seconds from one of those to the next.")] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests that the engine has at once. [default: all]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="How often; medians are printed.")] = 5,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with llama-batched-bench: run it in turn, print the ratio.")
    ] = None,
    peer_sequences: Annotated[
        str, typer.Option(help="Numbers of sequences that it tries, as in 32,64,128; its best counts. [default: slots]")
    ] = "",
    sampling: SamplingOptions = GREEDY,
    chosen: EngineOptions,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 0,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure service times for the simulated engine instead; lengths and numbers of requests are its own.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="With --calibrate: file to write. [default: MODEL.service-times.json]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure one engine. Tokens a second, the parts of a step, and llama.cpp's own benchmark beside it."""
    from coordinator.bench_engine import run_bench_engine
    from coordinator.bench_load import Load
    from coordinator.calibrate import CTX_TOKENS, run_calibrate
    from coordinator.config import JobConfig

    most = output_tokens_max if sigma else output_tokens
    sampled = sampling.sampling()
    given = chosen.job()
    if calibrate:
        given |= {"ctx": CTX_TOKENS if given["ctx"] == "auto" else given["ctx"], "speculate": False}
    config = JobConfig(model=model, seed=seed, **given)
    if calibrate:
        raise typer.Exit(run_calibrate(config, sampled, repeats=repeats, output=output, as_json=as_json))
    load = Load(
        requests=requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens, output_tokens_max=most,
        sigma=sigma, shared_prefix_tokens=shared_prefix, interrupt_tokens=interrupt_tokens,
        interrupt_every_s=interrupt_every, concurrency=concurrency, sampling=sampled, seed=seed,
    )  # fmt: skip
    sequences = numbers_of("--peer-sequences", peer_sequences)
    code = run_bench_engine(
        config, load, repeats=repeats, peers=peers, sequences=sequences, as_json=as_json
    )  # fmt: skip
    raise typer.Exit(code)
