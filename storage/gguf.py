"""Look at a model before llama.cpp does: is it a GGUF, is it whole, are all parts there, and what is in it.

llama.cpp aborts or reads out of bounds on some damaged files, and says little on others; here each becomes one
clear ModelFileError. Headers are read by `storage.ggufheader`; tensor data is never read, except in samples by
`fingerprint`. Nothing here knows llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from scheduling.errors import ModelFileError
from scheduling.modelsize import ModelShape
from storage.ggufheader import ARRAY_KEPT, Header, open_model, read_header

_SAMPLE_BYTES, _SAMPLES, _EDGE_BYTES = 1 << 16, 16, 1 << 20
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_INPUTS = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")
"""Tensors of the input layer, which llama.cpp leaves in the host's memory."""
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufInfo:
    """What is known of a model from its header. None: the file does not say.

    `parts` are its files, one unless it is split; `file_bytes` their sizes together. `kv_bytes_per_token` is what
    one token takes in a KV cache of 16-bit floats over all layers; None where the architecture keeps another kind
    of state. Where the model attends to a window, it is the upper bound. `shape` is what fitting works with;
    `tensor_shapes` are those of all weights, by name.
    """

    path: Path
    parts: tuple[Path, ...]
    file_bytes: int
    architecture: str
    name: str | None
    context_tokens: int | None
    embedding_length: int | None
    blocks: int | None
    heads: int | None
    kv_heads: int | None
    vocab_tokens: int | None
    chat_template: bool
    tensors: int
    parameters: int
    kv_bytes_per_token: int | None
    shape: ModelShape
    tensor_shapes: dict[str, tuple[int, ...]] = field(repr=False)


def check_gguf(path: Path) -> GgufInfo:
    """Read and check the header of a model, and of all its parts if it is split.

    Raises ModelFileError: missing, a directory, unreadable, not a GGUF, of an unknown version, damaged, truncated,
    a part missing, no weights.
    """
    path = Path(path)
    header = read_header(path)
    parts = _parts(path, header)
    headers = [header] + [read_header(part) for part in parts[1:]]
    for number, (part, found) in enumerate(zip(parts, headers, strict=True)):
        if len(parts) > 1 and (_int(found, "split.no") or 0, _int(found, "split.count")) != (number, len(parts)):
            raise ModelFileError(f"{part} is not part {number + 1} of {len(parts)} by its own header. Fetch it again.")
    shapes = {name: shape for found in headers for name, shape in found.shapes.items()}
    sizes = {name: size for found in headers for name, size in found.sizes.items()}
    if not shapes:
        raise ModelFileError(f"{path} holds no weights, only a vocabulary or metadata. Give a whole model.")
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileError(f"{path} does not say its architecture (general.architecture). Give another file.")
    if header.values.get("general.type") == "adapter":
        raise ModelFileError(f"{path} is an adapter, not a model. Give it with --lora, and its model with -m.")
    name = header.values.get("general.name")
    cache = _cache_values(header, architecture)
    return GgufInfo(
        path=path,
        parts=parts,
        file_bytes=sum(found.file_bytes for found in headers),
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        context_tokens=_int(header, f"{architecture}.context_length"),
        embedding_length=_int(header, f"{architecture}.embedding_length"),
        blocks=_int(header, f"{architecture}.block_count"),
        heads=_largest(header, f"{architecture}.attention.head_count"),
        kv_heads=_largest(header, f"{architecture}.attention.head_count_kv"),
        vocab_tokens=header.lengths.get("tokenizer.ggml.tokens") or _int(header, f"{architecture}.vocab_size"),
        chat_template="tokenizer.chat_template" in header.keys,
        tensors=sum(len(found.shapes) for found in headers),
        parameters=sum(found.parameters for found in headers),
        kv_bytes_per_token=None if cache is None else 2 * sum(keys + values for keys, values in cache),
        shape=_shape(header, architecture, cache, sizes),
        tensor_shapes=shapes,
    )


def fingerprint(path: Path) -> str:
    """'sampled-sha256:<hex>' over size, first and last MiB and 16 samples of 64 KiB, of every part of a model.

    Tells models apart at the cost of 3 MiB of reading; no proof that all bytes are equal. Files of up to 3 MiB are
    hashed whole. Raises ModelFileError.
    """
    path = Path(path)
    found = _PART.fullmatch(path.name)
    parts = _part_names(path, int(found[3])) if found else (path,)
    digest = hashlib.sha256()
    for part in parts:
        with open_model(part) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(struct.pack("<Q", size))
            for start, length in _sampled(size):
                file.seek(start)
                digest.update(file.read(length))
    return "sampled-sha256:" + digest.hexdigest()


