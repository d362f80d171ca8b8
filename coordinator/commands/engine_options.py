"""The options of an engine, with their help, written down once for all commands that start one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import typer

from coordinator.commands.groups import OptionGroup
from coordinator.commands.sections import DECODING, MODEL, OPTIONS, section
from workers.loading import CacheType, RopeScaling, Split

_of_model = section(MODEL)
_of_decoding = section(DECODING)


def auto_or_number(text: str) -> int | str:
    """A whole number, or the word. Typer says which option it was."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'") from None


def _auto(title: str, help: str) -> Any:
    return section(title)(parser=auto_or_number, metavar="N|auto", help=help)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """How a model is loaded and what its contexts are like. 'auto' is chosen by what fits (docs/fitting.md)."""

    ctx: Annotated[Any, _auto(OPTIONS, "Tokens that prompt and answer may have together. auto: by the requests.")] = (
        "auto"
    )
    threads: Annotated[int | None, _of_model(help="CPU threads of each worker. [default: its share of the host]")] = (
        None
    )
    gpu_layers: Annotated[Any, _auto(MODEL, "Layers on the GPU; -1 is all. auto: as many as fit.")] = "auto"
    flash_attention: Annotated[
        bool | None, _of_model("--flash-attention/--no-flash-attention", help="[default: llama.cpp decides]")
    ] = None
    cache_type: Annotated[
        CacheType | None, _of_model(help="Type of cached keys and values; other than f16 needs less memory.")
    ] = None
    cache_type_k: Annotated[CacheType | None, _of_model(help="Of the keys alone. [default: --cache-type]")] = None
    cache_type_v: Annotated[
        CacheType | None,
        _of_model(help="Of the values alone; other than f16 needs flash attention. [default: --cache-type]"),
    ] = None
    lora: Annotated[
        list[str] | None,
        _of_model(metavar="PATH[:SCALE]", help="LoRA adapter (GGUF) for all requests; may be given several times."),
    ] = None
    rope_scaling: Annotated[
        RopeScaling | None,
        _of_model(help="How positions beyond the training context are met. [default: the model's]"),
    ] = None
    rope_scale: Annotated[
        float | None, _of_model(help="How many times its training context a model may have, with --rope-scaling.")
    ] = None
    rope_freq_base: Annotated[float | None, _of_model(help="Base frequency of positions. [default: the model's]")] = (
        None
    )
    device: Annotated[Literal["auto", "gpu", "cpu"], _of_model(help="'gpu' insists on one, 'cpu' uses none.")] = "auto"
    gpus_per_rank: Annotated[int, _of_model(help="GPUs of each worker, for a model that needs several.")] = 1
    split: Annotated[Split, _of_model(help="How a model is divided among the GPUs of a worker.")] = "layer"

    def job(self) -> dict[str, Any]:
        given = asdict(self)
        both = given.pop("cache_type") or "f16"
        given |= {name: given[name] or both for name in ("cache_type_k", "cache_type_v")}
        return given | {"loras": tuple(given.pop("lora") or ())}


@dataclass(frozen=True, kw_only=True)
class GeneratingOptions(ModelOptions):
    """And how it goes on with a text."""

    speculate: Annotated[
        bool,
        _of_decoding(
            "--speculate/--no-speculate",
            help="Guess several tokens ahead and check them at once, where few requests run and it is faster.",
        ),
    ] = True
    draft_model: Annotated[
        str | None, _of_decoding(help="GGUF file of a smaller model with the same tokenizer, which guesses.")
    ] = None
    draft_max: Annotated[int, _of_decoding(help="Most tokens guessed at once for a sequence.")] = 15


@dataclass(frozen=True, kw_only=True)
class EngineOptions(GeneratingOptions):
    """And how many sequences it runs at once."""

    prefix_reuse: Annotated[
        bool,
        _of_decoding("--prefix-reuse/--no-prefix-reuse", help="Read once what prompts begin with in common."),
    ] = True

    gpu_sampling: Annotated[
        bool,
        _of_decoding("--gpu-sampling/--no-gpu-sampling", help="Find the likeliest tokens on the GPU, if there is one."),
    ] = True
    slots: Annotated[
        Any, _auto(OPTIONS, "Sequences decoded at once by each worker. auto: as many as fit and are of use.")
    ] = "auto"
    contexts: Annotated[
        int | None,
        _of_decoding(
            help="Contexts over the one loaded model, a thread each. [default: 1 on a CPU, 1 to 4 on a GPU, by slots]"
        ),
    ] = None
    batch: Annotated[int, _of_decoding(help="Most tokens in one decode step.")] = 4096
    ubatch: Annotated[
        int | None, _of_decoding(help="Most tokens llama.cpp computes at once. [default: 512 on a CPU, 2048 on a GPU]")
    ] = None
