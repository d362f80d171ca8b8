"""Groups of options that several commands take, each written down once as a dataclass.

Typer reads what a command takes from its signature. In that of a command decorated with `takes_groups`, a parameter
whose type is an `OptionGroup` stands for the fields of the group: on the command line each is an option of its own, at
the parameter's place. A default of the parameter holds the defaults of these options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

import typer


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """A dataclass whose fields are annotated as a command's parameters are."""

    def job(self) -> dict[str, Any]:
        """The fields of `JobConfig` that the group decides. Raises `ConfigError`."""
        return {}


def given_on_command_line(context: typer.Context) -> frozenset[str]:
    """Names of the parameters of a command that were given, also where they have their default's value."""
    return frozenset(
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    )


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option for each field of the groups in its signature, which it is called with whole."""
    spelled_out: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[OptionGroup], list[str]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            options = _options(kind, parameter.default)
            groups[name] = kind, [option.name for option in options]
            spelled_out += options
        else:
            spelled_out.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        whole = {name: kind(**{one: given.pop(one) for one in options}) for name, (kind, options) in groups.items()}
        command(**whole, **given)

    run.__signature__ = inspect.Signature(spelled_out)  # type: ignore[attr-defined]
    return run


def _options(kind: type[OptionGroup], defaults: Any) -> list[inspect.Parameter]:
    """A parameter for each field. `defaults`: a group, or nothing that is one."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for one in fields(kind):
        default = getattr(defaults, one.name) if isinstance(defaults, kind) else one.default
        found.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=hints[one.name],
            )
        )
    return found
