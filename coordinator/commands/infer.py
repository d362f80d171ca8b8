"""`llmpi infer` and `llmpi embed`, for what is on the command line itself: parsing and help."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from coordinator.commands.parameters import (
    AsJson,
    ChatTemplate,
    GrammarFile,
    JsonSchema,
    MaxTokens,
    MinP,
    Model,
    PoolingOption,
    Seed,
    Stage,
    StageDir,
    Temperature,
    TopK,
    TopP,
)
from coordinator.options import GeneratingOptions, ModelOptions, takes
from coordinator.values import held_to, read_text, refuse_beside_continuation


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
    stage: Stage = "auto",
    stage_dir: StageDir = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and print the answer."""
    from coordinator.config import JobConfig, checked_sampling
    from coordinator.infer import run_infer, run_score

    config = JobConfig(
        model=model, slots=1, max_tokens=max(max_tokens, 1) if echo else max_tokens, seed=seed, stage=stage,
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
    stage: Stage = "auto",
    stage_dir: StageDir = None,
    as_json: AsJson = False,
) -> None:
    """Print the embedding of each text, a JSON list a line."""
    from coordinator.config import JobConfig
    from coordinator.embed import run_embed

    config = JobConfig(
        model=model, slots=1, pooling=pooling, embeddings=True, stage=stage,
        stage_dir=stage_dir, **chosen.job(),
    )  # fmt: skip
    texts = sys.stdin.read().splitlines() if prompt == ["-"] else prompt
    raise typer.Exit(run_embed(config, texts, dimensions=dimensions, as_json=as_json))
