"""The command line. Parsing and help only: each command's work is in a module that is imported when it runs.

So `llmpi --help` starts neither MPI, nor CUDA, nor llama.cpp. Every error a user can mend ends as one line and an exit
code (see `scheduling.errors`); under a launcher only one rank prints it.
"""

from __future__ import annotations

import os
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from coordinator.launch import Launch, detect
from coordinator.modelcli import models
from coordinator.options import EngineOptions, GeneratingOptions, ModelOptions, given_on_command_line, takes
from coordinator.values import held_to, numbers_of, read_text, refuse_beside_continuation, refuse_missing
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_USAGE, LlmpiError

app = typer.Typer(
    name="llmpi",
    help="Run llama.cpp on every GPU of a workstation or a cluster, under mpirun or srun, with no other service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure parts of the system on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(models, name="models")


class Schedule(str, Enum):
    round_robin = "round-robin"
    work_stealing = "work-stealing"


class EngineKind(str, Enum):
    llama = "llama"
    simulated = "simulated"


class Staging(str, Enum):
    never = "never"
    auto = "auto"
    always = "always"


class OnLimit(str, Enum):
    stop = "stop"
    requeue = "requeue"


class Pooling(str, Enum):
    mean = "mean"
    cls = "cls"
    last = "last"


class InputFormat(str, Enum):
    jsonl = "jsonl"
    text = "text"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"


class Table(str, Enum):
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"


class Order(str, Enum):
    input = "input"
    completion = "completion"


Model = Annotated[
    str,
    typer.Option("-m", "--model", help="GGUF file, or a model of the store (`llmpi models ls`).", show_default=False),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory of a batch.")]
MaxTokens = Annotated[int, typer.Option(help="Most output tokens of a request that does not say.")]
Temperature = Annotated[float, typer.Option(help="For requests that do not say; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="For requests that do not say; 0 is off.")]
TopP = Annotated[float, typer.Option(help="For requests that do not say; 1 is off.")]
MinP = Annotated[float, typer.Option(help="For requests that do not say; 0 is off.")]
Seed = Annotated[int, typer.Option(help="Seed of the run: requests without a seed get one from it and their index.")]
JsonSchema = Annotated[
    str | None,
    typer.Option(help="JSON schema, or a file with one, that the answers of requests that do not say are held to."),
]
GrammarFile = Annotated[
    Path | None, typer.Option(help="File with a GBNF grammar that the answers of requests that do not say are held to.")
]
ChatTemplate = Annotated[Path | None, typer.Option(help="File with a Jinja chat template that replaces the model's.")]
PoolingOption = Annotated[
    Pooling | None,
    typer.Option(help="How an embedding is made of those of its tokens. [default: as the model says, else mean]"),
]
Stage = Annotated[
    Staging,
    typer.Option(help="Give every node a copy of the model, read once. auto: if it is on a network file system."),
]
StageDir = Annotated[
    str | None,
    typer.Option(help="Folder of every node for copies. [default: $SLURM_TMPDIR, $TMPDIR or /dev/shm]"),
]
Fanout = Annotated[
    int,
    typer.Option(
        help="Where more ranks than these are started, rank 0 speaks to one rank for each so many of a host, which "
        "passes on what it and the others have to say."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]


@app.command()
@takes(EngineOptions)
def batch(
    chosen: EngineOptions,
    context: typer.Context,
    model: Annotated[str, typer.Option("-m", "--model", help="GGUF file.", show_default=False)] = "",
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
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Do this run again: same model, input and options, unless given anew; then say what differed.",
        ),
    ] = None,
    schedule: Annotated[Schedule, typer.Option(help="How requests find workers.")] = Schedule.work_stealing,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Ranks to start, where llmpi starts its own mpirun. [default: one a GPU]"),
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
    stage: Stage = Staging.auto,
    stage_dir: StageDir = None,
    input_format: Annotated[
        InputFormat | None,
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
        EngineKind,
        typer.Option(
            help="'simulated' computes nothing, needs no model, and takes as long as --service-times say: for studies "
            "and tests, its answers mean nothing."
        ),
    ] = EngineKind.llama,
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
        OnLimit, typer.Option(help="When time is up: 'requeue' has Slurm put the job back into its queue.")
    ] = OnLimit.stop,
    show: Annotated[int, typer.Option(min=0, help="Answers to print at the end.")] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every request of a file exactly once, on all ranks."""
    from coordinator.batch import replayed, run_batch
    from coordinator.batchoptions import BatchOptions
    from coordinator.config import JobConfig, checked_sampling
    from coordinator.rows import Columns
    from coordinator.timekeeper import StopOptions
    from coordinator.timelimit import parse_time_limit

    limit_s = None if time_limit is None else parse_time_limit(time_limit)
    config = JobConfig(
        model=model, schedule=schedule.value, ranks_per_gpu=ranks_per_gpu, coordinator_works=coordinator_works,
        sampling=checked_sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **held_to(json_schema, grammar_file)
        ),
        max_tokens=max_tokens, seed=seed, copies=copies, prefetch=prefetch, fanout=fanout, lease_s=lease,
        rank0_lease_s=rank0_lease,
        engine_lease_s=engine_lease, request_timeout_s=request_timeout, max_deaths=max_deaths,
        commit_interval_s=commit_interval, commit_bytes=commit_bytes, metrics_interval_s=metrics_interval,
        precheck=precheck, chat_template=read_text("--chat-template", chat_template),
        engine=engine.value, service_times=None if service_times is None else str(service_times), time_scale=time_scale,
        pooling=None if pooling is None else pooling.value, stage=stage.value, stage_dir=stage_dir, **chosen.job(),
    )  # fmt: skip
    needed: dict[str, Path | str | None] = {"-m/--model": model, "-i/--input": requests, "-o/--output": output}
    refuse_missing(needed if replay is None else {"-o/--output": output})
    options = BatchOptions(
        input=requests or Path(), output=output or Path(), format=None if input_format is None else input_format.value,
        columns=Columns(prompt_column, template, id_column), ranks=ranks, show=show, quiet=quiet, as_json=as_json,
        stopping=StopOptions(
            drain_timeout_s=drain_timeout, on_limit=on_limit.value,
            time_limit_s=limit_s, slurm_limit=time_limit is None or limit_s is not None,
        ),
    )  # fmt: skip
    if replay is not None:
        config, options = replayed(replay, config, options, given_on_command_line(context))
    raise typer.Exit(run_batch(config, options, sys.argv[1:]))


@app.command()
@takes(GeneratingOptions)
def infer(
    chosen: GeneratingOptions,
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The user's message ('-' reads standard input).")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is made.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    echo: Annotated[
        bool,
        typer.Option(
            "--echo",
            help="With --raw: the prompt before the answer; with --logprobs and --max-tokens 0 or 1 also its "
            "log-probabilities.",
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: each token's log-probability and those of the N likeliest ones."),
    ] = None,
    continuation: Annotated[
        list[str] | None,
        typer.Option(help="Do not answer: how likely is this text after the prompt as it is? May be given again."),
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    json_schema: JsonSchema = None,
    grammar_file: GrammarFile = None,
    chat_template: ChatTemplate = None,
    stage: Stage = Staging.auto,
    stage_dir: StageDir = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and print the answer."""
    from coordinator.config import JobConfig, checked_sampling
    from coordinator.infer import run_infer, run_score

    config = JobConfig(
        model=model, slots=1, max_tokens=max(max_tokens, 1) if echo else max_tokens, seed=seed, stage=stage.value,
        stage_dir=stage_dir, chat_template=read_text("--chat-template", chat_template),
        sampling=checked_sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **held_to(json_schema, grammar_file)
        ),
        **chosen.job(),
    )  # fmt: skip
    text = sys.stdin.read() if prompt == "-" else prompt
    if continuation:
        refuse_beside_continuation(
            {
                "--system": system,
                "--stream": stream,
                "--echo": echo,
                "--json-schema": json_schema,
                "--grammar-file": grammar_file,
            }
        )
        raise typer.Exit(run_score(config, text, continuation, logprobs, as_json))
    done = run_infer(
        config, text, system=system, raw=raw, echo=echo, max_tokens=max_tokens, stream=stream, logprobs=logprobs,
        as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(done)


@app.command()
@takes(ModelOptions)
def embed(
    chosen: ModelOptions,
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("-p", "--prompt", help="A text; may be given again. '-' reads them, a line each.")
    ],
    dimensions: Annotated[
        int | None, typer.Option(help="First numbers to keep, of models trained for it. [default: all]")
    ] = None,
    pooling: PoolingOption = None,
    stage: Stage = Staging.auto,
    stage_dir: StageDir = None,
    as_json: AsJson = False,
) -> None:
    """Print the embedding of each text, a JSON list a line."""
    from coordinator.config import JobConfig
    from coordinator.embed import run_embed

    config = JobConfig(
        model=model, slots=1, pooling=None if pooling is None else pooling.value, embeddings=True, stage=stage.value,
        stage_dir=stage_dir, **chosen.job(),
    )  # fmt: skip
    texts = sys.stdin.read().splitlines() if prompt == ["-"] else prompt
    raise typer.Exit(run_embed(config, texts, dimensions=dimensions, as_json=as_json))


@app.command()
def status(run_dir: RunDirectory, as_json: AsJson = False) -> None:
    """Say how far a run is: exit 0 if all is answered, 1 if some failed, 3 if it can be resumed."""
    from coordinator.rundirs import show_status

    raise typer.Exit(show_status(run_dir, as_json) if detect(os.environ).speaks else EXIT_OK)


@app.command()
def stop(
    run_dir: RunDirectory,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the job has ended; then exit as `llmpi status` does.")
    ] = False,
) -> None:
    """Drain a running job: nothing new is started, what runs is finished if it can be, the run can be resumed."""
    from coordinator.rundirs import stop_run

    raise typer.Exit(stop_run(run_dir, wait) if detect(os.environ).speaks else EXIT_OK)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories of batches.")],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Page with pictures to write. [default: report.html in RUN_DIR; of several runs, in this folder]"
        ),
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Tables only.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Answers to print as well.")] = 0,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make metrics.h5 anew from the record.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the tables of a run, or of several side by side, and write a page with pictures.

    metrics.h5 is made from the record and the segments where it is missing or older.
    """
    from coordinator.reporting import ReportOptions, show_report

    options = ReportOptions(html=html, no_html=no_html, show=show, rebuild=rebuild, as_json=as_json)
    raise typer.Exit(show_report(run_dirs, options) if detect(os.environ).speaks else EXIT_OK)


@app.command()
def export(
    run_dir: RunDirectory,
    order: Annotated[Order, typer.Option(help="'input' sorts the answers like the requests.")] = Order.input,
    to: Annotated[
        Table | None,
        typer.Option(help="A table with a row an answer: text, how it ended, tokens, times. [default: no table]"),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write. [default: stdout]")] = None,
) -> None:
    """Write the answers as OpenAI batch output, a line each, or as a table."""
    from coordinator.rundirs import export_answers

    if not detect(os.environ).speaks:
        raise typer.Exit(EXIT_OK)
    raise typer.Exit(export_answers(run_dir, order.value, output, None if to is None else to.value))


@bench.command("dispatch")
def bench_dispatch(
    requests: Annotated[int, typer.Option(help="Requests to send through.")] = 100_000,
    prompt_bytes: Annotated[int, typer.Option(help="Size of each prompt.")] = 1000,
    answer_bytes: Annotated[int, typer.Option(help="Size of each answer.")] = 200,
    slots: Annotated[int, typer.Option(help="Slots of each null engine.")] = 256,
    peer_requests: Annotated[
        int, typer.Option(help="Requests for the peer, MPICommExecutor one by one; 0 leaves it out.")
    ] = 10_000,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory. [default: a temporary one]")
    ] = None,
    schedule: Annotated[Schedule, typer.Option(help="How requests find workers.")] = Schedule.work_stealing,
    fanout: Fanout = 256,
    as_json: AsJson = False,
) -> None:
    """Measure control plane, transport and durable record with an engine that answers at once."""
    from coordinator.bench_dispatch import run_bench_dispatch

    raise typer.Exit(
        run_bench_dispatch(
            requests=requests, prompt_bytes=prompt_bytes, answer_bytes=answer_bytes, slots=slots,
            peer_requests=peer_requests, output=output, schedule=schedule.value, fanout=fanout, as_json=as_json,
        )
    )  # fmt: skip


@bench.command("engine")
@takes(EngineOptions)
def bench_engine(
    chosen: EngineOptions,
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
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
    """Measure one engine: tokens a second, the parts of a step, and llama.cpp's own benchmark beside it."""
    from coordinator.bench_engine import run_bench_engine
    from coordinator.bench_load import Load
    from coordinator.calibrate import CTX_TOKENS, run_calibrate
    from coordinator.config import JobConfig, checked_sampling

    most = output_tokens_max if sigma else output_tokens
    sampling = checked_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    given = chosen.job()
    if calibrate:
        given |= {"ctx": CTX_TOKENS if given["ctx"] == "auto" else given["ctx"], "speculate": False}
    config = JobConfig(model=model, seed=seed, **given)
    if calibrate:
        raise typer.Exit(run_calibrate(config, sampling, repeats=repeats, output=output, as_json=as_json))
    load = Load(
        requests=requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens, output_tokens_max=most,
        sigma=sigma, shared_prefix_tokens=shared_prefix, interrupt_tokens=interrupt_tokens,
        interrupt_every_s=interrupt_every, concurrency=concurrency, sampling=sampling, seed=seed,
    )  # fmt: skip
    sequences = numbers_of("--peer-sequences", peer_sequences)
    code = run_bench_engine(
        config, load, repeats=repeats, peers=peers, sequences=sequences, as_json=as_json
    )  # fmt: skip
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"llmpi {version_of('llmpi')}")
        raise typer.Exit(0)


