"""Grammars in GBNF become rules over characters, or are refused with the place of the mistake."""

from __future__ import annotations

import pytest

from scheduling.errors import RequestError
from scheduling.gbnf import ANY, Chars, Choice, Name, Repeat, Sequence, needed, parse_gbnf, recursive

A, B = Chars(((97, 97),)), Chars(((98, 98),))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('"a"', A),
        ('"ab"', Sequence((A, B))),
        ('""', Sequence(())),
        ("", Sequence(())),
        ('"a" "b"', Sequence((A, B))),
        ('"a" | "b" |', Choice((A, B, Sequence(())))),
        ('"a" |\n  "b"', Choice((A, B))),
        ('("a"\n"b")', Sequence((A, B))),
        ('"a"*', Repeat(A, 0, None)),
        ('"a"+', Repeat(A, 1, None)),
        ('"ab"?', Repeat(Sequence((A, B)), 0, 1)),
        ('"a"{3}', Repeat(A, 3, 3)),
        ('"a"{ 3 , }', Repeat(A, 3, None)),
        ('"a"{0,7}', Repeat(A, 0, 7)),
        ("[a-cx]", Chars(((97, 99), (120, 120)))),
        ("[ca-b]", Chars(((97, 99),))),
        ("[a-]", Chars(((45, 45), (97, 97)))),
        (r"[\]\x41]", Chars(((65, 65), (93, 93)))),
        (r"[^\x00-\uFFFF]", Chars(((0x10000, 0x10FFFF),))),
        ("[^a]", Chars(((0, 96), (98, 0xD7FF), (0xE000, 0x10FFFF)))),
        ("[\u0430-\u044f]", Chars(((0x430, 0x44F),))),
        (r'"\n\"\\\U0001F642"', Sequence(tuple(Chars(((code, code),)) for code in (10, 34, 92, 0x1F642)))),
        (".", ANY),
        ('"a" # "b"', A),
        ("root", Name("root")),
    ],
)
def test_a_rule_is_read(body: str, expected: object) -> None:
    assert parse_gbnf(f"# a comment\n\nroot ::= {body}\n") == {"root": expected}


def test_rules_may_come_in_any_order_and_with_any_ends_of_lines() -> None:
    rules = parse_gbnf('item-2 ::= "a"\r\nroot ::=\n  item-2 b_c\r\n\r\nb_c ::= "b"')
    assert rules == {"item-2": A, "root": Sequence((Name("item-2"), Name("b_c"))), "b_c": B}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule named root"),
        ('start ::= "a"', "no rule named root"),
        ('root = "a"', "line 1, column 6: rule root is not followed by ::="),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule root is defined a second time"),
        ('root ::= "a" item "b"', "line 1, column 14: there is no rule named item"),
        ('root ::= "a', "line 1, column 10: the text that begins here is not closed"),
        ("root ::= [a", "line 1, column 10: the class that begins here is not closed"),
        ('root ::= ("a"', "line 1, column 10: the group that begins here is not closed"),
        ('root ::= "a")', "line 1, column 13: ')' cannot stand here"),
        ("root ::= [z-a]", "a range of this class ends before it begins"),
        ("root ::= []", "no character is in this class"),
        (r"root ::= [^\x00-\U0010FFFF]", "no character is in this class"),
        (r'root ::= "\q"', "unknown escape"),
        ('root ::= "\\', "unknown escape"),
        (r'root ::= "\u12"', "4 hexadecimal digits"),
        (r'root ::= "\ud800"', "is no character"),
        ('root ::= "a"{', "a repetition is written"),
        ('root ::= "a"{2', "a repetition is written"),
        ('root ::= "a"{3,2}', "a repetition ends before it begins"),
        ('root ::= "a"{1,100000}', "over the limit of 10,000"),
        ('root ::= "a"{1' + "0" * 5000 + "}", "over the limit of 10,000"),
        ('root ::= "a"**', "put it into a group"),
        ("root ::= <[42]>", "tokens"),
        ("root ::= !<think>", "tokens"),
        ('root ::= "a"\n  | "b"', "write | at the end of the line before"),
        ("root ::= " + "(" * 60_000, "nested deeper than 32"),
    ],
    ids=lambda text: text[:24],
)
def test_a_mistake_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_gbnf(text)
    assert message in str(caught.value)
    assert caught.value.param == "grammar"


def test_rules_that_come_back_to_themselves_are_seen_only_where_root_needs_them() -> None:
    assert not recursive(parse_gbnf('root ::= x x\nx ::= y | "a"\ny ::= "b"\nunused ::= unused'))
    assert recursive(parse_gbnf('root ::= x\nx ::= "a" | "(" root ")"'))
    assert needed(parse_gbnf('z ::= "a"\nroot ::= y\ny ::= "b"')) == ["root", "y"]


def test_a_long_chain_of_rules_is_read_without_recursion() -> None:
    chain = "".join(f'r{place} ::= "a" r{place + 1}\n' for place in range(3_000))
    rules = parse_gbnf(f'root ::= r0\n{chain}r3000 ::= "b"')
    assert len(needed(rules)) == 3_002
    assert not recursive(rules)
