"""The header of one GGUF file, read with suspicion.

Every count and length is checked against a limit and against the bytes that are left before it is used; long
arrays are stepped over instead of being kept. Whatever is wrong becomes one ModelFileError. Time and memory are
bounded by the limits below, whatever the file says.

What ggml refuses is refused here (the tests ask it), and some more: what llama.cpp would abort on, or no model has.

The format: magic, version, number of tensors, number of key-value pairs; the pairs; name, dimensions, type and
offset of each tensor; padding to the alignment; data. All little-endian (specification: docs/gguf.md in ggml).
"""

from __future__ import annotations

import math
import os
import stat
import struct
from array import array
from collections.abc import KeysView
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from scheduling.errors import ModelFileError
from storage.ggmltypes import REMOVED_TYPES, TENSOR_TYPES
from storage.ggufreader import GgufReader, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEYS_MAX = 16_384
KEY_BYTES_MAX = 1024
TENSORS_MAX = 131_072
TENSOR_NAME_BYTES_MAX = 63
DIMENSIONS_MAX = 4
ARRAY_MAX = 1 << 30
STRINGS_MAX = 1 << 23
"""Strings in arrays, over the whole file."""
ARRAY_KEPT = 4096
KEPT_BYTES_MAX = 1 << 23
"""What keys, short texts and short arrays may take together; those of a model take some KB."""

UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
"""Types of values, as far as they are asked for by name."""
TEMPLATE_KEY = "tokenizer.chat_template"
TOKENS_KEY = "tokenizer.ggml.tokens"
TOKENS_MAX = 1 << 21

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {number: struct.Struct("<" + code) for number, code in _SCALARS.items()}
_PAIR_BYTES_MIN, _TENSOR_BYTES_MIN = 8 + 1 + 4 + 1, 8 + 4 + 4 + 8
_INT64_MAX = (1 << 63) - 1
_NUMBERS_KEPT = (".head_count", ".head_count_kv", ".feed_forward_length")

Value = bool | int | float | str | list[int | float]


@dataclass
class Header:
    """One file's header. `values` has scalars, short texts and short arrays of numbers; `lengths` all arrays'.

    `kinds` are the types of all values by key, `elements` those of arrays' elements. `shapes` and `sizes` are of its
    tensors by name: values along each dimension, the fastest first, and bytes. `token_hashes` are of its vocabulary.
    """

    path: Path
    file_bytes: int
    values: dict[str, Value] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    chat_template_sha256: str | None = None
    token_hashes: array[int] = field(default_factory=lambda: array("q"))

    @property
    def keys(self) -> KeysView[str]:
        return self.kinds.keys()

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def open_model(path: Path, what: str = "model") -> BinaryIO:
    """A model's file opened for reading. Raises ModelFileError if that cannot be, or it is no plain file.

    `what` is what a person calls it.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"the {what} {path} is a directory. Give a .gguf file in it.")
        if not stat.S_ISREG(mode):
            raise ModelFileError(f"the {what} {path} is not a file. Give a .gguf file.")
        return open(path, "rb")
    except FileNotFoundError:
        raise ModelFileError(f"the {what} {path} does not exist. Check the path.") from None
    except OSError as error:
        raise ModelFileError(f"the {what} {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelFileError(f"the {what}'s path {str(path)!r} cannot be used: {error}.") from error


def read_header(path: Path, what: str = "model") -> Header:
    """Read and check one file's header, and that its tensors lie in it one after another. Raises ModelFileError."""
    with open_model(path, what) as file:
        try:
            reader = GgufReader(file, path)
            tensors, pairs = _preamble(reader, path)
            header = Header(path, reader.size)
            budget = _Budget(reader)
            for number in range(pairs):
                reader.within = f"key {number + 1} of {pairs}"
                _pair(reader, header, budget)
            _tensors(reader, header, tensors)
            return header
        except OSError as error:
            raise ModelFileError(f"the {what} {path} cannot be read: {error.strerror or error}.") from error


