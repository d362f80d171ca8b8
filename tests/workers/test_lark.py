"""A grammar means the same to llguidance as it means in GBNF."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from scheduling.gbnf import parse_gbnf, recursive
from tests.workers.grammar_fakes import grammar, language
from workers.lark import to_lark
from workers.trial import LIMITS, byte_tokenizer

ALPHABET, LONGEST = "abc", 4
TEXTS = ["".join(signs) for length in range(LONGEST + 1) for signs in product(ALPHABET, repeat=length)]
TOKENIZER = byte_tokenizer()

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
MOVES = r"""
root ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")*
move ::= (pawn | piece | "O-O" "-O"?) [+#]?
piece ::= [NBKQR] [a-h]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBQR])?
"""
GREETING = 'root ::= [\u3041-\u3096]+ ("\u3001" | "\U0001f642" | [^\\x00-\\x7f]{2})? "\u3002"'


def matcher(text: str) -> LLMatcher:
    return LLMatcher(TOKENIZER, to_lark(grammar(text)), log_level=0, limits=LIMITS)


def whole(fresh: LLMatcher, text: str) -> bool:
    data = list(text.encode())
    return fresh.try_consume_tokens(data) == len(data) and fresh.is_accepting()


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        (ARITHMETIC, ["x=1\n", "x+1 = 3 \n\n", "(a*b)/2=c\ny=2\n"], ["x=1", "x=\n", "1+=2\n"]),
        (MOVES, ["1. e4 e5\n", "1. e4 c5\n2. Nf3 dxc4\n", "1. O-O-O exd8=Q#\n"], ["1. e9 e5\n", "1. e4\n", "e4 e5\n"]),
        (GREETING, ["\u3053\u3093\u3002", "\u3053\u3001\u3002", "\u3042\u00e9\u4e16\u3002"], ["\u3002", "a\u3002"]),
        ('root ::= "- " [^\\n]+ "\\n" root?', ["- a\n", "- - b\n- c\n"], ["- a", "-a\n"]),
        ('root ::= word "b"\nword ::= [a-z]+', ["ab", "bb", "abb"], ["b", "a"]),
        ('root ::= "ab" "c" "x" | "abc" "y"', ["abcx", "abcy"], ["abc", "ab"]),
        ('root ::= "(" root ")" root | ""', ["", "()", "(())()"], ["(", ")("]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["", "a"]),
    ],
)
def test_known_grammars_accept_what_they_mean(text: str, good: list[str], bad: list[str]) -> None:
    assert all(whole(matcher(text), one) for one in good)
    assert not any(whole(matcher(text), one) for one in bad)


def _written(depth: int) -> st.SearchStrategy[str]:
    leaf = st.sampled_from(['"a"', '"ab"', '"ba"', '""', "[ab]", "[^a]", "[b-c]", "x", "y", "root"])
    if depth == 0:
        return leaf
    inner = _written(depth - 1)
    return st.one_of(
        leaf,
        st.tuples(inner, inner).map(" ".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]} | {two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,2}"])).map(lambda two: f"({two[0]}){two[1]}"),
    )


@pytest.mark.slow
@settings(max_examples=150)
@given(_written(2), _written(2), _written(1))
def test_a_random_grammar_accepts_exactly_its_language(root: str, x: str, y: str) -> None:
    text = f"root ::= {root}\nx ::= {x}\ny ::= {y}\n"
    rules = parse_gbnf(text)
    meant = language(rules, ALPHABET, LONGEST)
    fresh = matcher(text)
    if fresh.is_error():
        assert not meant, fresh.get_error()
        return
    accepted = {one for one in TEXTS if whole(fresh.deep_copy(), one)}
    assert accepted == meant, f"recursive: {recursive(rules)}"
