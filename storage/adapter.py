"""Look at a LoRA adapter before llama.cpp does: is it one, and is it made for this model.

An adapter is a GGUF file with pairs of small matrices, `<weight>.lora_a` and `<weight>.lora_b`, for some weights of a
model: the weight W (rows of `inputs` values) becomes W + scale * alpha / rank * B A, with A of (rank, inputs) and B of
(outputs, rank). Only headers are read. Nothing here knows llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from scheduling.errors import ModelFileError
from storage.gguf import GgufInfo
from storage.ggufheader import Header, read_header
from storage.ggufreader import shown

_A, _B = ".lora_a", ".lora_b"
_NORMS = "_norm.weight"
"""Norms that an adapter may carry; llama.cpp passes over them."""


def check_adapter(path: Path, model: GgufInfo) -> int:
    """Check that `path` is a LoRA adapter for `model`. Returns the bytes of its weights.

    Raises ModelFileError: missing, no GGUF, damaged, no adapter, of another kind, for another model.
    """
    header = read_header(path, "adapter")
    _check_kind(path, header)
    architecture = header.values.get("general.architecture")
    if architecture != model.architecture:
        raise ModelFileError(
            f"the adapter {path} is for the architecture {shown(str(architecture))}, and {model.path} is "
            f"{model.architecture}. Give an adapter that was made from this model."
        )
    pairs = _pairs(path, header)
    for weight, (a, b) in pairs.items():
        _check_pair(path, model, weight, a, b)
    return sum(header.sizes.values())


def _check_kind(path: Path, header: Header) -> None:
    if header.values.get("general.type") != "adapter":
        raise ModelFileError(f"{path} is no adapter (general.type is not 'adapter'). A model is given with -m.")
    kind = header.values.get("adapter.type")
    if kind != "lora":
        raise ModelFileError(f"the adapter {path} is of the type {kind!r}. Give a LoRA adapter.")
    if not isinstance(header.values.get("adapter.lora.alpha", 0.0), float):
        raise ModelFileError(f"the adapter {path} is damaged: its adapter.lora.alpha is no number. Convert it again.")
    if header.lengths.get("adapter.alora.invocation_tokens"):
        raise ModelFileError(
            f"the adapter {path} is to be switched on by tokens of the prompt (aLoRA), which is not done here. Give "
            "one that is always on."
        )


def _pairs(path: Path, header: Header) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of both matrices for each weight that the adapter changes."""
    weights = {name.removesuffix(end) for name in header.shapes for end in (_A, _B) if name.endswith(end)}
    for name in header.shapes:
        if not name.endswith((_A, _B, _NORMS)):
            raise ModelFileError(f"the adapter {path} has a tensor {name!r}, which no LoRA has. Convert it again.")
    if not weights:
        raise ModelFileError(f"the adapter {path} changes no weight. Convert it again.")
    for weight in sorted(weights):
        for end in (_A, _B):
            if weight + end not in header.shapes:
                raise ModelFileError(f"the adapter {path} lacks {weight + end}. Convert it again.")
    return {weight: (header.shapes[weight + _A], header.shapes[weight + _B]) for weight in sorted(weights)}


def _check_pair(path: Path, model: GgufInfo, weight: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    shape = model.tensor_shapes.get(weight)
    if shape is None:
        raise ModelFileError(
            f"the adapter {path} changes {weight}, which {model.path} lacks. Give the adapter's model."
        )
    if len(shape) < 2 or len(a) < 2 or len(b) < 2:
        fits = False
    elif weight == "token_embd.weight":
        # A and B change places where rows are looked up instead of multiplied.
        fits = shape[0] == b[1] and shape[1] == a[1]
    else:
        fits = shape[0] == a[0] and shape[1] == b[1] and a[1] == b[0]
    if not fits:
        raise ModelFileError(
            f"the adapter {path} does not fit {weight}: matrices of {a} and {b}, weights of {shape}. Give an adapter "
            "that was made from this model."
        )
