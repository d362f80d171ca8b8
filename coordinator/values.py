"""What options hold: files, lists, forms of answers; and how data is printed for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduling.errors import ConfigError


def read_text(flag: str, path: Path | None) -> str | None:
    """The content of a file that `flag` names. Raises `ConfigError`."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: it is not UTF-8") from None


def refuse_beside_continuation(given: dict[str, object]) -> None:
    """Raises `ConfigError` if any of these flags is given."""
    for flag, value in given.items():
        if value:
            raise ConfigError(f"{flag} with --continuation: nothing is answered, the prompt is taken as it is")


def refuse_missing(needed: Mapping[str, object]) -> None:
    """Raises `ConfigError` if one of these options has no value."""
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise ConfigError(f"missing {' and '.join(missing)} (`llmpi batch --help` lists what there is)")


def held_to(json_schema: str | None, grammar_file: Path | None) -> dict[str, Any]:
    """What the two options are in a request."""
    grammar = read_text("--grammar-file", grammar_file)
    if json_schema is None:
        return {"grammar": grammar}
    text = json_schema if json_schema.lstrip().startswith("{") else read_text("--json-schema", Path(json_schema))
    try:
        return {"grammar": grammar, "json_schema": json.loads(text or "")}
    except ValueError as error:
        raise ConfigError(f"--json-schema: this is not JSON: {error}") from None


def numbers_of(flag: str, text: str) -> tuple[int, ...]:
    """Of a list such as 32,64. Raises `ConfigError`."""
    try:
        numbers = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise ConfigError(f"{flag} {text}: give numbers of 1 or more, with commas between them")
    return numbers


def tell(note: str) -> None:
    """A line for people, beside the data on stdout."""
    print(note, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Data for programs, on stdout, one object."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False))


def write_text(text: str) -> None:
    """A text for programs on stdout, in UTF-8 whatever the terminal has: bytes of file names stay as they are."""
    sys.stdout.flush()
    data = text.encode("utf-8", "surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(data.decode("utf-8", "replace"))
