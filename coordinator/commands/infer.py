"""`llmpi infer` and `llmpi embed`, for what is on the command line itself: parsing and help."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from coordinator.commands.engine_options import GeneratingOptions, ModelOptions
from coordinator.commands.groups import takes_groups
from coordinator.commands.job_options import AnswerOptions, StagingOptions
from coordinator.commands.parameters import AsJson, Model, PoolingOption
from coordinator.values import refuse_beside_continuation

GREEDY = AnswerOptions(temperature=0.0)


@takes_groups
def infer(
    *,
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
    answers: AnswerOptions = GREEDY,
    chosen: GeneratingOptions,
    staging: StagingOptions,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and print the answer."""
    from coordinator.config import JobConfig
    from coordinator.infer import run_infer, run_score

    asked = answers.job() | ({"max_tokens": max(answers.max_tokens, 1)} if echo else {})
    config = JobConfig(model=model, slots=1, **asked, **chosen.job(), **staging.job())
    text = sys.stdin.read() if prompt == "-" else prompt
    if continuation:
        refuse_beside_continuation(
            {
                "--system": system,
                "--stream": stream,
                "--echo": echo,
                "--stop": answers.stop,
                "--json-schema": answers.json_schema,
                "--grammar-file": answers.grammar_file,
            }
        )
        raise typer.Exit(run_score(config, text, continuation, logprobs, as_json))
    done = run_infer(
        config, text, system=system, raw=raw, echo=echo, max_tokens=answers.max_tokens, stream=stream,
        logprobs=logprobs, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(done)


@takes_groups
def embed(
    *,
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("-p", "--prompt", help="A text; may be given again. '-' reads them, a line each.")
    ],
    dimensions: Annotated[
        int | None, typer.Option(help="First numbers to keep, of models trained for it. [default: all]")
    ] = None,
    pooling: PoolingOption = None,
    chosen: ModelOptions,
    staging: StagingOptions,
    as_json: AsJson = False,
) -> None:
    """Print the embedding of each text, a JSON list a line."""
    from coordinator.config import JobConfig
    from coordinator.embed import run_embed

    config = JobConfig(model=model, slots=1, pooling=pooling, embeddings=True, **chosen.job(), **staging.job())
    texts = sys.stdin.read().splitlines() if prompt == ["-"] else prompt
    raise typer.Exit(run_embed(config, texts, dimensions=dimensions, as_json=as_json))
