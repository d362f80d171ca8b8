"""docs/faults.md says which test shows what becomes of a fault: each fault has one, and each of those is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
NAMED = re.compile(r"^- `(tests/[\w/]+\.py)::(test_\w+)`$")


def faults(text: str) -> dict[str, list[str]]:
    """The items of the list below each fault's heading."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        lines = re.split(r"^## ", part, flags=re.MULTILINE)[0].splitlines()
        assert lines[0] not in found, f"{lines[0]} is there twice"
        found[lines[0]] = [line for line in lines[1:] if line.startswith("- ")]
    return found


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file, without importing it."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def wrong(items: list[str]) -> list[str]:
    """The items that name no test that is there. Of an empty list: that it is empty."""
    missing = []
    for item in items:
        named = NAMED.match(item)
        if named is None or named[2] not in names_in(named[1]):
            missing.append(item)
    return missing if items else ["names no test"]


FAULTS = faults(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_tests_and_all_of_them_are_there(fault: str) -> None:
    assert wrong(FAULTS[fault]) == []


def test_the_page_is_read_as_it_is_written() -> None:
    assert len(FAULTS) >= 25
    page = "# Faults\n## Engines\n### Killed\n- `tests/test_faults_page.py::test_the_page_is_read_as_it_is_written`\n"
    assert wrong(faults(page)["Killed"]) == []
    for item in ("- OPEN", "- `tests/test_faults_page.py::test_none`", "- `tests/none.py::test_a`", "- later"):
        assert wrong([item]) == [item]
    assert wrong(faults(page + "### Hangs\nIt is killed.\n## Ranks\n- no item of it\n")["Hangs"]) == ["names no test"]