class _Budget:
    """What one file may still make us do: bytes kept, strings stepped over."""

    def __init__(self, reader: GgufReader) -> None:
        self._reader = reader
        self._kept_bytes = KEPT_BYTES_MAX
        self._strings = STRINGS_MAX

    def keep(self, count: int) -> None:
        self._kept_bytes -= count
        if self._kept_bytes < 0:
            raise self._reader.bad(f"its keys and short values take more than {KEPT_BYTES_MAX} bytes")

    def step(self, strings: int, key: str) -> None:
        self._strings -= strings
        if self._strings < 0:
            raise self._reader.bad(f"the array {shown(key)} claims {strings} strings, {STRINGS_MAX} at most in a file")


def _preamble(reader: GgufReader, path: Path) -> tuple[int, int]:
    """Numbers of tensors and of pairs."""
    if reader.size == 0:
        raise ModelFileError(f"{path} is empty. Fetch the model again.")
    if reader.size < 4 or reader.take(4) != MAGIC:
        raise ModelFileError(f"{path} is not a GGUF file: it does not begin with 'GGUF'. Convert it, or give another.")
    version = reader.u32()
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            raise ModelFileError(f"{path} is a big-endian GGUF, which this machine cannot read. Fetch another.")
        raise ModelFileError(f"{path} is GGUF version {version}; versions 2 and 3 are known. Convert it again.")
    tensors, pairs = reader.u64(), reader.u64()
    if tensors > TENSORS_MAX or pairs > KEYS_MAX:
        raise reader.bad(f"it claims {tensors} tensors and {pairs} keys, {TENSORS_MAX} and {KEYS_MAX} at most are read")
    if pairs * _PAIR_BYTES_MIN + tensors * _TENSOR_BYTES_MIN > reader.left:
        raise reader.no_room(f"it claims {tensors} tensors and {pairs} keys")
    return tensors, pairs


def _pair(reader: GgufReader, header: Header, budget: _Budget) -> None:
    key = reader.name(KEY_BYTES_MAX, "a key")
    reader.within = f"the key {shown(key)}"
    if not key:
        raise reader.bad(f"key {len(header.kinds) + 1} is empty")
    if key in header.kinds:
        raise reader.bad(f"the key {shown(key)} is there twice")
    budget.keep(len(key))
    kind = header.kinds[key] = reader.u32()
    if kind == STRING:
        if key == TEMPLATE_KEY:
            header.chat_template_sha256 = reader.text_sha256()
        elif text := reader.text():
            budget.keep(len(text))
            header.values[key] = text.decode(errors="replace")
    elif kind == ARRAY:
        _array(reader, header, budget, key)
    elif kind in _STRUCTS:
        scalar = _STRUCTS[kind]
        header.values[key] = scalar.unpack(reader.take(scalar.size))[0]
    else:
        raise reader.bad(f"the key {shown(key)} has the unknown type {kind}")


def _array(reader: GgufReader, header: Header, budget: _Budget, key: str) -> None:
    kind, length = reader.u32(), reader.u64()
    header.elements[key], header.lengths[key] = kind, length
    if kind == STRING:
        budget.step(length, key)
        if length * 8 > reader.left:
            raise reader.no_room(f"the array {shown(key)} claims {length} strings")
        if key == TOKENS_KEY:
            if length > TOKENS_MAX:
                raise reader.bad(f"it claims a vocabulary of {length} tokens, {TOKENS_MAX} at most")
            header.token_hashes = reader.token_hashes(length)
        else:
            reader.skip_texts(length)
    elif kind in _STRUCTS:
        scalar = _STRUCTS[kind]
        if length > ARRAY_MAX:
            raise reader.bad(f"the array {shown(key)} claims {length} numbers, {ARRAY_MAX} at most")
        if length * scalar.size > reader.left:
            raise reader.no_room(f"the array {shown(key)} claims {length} numbers")
        if length <= ARRAY_KEPT and key.endswith(_NUMBERS_KEPT):
            budget.keep(length * 32)
            header.values[key] = [item for (item,) in scalar.iter_unpack(reader.take(length * scalar.size))]
        else:
            reader.skip(length * scalar.size)
    elif kind == ARRAY:
        raise reader.bad(f"the array {shown(key)} is one of arrays, which llama.cpp does not read")
    else:
        raise reader.bad(f"the array {shown(key)} has elements of the unknown type {kind}")


