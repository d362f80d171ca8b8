"""What is wrong with an option, said to somebody who wrote Python: `slots=0`, where a command line has `--slots 0`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

from coordinator.config import JobConfig
from scheduling.errors import LlmpiError
from scheduling.requests import Sampling

_FLAG = re.compile(
    r"(?<![\w/'\"-])--(?P<no>no-)?(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)(?: (?P<value>\d+(?![\w.])|[a-z][a-z0-9_-]*))?"
)
_MODEL = re.compile(r"(?<![\w/'\"-])-m(?=[ :,])")


@contextmanager
def spoken_as_arguments() -> Iterator[None]:
    """An error that leaves the body names options as arguments of a call."""
    try:
        yield
    except LlmpiError as error:
        error.args = (as_arguments(str(error)), *error.args[1:])
        raise


def as_arguments(text: str) -> str:
    """`text` with flags written as arguments of a Pool. Commands, which stand in backticks, stay as they are."""
    pieces = text.split("`")
    pieces[::2] = [_MODEL.sub("model", _FLAG.sub(_argument, piece)) for piece in pieces[::2]]
    return "`".join(pieces)


def _argument(found: re.Match[str]) -> str:
    field = _field(found["name"])
    if field is None:
        return found[0]
    if found["no"]:
        rest = "" if found["value"] is None else f" {found['value']}"
        return f"{field}=False{rest}"
    value = found["value"]
    if value is None:
        return field
    if value.isdigit():
        return f"{field}={value}"
    return f"{field}={value!r}" if value in _words()[field] else f"{field} {value}"


def _field(name: str) -> str | None:
    """The option of a Pool that a flag of this name sets."""
    plain = name.replace("-", "_")
    return next((field for field in (plain, f"{plain}_s", f"{plain}s") if field in _words()), None)


@cache
def _words() -> dict[str, tuple[str, ...]]:
    """For each option of a Pool or a call the words that it may be, where it is one of a few."""
    return {
        field: tuple(word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part))
        for field, hint in (get_type_hints(Sampling) | get_type_hints(JobConfig)).items()
    }
