"""What an environment is given while llama.cpp compiles: all that setup.cfg names, but for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.requirements import SETUP, requirements

TEXT = """
[options]
install_requires =
    one>=1.0
    # A comment between them.
    one-more>=2,<3
[options.extras_require]
test =
    two[with]>=2
other =
    three
"""


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    path = tmp_path / "setup.cfg"
    path.write_text(TEXT)
    return path


def test_what_is_always_needed_comes_with_what_the_named_extras_need(setup: Path) -> None:
    assert requirements(setup, []) == ["one>=1.0", "one-more>=2,<3"]
    assert requirements(setup, ["test", "other"]) == ["one>=1.0", "one-more>=2,<3", "two[with]>=2", "three"]


@pytest.mark.parametrize(("name", "left"), [("one", "one-more>=2,<3"), ("one-more", "one>=1.0")])
def test_the_package_of_exactly_that_name_is_left_out(setup: Path, name: str, left: str) -> None:
    assert requirements(setup, [], without=name) == [left]


def test_an_extra_that_is_not_there_is_an_error(setup: Path) -> None:
    with pytest.raises(KeyError, match="tset"):
        requirements(setup, ["tset"])


def test_this_projects_own_list_names_llama_cpp_which_can_be_left_out() -> None:
    everything, rest = requirements(SETUP, []), requirements(SETUP, [], without="llama-cpp-python")
    [left_out] = set(everything) - set(rest)
    assert left_out.startswith("llama-cpp-python>=")
