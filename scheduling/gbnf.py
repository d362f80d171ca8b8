"""GBNF, the language of llama.cpp's grammars: from text to rules, with nothing of a tokenizer or of llama.cpp.

    root  ::= item+
    item  ::= "- " [^\n]+ "\n"     # literals, classes, ".", groups, names, and * + ? {m} {m,} {m,n} behind them

A grammar is read when its request is, so that a mistake is told with its line before any engine starts. What is read
here is exactly what a grammar means: rules over characters (`Chars`), nothing else. References to tokens (`<[42]>`),
which newer versions of llama.cpp know, are refused, as they hold for one vocabulary only.

Unlike llama.cpp, a rule may refer to itself at its beginning, and a rule that is defined twice is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import NoReturn

from scheduling.errors import RequestError

GROUPS_DEEP_MAX = 32
"""Groups within groups."""
REPEATS_MAX = 10_000
"""Largest number in {m,n}."""
LAST_CHARACTER = 0x10FFFF

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of `ranges` (first and last, ascending, not empty). No half of a surrogate pair is in them."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """Another rule's."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One part after the other. Without parts: the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several, at least one."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`part` from `least` to `most` times; without end if that is None."""

    part: Node
    least: int
    most: int | None


Node = Chars | Name | Sequence | Choice | Repeat
Rules = dict[str, Node]


@lru_cache(maxsize=64)  # the requests of a file nearly always share a few
def parse_gbnf(text: str) -> Rules:
    """The rules of a grammar, `root` among them; all names that they use are there.

    Raises RequestError with the line and column of the first mistake.
    """
    return _Reader(text).grammar()


def needed(rules: Rules) -> list[str]:
    """The names of the rules that `root` needs, itself first."""
    found = {"root": None}
    left = ["root"]
    while left:
        new = [name for name in names_in(rules[left.pop()]) if name not in found]
        found.update(dict.fromkeys(new))
        left += new
    return list(found)


