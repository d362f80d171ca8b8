"""A model's weights over all its files: one, or the parts of a split model.

A split model is NAME-00001-of-00003.gguf and so on. The first part has the metadata; each says which part it is
(split.no, from 0) and of how many (split.count), the first also how many tensors all have (split.tensors.count).
llama.cpp finds the others by name, needs these keys in just these types, and aborts on some others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from scheduling.errors import ModelFileError
from storage.ggufheader import INT32, TENSORS_MAX, UINT16, Header, read_header
from storage.ggufreader import shown

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


@dataclass
class Weights:
    """All tensors of a model by name, and the files that they are in. `file_bytes`: of all files."""

    parts: tuple[Path, ...]
    file_bytes: int = 0
    parameters: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def named_part(path: Path) -> tuple[int, int] | None:
    """(number from 1, count) in the name of a split model's part; None for other names."""
    found = _PART.fullmatch(path.name)
    return (int(found[2]), int(found[3])) if found else None


def part_names(path: Path, count: int) -> tuple[Path, ...]:
    """All files of a split model, given one of them."""
    stem = path.name[: -len("-00001-of-00001.gguf")]
    return tuple(path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def read_parts(path: Path, header: Header) -> Weights:
    """Read all other files of the model whose first is at `path`, and check that they belong together.

    Raises ModelFileError: a part is missing or damaged, is another part or another model's, or this is not the first.
    """
    weights = Weights(_parts(path, header))
    count = len(weights.parts)
    for number, part in enumerate(weights.parts):
        found = read_header(part) if number else header
        if count > 1:
            _check_part(part, number, count, header, found)
        _add(weights, part, found)
    if count > 1:
        expected = _number(header, "split.tensors.count", INT32)
        if expected != len(weights.shapes):
            raise ModelFileError(
                f"{path} and its other parts have {len(weights.shapes)} tensors, but its split.tensors.count is "
                f"{'missing' if expected is None else expected}. Fetch all parts again."
            )
    return weights


def _parts(path: Path, header: Header) -> tuple[Path, ...]:
    """All files of a model, this first. Raises ModelFileError if one is missing or this is not the first."""
    number, named = named_part(path) or (1, 1)
    count = _number(header, "split.count", UINT16) or 1
    if count == 1 and named == 1:
        return (path,)
    if count == 1:
        raise ModelFileError(
            f"{path} is one of {named} parts by its name, but not by its header. Fetch it again, or rename it if it is "
            "a whole model."
        )
    if named != count:
        raise ModelFileError(
            f"{path} is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf, by which "
            "the others are found. Give the files their original names."
        )
    parts = part_names(path, count)
    if number != 1:
        raise ModelFileError(f"{path} is part {number} of {count}. Give the first one, {parts[0]}.")
    for part in parts:
        if not part.is_file():
            raise ModelFileError(f"the model {path} has {count} parts and {part.name} is not there. Fetch it.")
    return parts


def _check_part(part: Path, number: int, count: int, first: Header, found: Header) -> None:
    if (_number(found, "split.no", UINT16), _number(found, "split.count", UINT16)) != (number, count):
        raise ModelFileError(f"{part} is not part {number + 1} of {count} by its own header. Fetch it again.")
    architecture = first.values.get("general.architecture")
    other = found.values.get("general.architecture", architecture)
    if other != architecture:
        raise ModelFileError(
            f"{part} is a part of another model ({shown(str(other))}, not {shown(str(architecture))}). Fetch it again."
        )


def _add(weights: Weights, part: Path, found: Header) -> None:
    for name in found.shapes:
        if name in weights.shapes:
            raise ModelFileError(
                f"{part} has the tensor {name!r}, which an earlier part has too. Fetch all parts again."
            )
    weights.shapes.update(found.shapes)
    weights.sizes.update(found.sizes)
    weights.file_bytes += found.file_bytes
    weights.parameters += found.parameters
    if len(weights.shapes) > TENSORS_MAX:
        raise ModelFileError(
            f"{part} and the parts before it have more than {TENSORS_MAX} tensors. Give another model."
        )


def _number(header: Header, key: str, kind: int) -> int | None:
    """A number of the one type that llama.cpp asks for; None if it is not there."""
    if key not in header.kinds:
        return None
    value = header.values.get(key)
    if header.kinds[key] != kind or not isinstance(value, int):
        raise ModelFileError(
            f"{header.path} is damaged: its {key} has the type {header.kinds[key]}, not {kind}. Fetch it again."
        )
    return value
