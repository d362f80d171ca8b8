"""`llmpi batch`: parsing and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coordinator.commands.parameters import (
    AsJson,
    ChatTemplate,
    Fanout,
    GrammarFile,
    JsonSchema,
    MaxTokens,
    MinP,
    PoolingOption,
    Schedule,
    Seed,
    Stage,
    StageDir,
    Temperature,
    TopK,
    TopP,
)
from coordinator.options import EngineOptions, given_on_command_line, takes
from coordinator.values import held_to, read_text, refuse_missing


@takes(EngineOptions)
def batch(
    chosen: EngineOptions,
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
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column, or field, with the prompt. [default: prompt]")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt made of columns: 'Translate {text} into {language}:'.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with each request's id. [default: custom_id, if there]")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--slice",
            metavar="I/N",
            help="Answer every N-th request alone, from the I-th on (0/4, 1/4, 2/4, 3/4): jobs that share one input. "
            "The run directory is RUN_DIR/slice-I.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Do this run again: same model, input and options, unless given anew; then say what differed.",
        ),
    ] = None,
    schedule: Schedule = "work-stealing",
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Ranks to start, where llmpi starts its own mpirun. [default: one a GPU]"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Hosts to start ranks on, where llmpi starts its own mpirun; all their slots, or --ranks N."),
    ] = None,
    ranks_per_gpu: Annotated[int, typer.Option(help="Workers that share a GPU.")] = 1,
    coordinator_works: Annotated[
        bool | None,
        typer.Option(
            "--coordinator-works/--coordinator-only",
            help="Whether rank 0 hosts a worker. [default: if alone, or if a GPU would idle]",
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    json_schema: JsonSchema = None,
    grammar_file: GrammarFile = None,
    chat_template: ChatTemplate = None,
    pooling: PoolingOption = None,
    stage: Stage = "auto",
    stage_dir: StageDir = None,
    input_format: Annotated[
        Literal["jsonl", "text", "csv", "tsv", "parquet"] | None,
        typer.Option("--format", help="How the input is written. [default: by its name, else by its content]"),
    ] = None,
    precheck: Annotated[
        bool, typer.Option("--precheck/--no-precheck", help="Validate the whole input before anything starts.")
    ] = True,
    prefetch: Annotated[
        int | None,
        typer.Option(help="Unstarted requests a worker holds, at least. [default: a quarter of its slots]"),
    ] = None,
    copies: Annotated[
        bool | None,
        typer.Option(
            "--copies/--no-copies",
            help="Near the end, start what runs on a slow rank again on an idle one, where that is expected to end "
            "sooner; the first answer counts. [default: with work stealing]",
        ),
    ] = None,
    fanout: Fanout = 256,
    lease: Annotated[
        float, typer.Option(help="Seconds of silence after which a rank is lost and its work goes to others.")
    ] = 60.0,
    rank0_lease: Annotated[
        float | None,
        typer.Option(
            help="Seconds of rank 0's silence after which a worker ends its engine and leaves. [default: 10 leases, at "
            "least 600]"
        ),
    ] = None,
    engine_lease: Annotated[
        float,
        typer.Option(
            help="Seconds without a step after which an engine that has work is killed and started anew; more than the "
            "longest step may take. Loading is granted six times as long."
        ),
    ] = 600.0,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a request may run before it is stopped, and has failed. [default: no limit]"),
    ] = None,
    max_deaths: Annotated[
        int,
        typer.Option(help="Engines that may die while they run a request, the last of them alone, before it fails."),
    ] = 3,
    commit_interval: Annotated[float, typer.Option(help="Seconds between commits of the record to disk.")] = 0.05,
    commit_bytes: Annotated[int, typer.Option(help="Bytes after which the record is committed earlier.")] = 16 << 20,
    metrics_interval: Annotated[
        float,
        typer.Option(help="Seconds after which telemetry and counters go to disk: a killed run has them up to then."),
    ] = 10.0,
    engine: Annotated[
        Literal["llama", "simulated"],
        typer.Option(
            help="'simulated' computes nothing, needs no model, and takes as long as --service-times say: for studies "
            "and tests, its answers mean nothing."
        ),
    ] = "llama",
    service_times: Annotated[
        Path | None,
        typer.Option(
            help="Of the simulated engine, as `llmpi bench engine --calibrate` writes them. [default: an example's]"
        ),
    ] = None,
    time_scale: Annotated[float, typer.Option(help="The simulated engine takes so many times as long.")] = 1.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds from a request to stop to the job's end. What runs longer is cut off.")
    ] = 20.0,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|none",
            help="The job is gone by then, and nothing is started that would not end in time: minutes, MM:SS, "
            "HH:MM:SS, D-HH:MM:SS, 90s, 2h. [default: what Slurm knows of its job]",
        ),
    ] = None,
    on_limit: Annotated[
        Literal["stop", "requeue"],
        typer.Option(help="When time is up: 'requeue' has Slurm put the job back into its queue."),
    ] = "stop",
    show: Annotated[int, typer.Option(min=0, help="Answers to print at the end.")] = 0,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no tables; of notes only warnings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every request of a file exactly once, on all ranks."""
    from coordinator.batch import replayed, run_batch
    from coordinator.batchoptions import BatchOptions
    from coordinator.config import JobConfig, checked_sampling
    from coordinator.rows import Columns
    from coordinator.slicing.slices import parse_slice
    from coordinator.timekeeper import StopOptions
    from coordinator.timelimit import parse_time_limit

    limit_s = None if time_limit is None else parse_time_limit(time_limit)
    fields: dict[str, Any] = dict(
        model=model, schedule=schedule, ranks_per_gpu=ranks_per_gpu, coordinator_works=coordinator_works,
        sampling=checked_sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **held_to(json_schema, grammar_file)
        ),
        max_tokens=max_tokens, seed=seed, copies=copies, prefetch=prefetch, fanout=fanout, lease_s=lease,
        rank0_lease_s=rank0_lease,
        engine_lease_s=engine_lease, request_timeout_s=request_timeout, max_deaths=max_deaths,
        commit_interval_s=commit_interval, commit_bytes=commit_bytes, metrics_interval_s=metrics_interval,
        precheck=precheck, chat_template=read_text("--chat-template", chat_template),
        engine=engine, service_times=None if service_times is None else str(service_times), time_scale=time_scale,
        pooling=pooling, stage=stage, stage_dir=stage_dir, **chosen.job(),
    )  # fmt: skip
    if replay is None:
        config = JobConfig(**fields)
    needed: dict[str, Path | str | None] = {"-m/--model": model, "-i/--input": requests, "-o/--output": output}
    refuse_missing(needed if replay is None else {"-o/--output": output})
    own = None if part is None else parse_slice(part)
    options = BatchOptions(
        input=requests or Path(), output=own.directory(output or Path()) if own else output or Path(), part=own,
        format=input_format,
        columns=Columns(prompt_column, template, id_column), ranks=ranks, hostfile=hostfile,
        show=show, quiet=quiet, as_json=as_json,
        stopping=StopOptions(
            drain_timeout_s=drain_timeout, on_limit=on_limit,
            time_limit_s=limit_s, slurm_limit=time_limit is None or limit_s is not None,
        ),
    )  # fmt: skip
    if replay is not None:
        config, options = replayed(replay, fields, options, given_on_command_line(context))
    raise typer.Exit(run_batch(config, options, sys.argv[1:]))