def _alignment(reader: GgufReader, header: Header) -> int:
    if "general.alignment" not in header.kinds:
        return 32
    value = header.values.get("general.alignment")
    if header.kinds["general.alignment"] != UINT32 or not isinstance(value, int):
        raise reader.bad("general.alignment is not a number of 32 bits without a sign")
    if value <= 0 or value & (value - 1):
        raise reader.bad(f"general.alignment gives an alignment of {value}, which is no power of two")
    return value


def _tensors(reader: GgufReader, header: Header, count: int) -> None:
    """Read what is said of tensors. Their data must follow each other, as ggml asks, and end within the file."""
    alignment = _alignment(reader, header)
    place, last, end = 0, "", 0
    for number in range(count):
        reader.within = f"tensor {number + 1} of {count}"
        name = reader.name(TENSOR_NAME_BYTES_MAX, "the name of a tensor")
        reader.within = f"the tensor {name!r}"
        if name in header.shapes:
            raise reader.bad(f"the tensor {name!r} is there twice")
        header.shapes[name], size, offset = _tensor(reader, name)
        header.sizes[name] = size
        if offset != place:
            raise reader.bad(_misplaced(name, offset, place, alignment, last))
        end = place + size
        place = (end + alignment - 1) // alignment * alignment
        last = name
    start = (reader.offset + alignment - 1) // alignment * alignment
    if count and start + end > reader.size:
        raise ModelFileError(
            f"{header.path} is truncated: the data of its tensors end at byte {start + end} (the last is {last!r}), "
            f"the file at {reader.size}. Fetch it again."
        )


def _misplaced(name: str, offset: int, place: int, alignment: int, last: str) -> str:
    if offset % alignment:
        return f"the tensor {name!r} begins at {offset} of the data, which is not aligned to {alignment}"
    if offset < place:
        return f"the tensor {name!r} begins at {offset} of the data and overlaps {last!r}, after which {place} comes"
    return f"the tensor {name!r} begins at {offset} of the data, and should at {place}"


def _tensor(reader: GgufReader, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, bytes, and offset in the data of the next tensor."""
    dimensions = reader.u32()
    if dimensions > DIMENSIONS_MAX:
        raise reader.bad(f"the tensor {name!r} has {dimensions} dimensions, {DIMENSIONS_MAX} at most")
    shape = struct.unpack(f"<{dimensions}q", reader.take(8 * dimensions))
    values = 1
    for length in shape:
        values *= length
        if length < 0 or values > _INT64_MAX:
            raise reader.bad(f"the tensor {name!r} has the shape {shape}")
    kind, offset = reader.u32(), reader.u64()
    if kind in REMOVED_TYPES:
        removed = f"{REMOVED_TYPES[kind]}, which llama.cpp reads no more (quantise it anew)"
        raise reader.bad(f"the tensor {name!r} is of the type {removed}")
    if kind not in TENSOR_TYPES:
        unknown = f"{kind}, which is not known (if it is new, update llmpi and llama.cpp)"
        raise reader.bad(f"the tensor {name!r} is of the type {unknown}")
    per_block, block_bytes = TENSOR_TYPES[kind]
    row = shape[0] if shape else 1
    if row % per_block:
        raise reader.bad(f"the tensor {name!r} has rows of {row} values in blocks of {per_block}")
    size = values // per_block * block_bytes
    if size > _INT64_MAX:
        raise reader.bad(f"the tensor {name!r} with the shape {shape} needs {size} bytes")
    return shape, size, offset
