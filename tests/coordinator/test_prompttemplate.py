"""Templates: columns are filled in letter by letter, and nothing else can be asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.prompttemplate import in_words, parse_template
from scheduling.errors import ConfigError

NAMES = st.text("abcä._[]!: \n0", min_size=1, max_size=8)


@given(
    st.lists(st.tuples(st.text("ab{}ö\n", max_size=9), NAMES, st.text("ab{}ö\n", max_size=9)), min_size=1, max_size=6)
)
def test_a_template_gives_its_texts_and_the_values_as_they_are(pieces: list[tuple[str, str, str]]) -> None:
    row = {name: value for _, name, value in pieces}
    written = "".join(text.replace("{", "{{").replace("}", "}}") + "{" + name + "}" for text, name, _ in pieces)
    template = parse_template(written)
    assert template.columns == tuple(name for _, name, _ in pieces)
    assert template.fill(row) == "".join(text + row[name] for text, name, _ in pieces)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no column", "names no column"),
        ("{{a}}", "names no column"),
        ("a {} b", "{} names no column"),
        ("a {b", "the { at character 3"),
        ("b} {a}", "the } at character 2"),
        ("{a{b}}", "the { at character 1"),
    ],
)
def test_what_is_no_template_is_refused_with_its_place(template: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_template(template)
    assert words in str(caught.value)


@pytest.mark.parametrize("hostile", ["a.__class__", "a[0]", "a!r", "a:>999999999", "0"])
def test_what_reaches_into_objects_elsewhere_is_the_name_of_a_column_here(hostile: str) -> None:
    template = parse_template("{" + hostile + "}")
    assert template.columns == (hostile,)
    assert template.fill({hostile: "safe"}) == "safe"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ä\n", "ä\n"),
        (None, ""),
        (3, "3"),
        (0.1, "0.1"),
        (True, "true"),
        ([1, "é"], '[1, "é"]'),
        ({"a": None}, '{"a": null}'),
    ],
)
def test_values_that_are_no_text_are_written_as_json_writes_them(value: object, words: str) -> None:
    assert in_words(value) == words
