"""What `--help` shows of commands with many options."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from coordinator import cli
from coordinator.commands.sections import ARGUMENTS, OPTIONS, SECTIONS

USUAL = ("--model", "--input", "--output", "--max-tokens", "--slots", "--ctx", "--time-limit", "--help")


class Help:
    """What `llmpi … --help` prints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def of(self, words: str, columns: int = 80) -> str:
        """On a terminal of so many columns."""
        self._monkeypatch.setenv("COLUMNS", str(columns))
        self._monkeypatch.setattr("sys.argv", ["llmpi", *words.split(), "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return self._capsys.readouterr().out


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Help:
    return Help(monkeypatch, capsys)


def options_of(words: str) -> list[str]:
    """Long names of a command's options."""
    command: Any = typer.main.get_command(cli.app)
    for word in words.split():
        command = command.commands[word]
    return [max(one.opts, key=len) for one in command.params]


def sections_of(text: str) -> dict[str, str]:
    """Lines below each heading."""
    parts = re.split(r"^(\w[\w ]*):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("words", ["batch", "infer", "embed", "study scaling", "bench engine"])
def test_every_option_is_listed_once_under_headings_in_their_order(told: Help, words: str) -> None:
    found = sections_of(told.of(words))
    assert list(found) == [title for title in SECTIONS if title in found]
    assert len(found) > 1
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", "".join(found.values()), re.MULTILINE)
    assert sorted(listed) == sorted([*options_of(words), "--help"])


def test_the_options_of_batch_that_most_people_want_come_first(told: Help) -> None:
    first = sections_of(told.of("batch"))[OPTIONS]
    assert all(option in first for option in USUAL)
    assert len(first.splitlines()) < 30


@pytest.mark.parametrize(("columns", "most"), [(80, 78), (120, 118), (300, 120)])
def test_help_is_as_wide_as_the_terminal_up_to_120_columns(told: Help, columns: int, most: int) -> None:
    assert most - 10 < max(map(len, told.of("batch", columns).splitlines())) <= most


@pytest.mark.parametrize("words", ["", "bench", "models", "study"])
def test_what_a_command_is_for_fits_into_its_line(told: Help, words: str) -> None:
    assert "..." not in sections_of(told.of(words))["Commands"]


def test_a_command_with_few_options_has_no_other_headings(told: Help) -> None:
    found = sections_of(told.of("export"))
    assert list(found) == [ARGUMENTS, OPTIONS]
    assert "RUN_DIR" in found[ARGUMENTS]
