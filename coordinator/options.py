"""The options of an engine, with their help, written down once for all commands that start one.

Typer reads what a command takes from its signature. A command decorated with `takes` has a first parameter for a group
of options, one of the dataclasses here; on the command line each field of the group is an option of its own. A group's
`job()` gives the fields of `JobConfig` that it decides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from workers.loading import CacheType, RopeScaling, Split

Group = TypeVar("Group", bound="ModelOptions")


def auto_or_number(text: str) -> int | str:
    """A whole number, or the word. Typer says which option it was."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'") from None


def _auto(help: str, *names: str) -> Any:
    return typer.Option(*names, parser=auto_or_number, metavar="N|auto", help=help)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded and what its contexts are like. 'auto' is chosen by what fits (docs/fitting.md)."""

    ctx: Annotated[Any, _auto("Tokens that prompt and answer may have together. auto: by the requests.")] = "auto"
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each worker. [default: its share of the host]")
    ] = None
    gpu_layers: Annotated[Any, _auto("Layers on the GPU; -1 is all. auto: as many as fit.")] = "auto"
    flash_attention: Annotated[
        bool | None, typer.Option("--flash-attention/--no-flash-attention", help="[default: llama.cpp decides]")
    ] = None
    cache_type: Annotated[
        CacheType | None, typer.Option(help="Type of cached keys and values; other than f16 needs less memory.")
    ] = None
    cache_type_k: Annotated[CacheType | None, typer.Option(help="Of the keys alone. [default: --cache-type]")] = None
    cache_type_v: Annotated[
        CacheType | None,
        typer.Option(help="Of the values alone; other than f16 needs flash attention. [default: --cache-type]"),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:SCALE]", help="LoRA adapter (GGUF) for all requests; may be given several times."),
    ] = None
    rope_scaling: Annotated[
        RopeScaling | None,
        typer.Option(help="How positions beyond the training context are met. [default: the model's]"),
    ] = None
    rope_scale: Annotated[
        float | None, typer.Option(help="How many times its training context a model may have, with --rope-scaling.")
    ] = None
    rope_freq_base: Annotated[
        float | None, typer.Option(help="Base frequency of positions. [default: the model's]")
    ] = None
    device: Annotated[Literal["auto", "gpu", "cpu"], typer.Option(help="'gpu' insists on one, 'cpu' uses none.")] = (
        "auto"
    )
    gpus_per_rank: Annotated[int, typer.Option(help="GPUs of each worker, for a model that needs several.")] = 1
    split: Annotated[Split, typer.Option(help="How a model is divided among the GPUs of a worker.")] = "layer"

    def job(self) -> dict[str, Any]:
        """Fields of `JobConfig`."""
        given = asdict(self)
        both = given.pop("cache_type") or "f16"
        given |= {name: given[name] or both for name in ("cache_type_k", "cache_type_v")}
        return given | {"loras": tuple(given.pop("lora") or ())}


@dataclass(frozen=True, kw_only=True)
class GeneratingOptions(ModelOptions):
    """And how it goes on with a text."""

    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate/--no-speculate",
            help="Guess several tokens ahead and check them at once, where few requests run and it is faster.",
        ),
    ] = True
    draft_model: Annotated[
        str | None, typer.Option(help="GGUF file of a smaller model with the same tokenizer, which guesses.")
    ] = None
    draft_max: Annotated[int, typer.Option(help="Most tokens guessed at once for a sequence.")] = 15


@dataclass(frozen=True, kw_only=True)
class EngineOptions(GeneratingOptions):
    """And how many sequences it runs at once."""

    prefix_reuse: Annotated[
        bool,
        typer.Option("--prefix-reuse/--no-prefix-reuse", help="Read once what prompts begin with in common."),
    ] = True

    gpu_sampling: Annotated[
        bool,
        typer.Option("--gpu-sampling/--no-gpu-sampling", help="Find the likeliest tokens on the GPU, if there is one."),
    ] = True
    slots: Annotated[Any, _auto("Sequences decoded at once by each worker. auto: as many as fit and are of use.")] = (
        "auto"
    )
    contexts: Annotated[
        int | None,
        typer.Option(help="Contexts over the one loaded model, a thread each. [default: 1 on a CPU, 2 on a GPU]"),
    ] = None
    batch: Annotated[int, typer.Option(help="Most tokens in one decode step.")] = 4096
    ubatch: Annotated[
        int | None, typer.Option(help="Most tokens llama.cpp computes at once. [default: 512 on a CPU, 2048 on a GPU]")
    ] = None


def given_on_command_line(context: typer.Context) -> frozenset[str]:
    """Names of the parameters of a command that were given, also where they have their default's value."""
    return frozenset(
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    )


def takes(group: type[Group]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first parameter is a `group`, an option for each field of the group."""

    def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(group, include_extras=True)
        options = [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if one.default is MISSING else one.default,
                annotation=hints[one.name],
            )
            for one in fields(group)
        ]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {one.name: given.pop(one.name) for one in options}
            command(group(**chosen), **given)

        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return run

    return spelled_out
