"""`llmpi batch`: parsing and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coordinator.commands.engine_options import EngineOptions
from coordinator.commands.groups import given_on_command_line, takes_groups
from coordinator.commands.job_options import AnswerOptions, SimulationOptions, StagingOptions, StoppingOptions
from coordinator.commands.parameters import (
    AsJson,
    Copies,
    Fanout,
    InputFormat,
    PoolingOption,
    PromptColumn,
    RanksPerGpu,
    Schedule,
)
from coordinator.commands.sections import FAULTS, INPUT, RANKS, STOPPING, section
from coordinator.values import refuse_missing

_of_input = section(INPUT)
_of_ranks = section(RANKS)
_of_faults = section(FAULTS)


@takes_groups
def batch(
    *,
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "-m", "--model", help="GGUF file, or a model of the store (`llmpi models ls`).", show_default=False
        ),
    ] = "",
    requests: Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--input",
            help='Requests: OpenAI batch JSONL, {"prompt": …} lines, text, CSV, TSV or Parquet, also compressed; a '
            "directory of these; or '-' for standard input.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory; the same command again resumes.")
    ] = None,
    prompt_column: PromptColumn = None,
    template: Annotated[
        str | None, _of_input(metavar="TEXT", help="Prompt made of columns: 'Translate {text} into {language}:'.")
    ] = None,
    id_column: Annotated[
        str | None, _of_input(metavar="NAME", help="Column with each request's id. [default: custom_id, if there]")
    ] = None,
    input_format: InputFormat = None,
    precheck: Annotated[
        bool, _of_input("--precheck/--no-precheck", help="Validate the whole input before anything starts.")
    ] = True,
    part: Annotated[
        str | None,
        _of_input(
            "--slice",
            metavar="I/N",
            help="Answer every N-th request alone, from the I-th on (0/4, 1/4, 2/4, 3/4): jobs that share one input. "
            "The run directory is RUN_DIR/slice-I.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        _of_input(
            metavar="RUN_DIR",
            help="Do this run again: same model, input and options, unless given anew; then say what differed.",
        ),
    ] = None,
    answers: AnswerOptions,
    chosen: EngineOptions,
    pooling: PoolingOption = None,
    staging: StagingOptions,
    ranks: Annotated[
        int | None,
        _of_ranks("--ranks", min=1, help="Ranks to start, where llmpi starts its own mpirun. [default: one a GPU]"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        _of_ranks(help="Hosts to start ranks on, where llmpi starts its own mpirun; all their slots, or --ranks N."),
    ] = None,
    ranks_per_gpu: RanksPerGpu = 1,
    coordinator_works: Annotated[
        bool | None,
        _of_ranks(
            "--coordinator-works/--coordinator-only",
            help="Whether rank 0 hosts a worker. [default: if alone, or if a GPU would idle]",
        ),
    ] = None,
    schedule: Schedule = "work-stealing",
    copies: Copies = None,
    prefetch: Annotated[
        int | None,
        _of_ranks(help="Unstarted requests a worker holds, at least. [default: a quarter of its slots]"),
    ] = None,
    fanout: Fanout = 256,
    stop: StoppingOptions,
    on_limit: Annotated[
        Literal["stop", "requeue"],
        section(STOPPING)(help="When time is up: 'requeue' has Slurm put the job back into its queue."),
    ] = "stop",
    lease: Annotated[
        float, _of_faults(help="Seconds of silence (2 or more) after which a rank is lost and its work goes to others.")
    ] = 60.0,
    rank0_lease: Annotated[
        float | None,
        _of_faults(
            help="Seconds of rank 0's silence after which a worker ends its engine and leaves. [default: 10 leases, at "
            "least 600]"
        ),
    ] = None,
    engine_lease: Annotated[
        float,
        _of_faults(
            help="Seconds without a step after which an engine that has work is killed and started anew; more than the "
            "longest step may take. Loading is granted six times as long."
        ),
    ] = 600.0,
    request_timeout: Annotated[
        float | None,
        _of_faults(help="Seconds that a request may run before it is stopped, and has failed. [default: no limit]"),
    ] = None,
    max_deaths: Annotated[
        int,
        _of_faults(help="Engines that may die while they run a request, the last of them alone, before it fails."),
    ] = 3,
    commit_interval: Annotated[float, _of_faults(help="Seconds between commits of the record to disk.")] = 0.05,
    commit_bytes: Annotated[int, _of_faults(help="Bytes after which the record is committed earlier.")] = 16 << 20,
    metrics_interval: Annotated[
        float,
        _of_faults(help="Seconds after which telemetry and counters go to disk: a killed run has them up to then."),
    ] = 10.0,
    simulation: SimulationOptions,
    show: Annotated[int, typer.Option(min=0, help="Answers to print at the end.")] = 0,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no tables; of notes only warnings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every request of a file exactly once, on all ranks."""
    from coordinator.batch import replayed, run_batch
    from coordinator.batchoptions import BatchOptions
    from coordinator.config import JobConfig
    from coordinator.rows import Columns
    from coordinator.slicing.slices import parse_slice

    stopping = stop.stopping(on_limit)
    fields: dict[str, Any] = dict(
        model=model, schedule=schedule, ranks_per_gpu=ranks_per_gpu, coordinator_works=coordinator_works,
        copies=copies, prefetch=prefetch, fanout=fanout, lease_s=lease, rank0_lease_s=rank0_lease,
        engine_lease_s=engine_lease, request_timeout_s=request_timeout, max_deaths=max_deaths,
        commit_interval_s=commit_interval, commit_bytes=commit_bytes, metrics_interval_s=metrics_interval,
        precheck=precheck, pooling=pooling,
        **answers.job(), **chosen.job(), **staging.job(), **simulation.job(),
    )  # fmt: skip
    if replay is None:
        config = JobConfig(**fields)
    needed: dict[str, Path | str | None] = {"-m/--model": model, "-i/--input": requests, "-o/--output": output}
    refuse_missing(needed if replay is None else {"-o/--output": output})
    own = None if part is None else parse_slice(part)
    options = BatchOptions(
        input=requests or Path(), output=own.directory(output or Path()) if own else output or Path(), part=own,
        format=input_format, columns=Columns(prompt_column, template, id_column), ranks=ranks, hostfile=hostfile,
        show=show, quiet=quiet, as_json=as_json, stopping=stopping,
    )  # fmt: skip
    if replay is not None:
        config, options = replayed(replay, fields, options, given_on_command_line(context))
    raise typer.Exit(run_batch(config, options, sys.argv[1:]))
