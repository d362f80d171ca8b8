"""Models of several files: `NAME-00001-of-00003.gguf` and so on, as llama.cpp splits them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from scheduling.errors import ModelSourceError

PARTS_MAX = 1000
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)$", re.IGNORECASE | re.DOTALL)
_SHOWN = 40


def parts_of(name: str) -> list[str]:
    """The names of all parts of the model that the file `name` is a part of, in order; `[name]` if it is whole."""
    match = _PART.match(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= PARTS_MAX:
        raise ModelSourceError(
            f"{name} cannot be part {number} of {count}: parts are counted from 1, up to {PARTS_MAX:,}."
        )
    return [f"{match['stem']}-{part:05d}-of-{match['count']}{match['end']}" for part in range(1, count + 1)]


def choose(names: Iterable[str], wanted: str | None, shown: str, how: str) -> list[str]:
    """The files of one model among `names`, all parts of it in order.

    `wanted` is a file's name, any part's, or a quantisation such as `Q4_K_M` that one model's name ends with. None
    takes the only model; projectors for images (`mmproj`) do not count then. `how` says how one is named. Raises
    ModelSourceError with the models there are.
    """
    known = sorted({name for name in names if name.lower().endswith(".gguf")})
    if wanted is not None and wanted in known:
        return _whole(parts_of(wanted), known, shown)
    firsts = sorted({parts_of(name)[0] for name in known})
    if wanted is None:
        fitting = [name for name in firsts if "mmproj" not in name.rsplit("/", 1)[-1].lower()]
    else:
        fitting = [name for name in firsts if _ends_with(name, wanted)]
    if len(fitting) == 1:
        return _whole(parts_of(fitting[0]), known, shown)
    if not firsts:
        raise ModelSourceError(f"{shown} has no GGUF file. Only models that were converted to GGUF can be run.")
    there = ", ".join(firsts[:_SHOWN]) + (f" and {len(firsts) - _SHOWN} more" if len(firsts) > _SHOWN else "")
    if wanted is not None and not fitting:
        raise ModelSourceError(f"{shown}: there is no file {wanted!r}. There are: {there}.")
    raise ModelSourceError(f"{shown}: there are {len(fitting) or len(firsts)} models. Name one as {how}: {there}.")


def _whole(parts: list[str], known: list[str], shown: str) -> list[str]:
    missing = [part for part in parts if part not in known]
    if missing:
        raise ModelSourceError(
            f"{shown} lacks {len(missing)} of {len(parts)} parts of a model, the first {missing[0]}."
        )
    return parts


def _ends_with(name: str, wanted: str) -> bool:
    """Whether a model's name ends with the quantisation `wanted`, set off by a dash, dot, underscore or slash."""
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name, flags=re.IGNORECASE)
    return re.search(rf"(^|[-._/]){re.escape(wanted)}$", stem, re.IGNORECASE) is not None
