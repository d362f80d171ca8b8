"""`llmpi study …`: parsing and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.engine_options import EngineOptions
from coordinator.commands.groups import takes_groups
from coordinator.commands.job_options import RequestOptions, SimulationOptions, StagingOptions, StoppingOptions
from coordinator.commands.parameters import (
    AsJson,
    Copies,
    InputFormat,
    Model,
    PoolingOption,
    PromptColumn,
    RanksPerGpu,
    Schedule,
)
from coordinator.commands.sections import Sectioned
from coordinator.values import numbers_of

study = typer.Typer(name="study", help="Measure how runs scale, with repeats.", no_args_is_help=True)


@study.command(cls=Sectioned)
@takes_groups
def scaling(
    *,
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
    prompt_column: PromptColumn = None,
    input_format: InputFormat = None,
    answers: RequestOptions,
    chosen: EngineOptions,
    pooling: PoolingOption = None,
    staging: StagingOptions,
    ranks_per_gpu: RanksPerGpu = 1,
    schedule: Schedule = "work-stealing",
    copies: Copies = None,
    stop: StoppingOptions,
    simulation: SimulationOptions,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure strong scaling. The same requests on several numbers of workers: speed-up, efficiency, idle time."""
    from coordinator.batchoptions import BatchOptions
    from coordinator.config import JobConfig
    from coordinator.rows import Columns
    from coordinator.study.design import Design
    from coordinator.study.scaling import run_scaling

    stopping = stop.stopping()
    config = JobConfig(
        model=model, schedule=schedule, ranks_per_gpu=ranks_per_gpu, coordinator_works=False, seed=seed, copies=copies,
        pooling=pooling, **answers.job(), **chosen.job(), **staging.job(), **simulation.job(),
    )  # fmt: skip
    design = Design.checked(numbers_of("--workers", workers), repeats, seed, warm_up=warm_up)
    options = BatchOptions(
        input=requests, output=output, format=input_format, columns=Columns(prompt_column, None, None),
        quiet=quiet, as_json=as_json, stopping=stopping,
    )  # fmt: skip
    raise typer.Exit(run_scaling(config, design, options, sys.argv[1:]))


@study.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="STUDY_DIR", help="Directory of a study.")],
    as_json: AsJson = False,
) -> None:
    """Print what a study has found so far. Exit 0 if it is whole, 1 if requests failed, 3 if cells lack."""
    from coordinator.study.results import show_study

    raise typer.Exit(show_study(directory, as_json=as_json))
