"""`llmpi study …`: parsing and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from coordinator.commands.parameters import (
    AsJson,
    ChatTemplate,
    MaxTokens,
    MinP,
    Model,
    PoolingOption,
    Schedule,
    Stage,
    StageDir,
    Temperature,
    TopK,
    TopP,
)
from coordinator.options import EngineOptions, takes
from coordinator.values import numbers_of, read_text

study = typer.Typer(name="study", help="Measure how runs scale, with repeats.", no_args_is_help=True)


@study.command()
@takes(EngineOptions)
def scaling(
    chosen: EngineOptions,
    model: Model,
    requests: Annotated[Path, typer.Option("-i", "--input", help="File of requests, all of which every cell answers.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the study; the same command goes on.")],
    workers: Annotated[
        str, typer.Option(help="Numbers of workers, as in 1,2,4. The fewest is what speed-up is against.")
    ],
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the order of the cells, and of requests that have none.")] = 0,
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="Whether a cell that is not counted comes first.")
    ] = True,
    schedule: Schedule = "work-stealing",
    ranks_per_gpu: Annotated[int, typer.Option(help="Workers that share a GPU.")] = 1,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    chat_template: ChatTemplate = None,
    pooling: PoolingOption = None,
    stage: Stage = "auto",
    stage_dir: StageDir = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with the prompts, of a table.")
    ] = None,
    input_format: Annotated[
        Literal["jsonl", "text", "csv", "tsv", "parquet"] | None,
        typer.Option("--format", help="How the input is written. [default: by its name, else by its content]"),
    ] = None,
    copies: Annotated[
        bool | None, typer.Option("--copies/--no-copies", help="As of batch. [default: with work stealing]")
    ] = None,
    engine: Annotated[
        Literal["llama", "simulated"], typer.Option(help="'simulated' needs no model and takes as long as one.")
    ] = "llama",
    service_times: Annotated[Path | None, typer.Option(help="Of the simulated engine. [default: an example's]")] = None,
    time_scale: Annotated[float, typer.Option(help="The simulated engine takes so many times as long.")] = 1.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds from a request to stop to the job's end.")] = 20.0,
    time_limit: Annotated[
        str | None, typer.Option(metavar="TIME|none", help="As of batch. [default: what Slurm knows of its job]")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Strong scaling: the same requests on several numbers of workers, with speed-up, efficiency and idle time."""
    from coordinator.batchoptions import BatchOptions
    from coordinator.config import JobConfig, checked_sampling
    from coordinator.rows import Columns
    from coordinator.study.design import Design
    from coordinator.study.scaling import run_scaling
    from coordinator.timekeeper import StopOptions
    from coordinator.timelimit import parse_time_limit

    limit_s = None if time_limit is None else parse_time_limit(time_limit)
    config = JobConfig(
        model=model, schedule=schedule, ranks_per_gpu=ranks_per_gpu, coordinator_works=False, max_tokens=max_tokens,
        sampling=checked_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), seed=seed,
        copies=copies, chat_template=read_text("--chat-template", chat_template), pooling=pooling, stage=stage,
        stage_dir=stage_dir, engine=engine, service_times=None if service_times is None else str(service_times),
        time_scale=time_scale, **chosen.job(),
    )  # fmt: skip
    design = Design.checked(numbers_of("--workers", workers), repeats, seed, warm_up=warm_up)
    options = BatchOptions(
        input=requests, output=output, format=input_format, columns=Columns(prompt_column, None, None),
        quiet=quiet, as_json=as_json,
        stopping=StopOptions(
            drain_timeout_s=drain_timeout, time_limit_s=limit_s, slurm_limit=time_limit is None or limit_s is not None
        ),
    )  # fmt: skip
    raise typer.Exit(run_scaling(config, design, options, sys.argv[1:]))


@study.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="STUDY_DIR", help="Directory of a study.")],
    as_json: AsJson = False,
) -> None:
    """Print what a study has found so far; exits with 0, 1 if requests failed, 3 if cells lack."""
    from coordinator.study.results import show_study

    raise typer.Exit(show_study(directory, as_json=as_json))
