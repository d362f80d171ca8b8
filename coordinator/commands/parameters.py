"""Parameters that several commands take, with their help. Those of an engine are in `coordinator.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Schedule = Annotated[Literal["round-robin", "work-stealing"], typer.Option(help="How requests find workers.")]
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
    Literal["mean", "cls", "last"] | None,
    typer.Option(help="How an embedding is made of those of its tokens. [default: as the model says, else mean]"),
]
Stage = Annotated[
    Literal["never", "auto", "always"],
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
