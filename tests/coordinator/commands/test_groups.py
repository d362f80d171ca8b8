from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from coordinator.commands.groups import OptionGroup, given_on_command_line, takes_groups


@dataclass(frozen=True, kw_only=True)
class Tea(OptionGroup):
    cups: Annotated[int, typer.Option("--cups", "-c", help="How many.")] = 1
    sugar: Annotated[bool, typer.Option("--sugar/--no-sugar")] = True


@dataclass(frozen=True, kw_only=True)
class Kettle(OptionGroup):
    litres: Annotated[float, typer.Option()]


def called(command: Any, *words: str) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(takes_groups(command))
    app(list(words), standalone_mode=False)


def test_a_group_comes_whole_with_what_was_given_and_defaults() -> None:
    came: list[Any] = []

    def serve(*, name: str = "", tea: Tea, kettle: Kettle, loud: bool = False) -> None:
        came.append((name, tea, kettle, loud))

    called(serve, "--name", "x", "-c", "3", "--litres", "0.5", "--loud")
    assert came == [("x", Tea(cups=3), Kettle(litres=0.5), True)]


def test_a_default_of_the_parameter_holds_the_defaults_of_its_options() -> None:
    came: list[Any] = []
    unsweetened = Tea(cups=2, sugar=False)

    def serve(*, tea: Tea = unsweetened) -> None:
        came.append(tea)

    called(serve)
    called(serve, "--sugar")
    assert came == [unsweetened, Tea(cups=2, sugar=True)]


def test_a_field_without_a_default_must_be_given() -> None:
    def boil(*, kettle: Kettle) -> None:
        raise AssertionError(kettle)

    with pytest.raises(typer.TyperException, match="litres"):
        called(boil)


def test_options_of_a_group_stand_where_it_stands_in_the_signature() -> None:
    def serve(*, first: int = 0, tea: Tea, last: int = 0) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(takes_groups(serve))
    assert [one.name for one in typer.main.get_command(app).params] == ["first", "cups", "sugar", "last"]


def test_what_was_given_is_told_from_what_is_by_default() -> None:
    came: list[frozenset[str]] = []

    def serve(*, context: typer.Context, tea: Tea, loud: bool = False) -> None:
        came.append(given_on_command_line(context))

    called(serve, "--cups", "1")
    assert came == [frozenset({"cups"})]
