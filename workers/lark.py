"""A constraint in the words of llguidance: its dialect of Lark.

A JSON schema goes in as it is. A GBNF grammar has to be written so that it means the same, and llguidance's own
converter does not see to that. Its lexer is greedy: in `[a-z]+ "b"`, where `[a-z]+` is a terminal, the terminal takes
every letter, and "ab" is never whole (nor are the answers of llama.cpp's own arithmetic example). So either

- nothing comes back to itself, and the whole grammar is one terminal, a regular expression: there is nothing to be
  greedy against, and a mask takes microseconds; or
- each terminal is a single character, and all else are rules. A mask then takes about a millisecond.

Every part with parts becomes a line of its own: the depth of Lark's own nesting is limited.
"""

from __future__ import annotations

import msgspec

from scheduling.constraints import Constraint
from scheduling.gbnf import (
    Chars,
    Choice,
    Name,
    Node,
    Repeat,
    Rules,
    Sequence,
    characters,
    needed,
    parse_gbnf,
    recursive,
)  # fmt: skip

HEAD = '%llguidance {"no_forcing":true}\n'
"""Without it llguidance allows one spelling of a text that is certain: its own tokens for it, not the model's."""

SPACE = r"[ ]|\n[ \t]{0,20}"
"""Between the parts of a JSON text: nothing, a space, or a new line with some indentation. JSON allows any amount of
space, and small models never end it."""


def to_lark(constraint: Constraint) -> str:
    if constraint.kind == "schema":
        schema = {**msgspec.json.decode(constraint.text), "x-guidance": {"whitespace_pattern": SPACE}}
        return f"{HEAD}start: %json {msgspec.json.encode(schema).decode()}\n"
    rules = parse_gbnf(constraint.text)
    return HEAD + _Writer(rules, "r" if recursive(rules) else "T").text()


class _Writer:
    """`letter` begins all names: llguidance takes names in capitals for terminals."""

    def __init__(self, rules: Rules, letter: str) -> None:
        self._rules = rules
        self._letter = letter
        self._names = {name: f"{letter}{place}" for place, name in enumerate(needed(rules))}
        self._count = len(self._names)
        self._lines: list[str] = []

    def text(self) -> str:
        for name, short in self._names.items():
            self._lines.append(f"{short}: {self._body(self._rules[name])}")
        return "\n".join([f"start: {self._names['root']}", *self._lines, ""])

    def _body(self, node: Node) -> str:
        """`node` as the right side of a line."""
        if isinstance(node, Choice):
            return " | ".join(self._item(option) for option in _merged(node.options))
        if isinstance(node, Sequence):
            return " ".join(self._item(part) for part in node.parts) or '""'
        if isinstance(node, Repeat):
            most = "" if node.most is None else node.most
            return f"{self._item(node.part)}{{{node.least},{most}}}"
        return self._item(node)

    def _item(self, node: Node) -> str:
        """`node` as one word, with a line of its own if it needs one."""
        if isinstance(node, Chars):
            ranges = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in node.ranges)
            return f"/[{ranges}]/"
        if isinstance(node, Name):
            return self._names[node.name]
        name = f"{self._letter}{self._count}"
        self._count += 1
        self._lines.append(f"{name}: {self._body(node)}")
        return name


def _merged(options: tuple[Node, ...]) -> list[Node]:
    """`options` with those of one character as a single class: each terminal has its price."""
    ranges = [pair for option in options if isinstance(option, Chars) for pair in option.ranges]
    others: list[Node] = [option for option in options if not isinstance(option, Chars)]
    return [characters(ranges), *others] if ranges else others
