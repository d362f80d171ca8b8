"""How `--help` shows a command with many options: under headings, those that most people want first.

What is declared with `typer.Option` stands under "Options", which comes before the others; what is declared with
`section(TITLE)` stands under that title.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

ARGUMENTS = "Arguments"
OPTIONS = "Options"
INPUT = "Input"
ANSWERS = "Answers"
MODEL = "Model"
DECODING = "Decoding"
RANKS = "Ranks"
STOPPING = "Stopping"
FAULTS = "Faults and record"
SIMULATION = "Simulated engine"
SECTIONS = (ARGUMENTS, OPTIONS, INPUT, ANSWERS, MODEL, DECODING, RANKS, STOPPING, FAULTS, SIMULATION)
"""In the order in which they are shown."""


def section(title: str) -> Callable[..., Any]:
    """As `typer.Option`, for an option under this title."""
    return functools.partial(typer.Option, rich_help_panel=None if title == OPTIONS else title)


class Sectioned(TyperCommand):
    """A command whose options are listed under their titles."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in SECTIONS}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                own = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
                sections[getattr(parameter, "rich_help_panel", None) or own].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
