"""Prompts made of a row's columns: what `--template` means.

`{column}` stands for the column of that name, `{{` and `}}` for braces. A name is taken letter by letter: no attribute,
no index, no conversion can be asked for, so that a template from a stranger reaches texts of the row and nothing else.
This module knows neither files nor requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduling.errors import ConfigError

_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class Template:
    """`texts[0] columns[0] texts[1] columns[1] … texts[-1]`: one text more than there are columns, some empty."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt for `row`, which has all `columns`."""
        said = [self.texts[0]]
        for column, text in zip(self.columns, self.texts[1:], strict=True):
            said += (in_words(row[column]), text)
        return "".join(said)


def parse_template(template: str) -> Template:
    """Raises ConfigError: a brace that belongs to nothing, an empty name, no column at all."""
    texts, columns = [""], []
    for piece in _PIECES.finditer(template):
        word, name = piece.group(), piece.group(1)
        if word in ("{{", "}}"):
            texts[-1] += word[0]
        elif name is not None:
            if not name:
                raise ConfigError("--template: {} names no column; write {COLUMN}, or {{}} for braces themselves")
            columns.append(name)
            texts.append("")
        elif word in "{}":
            raise ConfigError(
                f"--template: the {word} at character {piece.start() + 1} belongs to no column; write "
                f"{word * 2} for the brace itself"
            )
        else:
            texts[-1] += word
    if not columns:
        raise ConfigError("--template names no column, so all prompts would be the same; write {COLUMN} in it")
    return Template(tuple(texts), tuple(columns))


def in_words(value: object) -> str:
    """A value as it stands in a prompt: text as it is, nothing for null, all else as JSON writes it."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
