"""The header of one GGUF file, read with suspicion.

Every count and length is checked against a limit and against the bytes that are left before it is used; long
arrays are stepped over instead of being kept. Whatever is wrong becomes one ModelFileError. Time and memory are
bounded by the limits below, whatever the file says.

The format: magic, version, number of tensors, number of key-value pairs; the pairs; name, dimensions, type and
offset of each tensor; padding to the alignment; data. All little-endian (specification: docs/gguf.md in ggml).
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from scheduling.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEYS_MAX = 16_384
KEY_BYTES_MAX = 1024
TENSORS_MAX = 131_072
TENSOR_NAME_BYTES_MAX = 63
DIMENSIONS_MAX = 4
STRING_BYTES_MAX = 1 << 26
STRINGS_MAX = 1 << 23
"""Strings in arrays, over the whole file."""
TEXT_KEPT_BYTES = 1024
ARRAY_KEPT = 4096

_WINDOW_BYTES = 1 << 18

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {number: struct.Struct("<" + code) for number, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9

# fmt: off
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}
# fmt: on
"""ggml's tensor types: (values, bytes) of a block. A type that is not here is newer; its size is not checked."""
_NEW_TYPE_BYTES = 2
"""What a value of a newer type is taken to need: more than quantised ones do."""

Value = int | float | str | list[int | float]


@dataclass
class Header:
    """One file's header. `values` has scalars, short texts and short arrays of numbers; `lengths` all arrays'.

    `shapes` and `sizes` are of its tensors by name: values along each dimension, the fastest first, and bytes.
    """

    file_bytes: int
    values: dict[str, Value] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

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
    """Read and check one file's header, and that its tensors end within it. Raises ModelFileError."""
    with open_model(path, what) as file:
        try:
            reader = _Reader(file, path)
            counts = _preamble(reader, path)
            header = Header(reader.size)
            for _ in range(counts[1]):
                _pair(reader, header)
            _tensors(reader, header, counts[0], path)
            return header
        except OSError as error:
            raise ModelFileError(f"the {what} {path} cannot be read: {error.strerror or error}.") from error


def _preamble(reader: _Reader, path: Path) -> tuple[int, int]:
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
        raise reader.bad(f"it claims {tensors} tensors and {pairs} keys")
    return tensors, pairs


def _pair(reader: _Reader, header: Header) -> None:
    key = reader.text(KEY_BYTES_MAX, "a key")
    if key in header.keys:
        raise reader.bad(f"the key {key!r} is there twice")
    header.keys.add(key)
    kind = reader.u32()
    if kind == _STRING:
        text = reader.skip_text()
        if text:
            header.values[key] = text.decode(errors="replace")
    elif kind == _ARRAY:
        _array(reader, header, key)
    elif kind in _STRUCTS:
        scalar = _STRUCTS[kind]
        header.values[key] = scalar.unpack(reader.take(scalar.size))[0]
    else:
        raise reader.bad(f"the key {key!r} has the unknown type {kind}")


def _array(reader: _Reader, header: Header, key: str) -> None:
    kind, length = reader.u32(), reader.u64()
    header.lengths[key] = length
    if kind == _STRING:
        reader.strings_left -= length
        if reader.strings_left < 0 or length * 8 > reader.size:
            raise reader.bad(f"the array {key!r} claims {length} strings")
        for _ in range(length):
            reader.skip_text()
    elif kind in _STRUCTS:
        scalar = _STRUCTS[kind]
        if length * scalar.size > reader.size:
            raise reader.bad(f"the array {key!r} claims {length} numbers")
        if length <= ARRAY_KEPT and key.endswith((".head_count", ".head_count_kv", ".feed_forward_length")):
            header.values[key] = [item for (item,) in scalar.iter_unpack(reader.take(length * scalar.size))]
        else:
            reader.skip(length * scalar.size)
    else:
        raise reader.bad(f"the array {key!r} has elements of the unknown type {kind}")


def _tensors(reader: _Reader, header: Header, count: int, path: Path) -> None:
    alignment = header.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise reader.bad(f"an alignment of {alignment}")
    needed = 0
    for _ in range(count):
        name = reader.text(TENSOR_NAME_BYTES_MAX, "a tensor's name")
        if name in header.shapes:
            raise reader.bad(f"the tensor {name!r} is there twice")
        shape, size, end = _tensor(reader, name, alignment)
        header.shapes[name], header.sizes[name] = shape, size
        needed = max(needed, end)
    start = (reader.offset + alignment - 1) // alignment * alignment
    if count and start + needed > reader.size:
        raise ModelFileError(
            f"{path} is truncated: its tensors end at byte {start + needed}, the file at {reader.size}. Fetch it again."
        )


def _tensor(reader: _Reader, name: str, alignment: int) -> tuple[tuple[int, ...], int, int]:
    """Shape and bytes of the next tensor, and the byte after its last, counted from the start of the data."""
    dimensions = reader.u32()
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise reader.bad(f"the tensor {name!r} has {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}q", reader.take(8 * dimensions))
    kind, offset = reader.u32(), reader.u64()
    values = 1
    for length in shape:
        values *= length
        if length < 0 or values >= 1 << 62:
            raise reader.bad(f"the tensor {name!r} has the shape {shape}")
    if offset % alignment:
        raise reader.bad(f"the tensor {name!r} begins at {offset}, which is not aligned to {alignment}")
    if kind not in _TENSOR_TYPES:
        return shape, values * _NEW_TYPE_BYTES, offset
    per_block, block_bytes = _TENSOR_TYPES[kind]
    if shape[0] % per_block:
        raise reader.bad(f"the tensor {name!r} has rows of {shape[0]} values in blocks of {per_block}")
    size = values // per_block * block_bytes
    return shape, size, offset + size


class _Reader:
    """Numbers and strings from the front of a file, through a window, never past its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.size = os.fstat(file.fileno()).st_size
        self._window = b""
        self._start = 0
        self._at = 0
        self.strings_left = STRINGS_MAX

    @property
    def offset(self) -> int:
        return self._start + self._at

    def bad(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self._path} is damaged near byte {self.offset}: {why}. Fetch it again.")

    def take(self, length: int) -> bytes:
        """The next `length` bytes, which a caller has bounded."""
        if self._at + length > len(self._window):
            self._start, self._at = self.offset, 0
            self._file.seek(self._start)
            self._window = self._file.read(max(length, _WINDOW_BYTES))
            if len(self._window) < length:
                raise ModelFileError(f"{self._path} is truncated: its header goes on after its end. Fetch it again.")
        data = self._window[self._at : self._at + length]
        self._at += length
        return data

    def skip(self, length: int) -> None:
        if self.offset + length > self.size:
            raise ModelFileError(f"{self._path} is truncated: its header goes on after its end. Fetch it again.")
        self._at += length

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, limit: int, what: str) -> str:
        """A string of at most `limit` bytes."""
        length = self.u64()
        if length > limit:
            raise self.bad(f"{what} of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} that is not UTF-8") from None

    def skip_text(self) -> bytes:
        """A string of any allowed length; its first TEXT_KEPT_BYTES if it is short, else nothing."""
        length = self.u64()
        if length > STRING_BYTES_MAX:
            raise self.bad(f"a string of {length} bytes")
        if length <= TEXT_KEPT_BYTES:
            return self.take(length)
        self.skip(length)
        return b""