def _sampled(size: int) -> list[tuple[int, int]]:
    """(start, length) of what `fingerprint` reads of a file."""
    if size <= 2 * _EDGE_BYTES + _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    between = size - 2 * _EDGE_BYTES - _SAMPLE_BYTES
    spread = [(_EDGE_BYTES + between * k // (_SAMPLES - 1), _SAMPLE_BYTES) for k in range(_SAMPLES)]
    return [(0, _EDGE_BYTES), *spread, (size - _EDGE_BYTES, _EDGE_BYTES)]


# ---------------------------------------------------------------- parts and figures


def _parts(path: Path, header: Header) -> tuple[Path, ...]:
    """All files of a model, this first. Raises ModelFileError if one is missing or this is not the first."""
    named = _PART.fullmatch(path.name)
    count = _int(header, "split.count") or 1
    if count == 1 and (named is None or int(named[3]) == 1):
        return (path,)
    if named is None or int(named[3]) != count:
        raise ModelFileError(
            f"{path} is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf, by which "
            "the others are found. Give the files their original names."
        )
    parts = _part_names(path, count)
    if int(named[2]) != 1:
        raise ModelFileError(f"{path} is part {int(named[2])} of {count}. Give the first one, {parts[0]}.")
    for part in parts:
        if not part.is_file():
            raise ModelFileError(f"the model {path} has {count} parts and {part.name} is not there. Fetch it.")
    return parts


def _part_names(path: Path, count: int) -> tuple[Path, ...]:
    stem = path.name[: -len("-00001-of-00001.gguf")]
    return tuple(path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def _int(header: Header, key: str) -> int | None:
    value = header.values.get(key)
    return value if isinstance(value, int) else None


def _largest(header: Header, key: str) -> int | None:
    """A number that may differ from layer to layer."""
    numbers = _per_layer(header, key, 1)
    return max(numbers) if numbers else None


def _per_layer(header: Header, key: str, layers: int) -> list[int]:
    """A number of each layer, whether the file has one for all or a list; empty if it has none."""
    value = header.values.get(key)
    if isinstance(value, int):
        return [value] * layers
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _cache_values(header: Header, architecture: str) -> tuple[tuple[int, int], ...] | None:
    """KV heads x key length, and x value length, of each layer."""
    attention = f"{architecture}.attention"
    recurrent = any(key.startswith((f"{architecture}.ssm.", f"{architecture}.wkv.")) for key in header.keys)
    if recurrent or f"{attention}.kv_lora_rank" in header.keys:
        return None
    layers = _int(header, f"{architecture}.block_count")
    lengths = _head_lengths(header, architecture)
    if not layers or lengths is None or layers > ARRAY_KEPT:
        return None
    kv_heads = _per_layer(header, f"{attention}.head_count_kv", layers)
    if not kv_heads:
        kv_heads = _per_layer(header, f"{attention}.head_count", layers)
    if len(kv_heads) != layers:
        return None
    return tuple((heads * lengths[0], heads * lengths[1]) for heads in kv_heads)


def _head_lengths(header: Header, architecture: str) -> tuple[int, int] | None:
    """Values of a head's key and of its value."""
    attention = f"{architecture}.attention"
    embedding = _int(header, f"{architecture}.embedding_length")
    heads = _largest(header, f"{attention}.head_count")
    if not heads or not embedding:
        return None
    key_length = _int(header, f"{attention}.key_length") or embedding // heads
    return key_length, _int(header, f"{attention}.value_length") or embedding // heads


def _shape(
    header: Header, architecture: str, cache: tuple[tuple[int, int], ...] | None, sizes: dict[str, int]
) -> ModelShape:
    blocks: dict[int, int] = {}
    for name, size in sizes.items():
        if found := _BLOCK.match(name):
            blocks[int(found[1])] = blocks.get(int(found[1]), 0) + size
    count = _int(header, f"{architecture}.block_count") or 0
    layers = tuple(blocks.get(number, 0) for number in range(count if count <= ARRAY_KEPT else 0))
    inputs = sum(size for name, size in sizes.items() if name.startswith(_INPUTS))
    outputs = sum(sizes.values()) - sum(layers) - inputs
    tied = "output.weight" not in sizes
    if tied:
        outputs += sizes.get("token_embd.weight", 0)
    width = _int(header, f"{architecture}.embedding_length") or 0
    experts = _int(header, f"{architecture}.expert_used_count") or 0
    feed_forward = _largest(header, f"{architecture}.feed_forward_length") or 4 * width
    if experts:
        expert_width = _int(header, f"{architecture}.expert_feed_forward_length") or feed_forward
        feed_forward = max(feed_forward, experts * expert_width)
    lengths = _head_lengths(header, architecture) or (width, width)
    return ModelShape(
        layer_bytes=layers,
        input_bytes=inputs,
        output_bytes=outputs,
        tied=tied,
        cache_values=cache if cache is not None else ((width, width),) * len(layers),
        cache_known=cache is not None,
        width=width,
        feed_forward=feed_forward,
        heads=_largest(header, f"{architecture}.attention.head_count") or 1,
        key_length=lengths[0],
        value_length=lengths[1],
        vocab_tokens=header.lengths.get("tokenizer.ggml.tokens") or _int(header, f"{architecture}.vocab_size") or 0,
        train_ctx_tokens=_int(header, f"{architecture}.context_length"),
    )