def _told(launch: Launch, text: str, code: int) -> int:
    """Say what concerns all ranks on one, which also carries the status.

    mpirun ends the job at the first status that is not 0: another rank's would cut off what this one has to say.
    """
    if not launch.speaks:
        return EXIT_OK
    print(text, file=sys.stderr, flush=True)
    return code


def _usage_text(error: typer.TyperException) -> str:
    """What was mistyped, in one line; or the help that was asked for by giving nothing."""
    context = getattr(error, "ctx", None)
    if context is None:
        return f"llmpi: {error.format_message()}"
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(context.get_help())
    return f"llmpi: {error.format_message()} (`{context.command_path} --help` lists what there is)"


def main() -> None:
    """Entry point: run a command, print what a person should know of a failure, exit with its code."""
    sys.exit(_run())


def _run() -> int:
    launch = detect(os.environ)
    try:
        result = app(standalone_mode=False, prog_name="llmpi")
        return result if isinstance(result, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        return _told(launch, _usage_text(error), EXIT_USAGE)
    except LlmpiError as error:
        return _told(launch, f"llmpi: {error}", error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left; Python's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INFRASTRUCTURE
    except Exception:
        print(f"llmpi: an error of its own (please report it):\n{traceback.format_exc()}", file=sys.stderr)
        return EXIT_INFRASTRUCTURE