def recursive(rules: Rules) -> bool:
    """Whether a rule that `root` needs comes back to itself."""
    graph = {name: names_in(rules[name]) for name in needed(rules)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False


def names_in(node: Node) -> list[str]:
    """The names that `node` uses, each once, in order."""
    if isinstance(node, Name):
        return [node.name]
    parts: tuple[Node, ...] = ()
    if isinstance(node, Sequence):
        parts = node.parts
    elif isinstance(node, Choice):
        parts = node.options
    elif isinstance(node, Repeat):
        parts = (node.part,)
    return list(dict.fromkeys(name for part in parts for name in names_in(part)))


def characters(ranges: list[Range], *, negated: bool = False) -> Chars:
    """`ranges` in order and without overlaps, or all that is not in them."""
    taken = [*sorted(ranges), (0xD800, 0xDFFF)] if negated else sorted(ranges)
    merged: list[Range] = []
    for first, last in sorted(taken):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    if not negated:
        parts = ((first, last) for first, last in merged)
        cut = [piece for first, last in parts for piece in ((first, min(last, 0xD7FF)), (max(first, 0xE000), last))]
        return Chars(tuple(piece for piece in cut if piece[0] <= piece[1]))
    edges = [-1, *(edge for pair in merged for edge in pair), LAST_CHARACTER + 1]
    gaps = [(edges[place] + 1, edges[place + 1] - 1) for place in range(0, len(edges), 2)]
    return Chars(tuple(gap for gap in gaps if gap[0] <= gap[1]))


ANY = characters([], negated=True)

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_TIMES: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Reader:
    """A cursor over the text. Each method reads one thing of the language at the cursor."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._deep = 0
        self._used: dict[str, int] = {}
        """Names, and where each was used first."""

    def grammar(self) -> Rules:
        rules: Rules = {}
        self._space(lines=True)
        while self._at < len(self._text):
            start = self._at
            name = self._name()
            self._space(lines=False)
            if not self._text.startswith("::=", self._at):
                self._refuse(f"rule {name} is not followed by ::=")
            self._at += 3
            self._space(lines=True)
            if name in rules:
                self._refuse(f"rule {name} is defined a second time", start)
            rules[name] = self._choice(nested=False)
            if self._at < len(self._text) and self._peek() not in "\r\n":
                self._refuse(f"{self._shown()} cannot stand here in rule {name}")
            self._space(lines=True)
        if "root" not in rules:
            raise RequestError("grammar has no rule named root, where it would begin", "grammar")
        for name, at in self._used.items():
            if name not in rules:
                self._refuse(f"there is no rule named {name}", at)
        return rules

    def _choice(self, *, nested: bool) -> Node:
        options = [self._sequence(nested=nested)]
        while self._peek() == "|":
            self._at += 1
            self._space(lines=True)
            options.append(self._sequence(nested=nested))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, *, nested: bool) -> Node:
        parts: list[Node] = []
        while (part := self._part()) is not None:
            self._space(lines=nested)
            part = self._times(part)
            self._space(lines=nested)
            parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _part(self) -> Node | None:
        sign = self._peek()
        if sign == '"':
            return self._literal()
        if sign == "[":
            return self._class()
        if sign == ".":
            self._at += 1
            return ANY
        if sign == "(":
            return self._group()
        if _is_word(sign):
            start = self._at
            name = self._name()
            self._used.setdefault(name, start)
            return Name(name)
        if sign in "<!" and sign:
            self._refuse("tokens (<…>, !<…>) are not supported: write the text that they stand for")
        return None

    def _group(self) -> Node:
        start = self._at
        self._deep += 1
        if self._deep > GROUPS_DEEP_MAX:
            self._refuse(f"groups are nested deeper than {GROUPS_DEEP_MAX}; give some of them names of their own")
        self._at += 1
        self._space(lines=True)
        node = self._choice(nested=True)
        if self._peek() != ")":
            what = "the group that begins here is not closed" if not self._peek() else ""
            self._refuse(what or f"{self._shown()} cannot stand here in a group", start if what else None)
        self._at += 1
        self._deep -= 1
        return node

    def _literal(self) -> Node:
        start = self._at
        self._at += 1
        found: list[Node] = []
        while self._peek() != '"':
            if not self._peek():
                self._refuse("the text that begins here is not closed", start)
            code = self._character()
            found.append(Chars(((code, code),)))
        self._at += 1
        return found[0] if len(found) == 1 else Sequence(tuple(found))

    def _class(self) -> Node:
        start = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[Range] = []
        while self._peek() != "]":
            if not self._peek():
                self._refuse("the class that begins here is not closed", start)
            first = last = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._character()
                if last < first:
                    self._refuse("a range of this class ends before it begins", start)
            ranges.append((first, last))
        self._at += 1
        chars = characters(ranges, negated=negated)
        if not chars.ranges:
            self._refuse("no character is in this class", start)
        return chars

    def _character(self) -> int:
        """The code of one character, which may be written as an escape."""
        start = self._at
        sign = self._peek()
        self._at += 1
        if sign != "\\":
            return ord(sign)
        escape = self._peek()
        self._at += 1
        if escape in _HEX_DIGITS:
            digits = self._text[self._at : self._at + _HEX_DIGITS[escape]]
            self._at += len(digits)
            try:
                if len(digits) < _HEX_DIGITS[escape] or not digits.isalnum():
                    raise ValueError
                code = int(digits, 16)
            except ValueError:
                self._refuse(f"\\{escape} wants {_HEX_DIGITS[escape]} hexadecimal digits", start)
            if code > LAST_CHARACTER or 0xD800 <= code <= 0xDFFF:
                self._refuse(f"\\{escape}{digits} is no character", start)
            return code
        if escape not in _ESCAPES or not escape:
            self._refuse('unknown escape: there are \\n \\r \\t \\\\ \\" \\[ \\] \\x \\u and \\U', start)
        return ord(_ESCAPES[escape])

    def _times(self, part: Node) -> Node:
        """`part`, repeated as what follows says."""
        sign, start = self._peek(), self._at
        if not sign or sign not in "*+?{":
            return part
        self._at += 1
        least, most = self._braces(start) if sign == "{" else _TIMES[sign]
        if self._peek() and self._peek() in "*+?{":
            self._refuse("what is repeated cannot be repeated again: put it into a group")
        return Repeat(part, least, most)

    def _braces(self, start: int) -> tuple[int, int | None]:
        self._space(lines=True)
        least = self._number()
        most: int | None = least
        if self._peek() == ",":
            self._at += 1
            self._space(lines=True)
            most = None if self._peek() == "}" else self._number()
        if self._peek() != "}":
            self._refuse("a repetition is written {m}, {m,} or {m,n}", start)
        self._at += 1
        if most is not None and most < least:
            self._refuse("a repetition ends before it begins", start)
        return least, most

    def _number(self) -> int:
        start = self._at
        while self._peek() and self._peek() in "0123456789":
            self._at += 1
        digits = self._text[start : self._at]
        if not digits:
            self._refuse("a repetition is written {m}, {m,} or {m,n}")
        if len(digits) > 9 or int(digits) > REPEATS_MAX:
            self._refuse(f"a repetition of {digits[:20]} is over the limit of {REPEATS_MAX:,}", start)
        self._space(lines=True)
        return int(digits)

    def _name(self) -> str:
        start = self._at
        while _is_word(self._peek()):
            self._at += 1
        if self._at == start:
            hint = "; write | at the end of the line before" if self._peek() == "|" else ""
            self._refuse(f"a rule must begin here, with its name, not {self._shown()}{hint}")
        return self._text[start : self._at]

    def _space(self, *, lines: bool) -> None:
        """Pass over spaces and comments, and with `lines` over the ends of lines too."""
        while sign := self._peek():
            if sign == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif sign in " \t" or (lines and sign in "\r\n"):
                self._at += 1
            else:
                return

    def _peek(self) -> str:
        """The character at the cursor; "" at the end."""
        return self._text[self._at : self._at + 1]

    def _shown(self) -> str:
        return repr(self._peek()) if self._peek() else "the end"

    def _refuse(self, what: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        raise RequestError(f"grammar, line {line}, column {column}: {what}", "grammar")


def _is_word(sign: str) -> bool:
    return sign != "" and sign in _WORD


_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
