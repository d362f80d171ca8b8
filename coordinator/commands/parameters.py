"""Parameters that several commands take, one by one, with their help. Groups of them are in `job_options` and
`engine_options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from coordinator.commands.sections import INPUT, MODEL, RANKS, section

Schedule = Annotated[Literal["round-robin", "work-stealing"], section(RANKS)(help="How requests find workers.")]
RanksPerGpu = Annotated[int, section(RANKS)(help="Workers that share a GPU.")]
Model = Annotated[
    str,
    typer.Option("-m", "--model", help="GGUF file, or a model of the store (`llmpi models ls`).", show_default=False),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory of a batch.")]
PoolingOption = Annotated[
    Literal["mean", "cls", "last"] | None,
    section(MODEL)(help="How an embedding is made of those of its tokens. [default: as the model says, else mean]"),
]
StageDir = Annotated[
    str | None,
    section(MODEL)(help="Folder of every node for copies. [default: $SLURM_TMPDIR, $TMPDIR or /dev/shm]"),
]
Fanout = Annotated[
    int,
    section(RANKS)(
        help="Where more ranks than these are started, rank 0 speaks to one rank for each so many of a host, which "
        "passes on what it and the others have to say."
    ),
]
PromptColumn = Annotated[
    str | None, section(INPUT)(metavar="NAME", help="Column, or field, with the prompt. [default: prompt]")
]
InputFormat = Annotated[
    Literal["jsonl", "text", "csv", "tsv", "parquet"] | None,
    section(INPUT)("--format", help="How the input is written. [default: by its name, else by its content]"),
]
Copies = Annotated[
    bool | None,
    section(RANKS)(
        "--copies/--no-copies",
        help="Near the end, start what runs on a slow rank again on an idle one, where that is expected to end "
        "sooner; the first answer counts. [default: with work stealing]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
