"""Masks, matchers, and what happens to those that cannot go on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.constraints import Constraint
from scheduling.errors import RequestError
from tests.workers.grammar_fakes import END, TOKENS, allowed, constraints, grammar
from workers import constraints as module
from workers.constraints import STUCK, Allowed, Constraints, Matcher

PAIR = Constraint("schema", '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}')


@pytest.fixture(scope="module")
def one() -> Constraints:
    return constraints()


def feed(matcher: Matcher, text: str) -> None:
    for byte in text.encode():
        matcher.consume(byte)


def test_all_tokens_that_can_go_on_are_allowed_and_no_other(one: Constraints) -> None:
    matcher = one.grammar(grammar('root ::= "yes" | "yab" | "no"')).start()
    assert allowed(one, matcher) == {b"y", b"yes", b"n", b"no"}
    feed(matcher, "y")
    assert allowed(one, matcher) == {b"e", b"a", b"ab"}


def test_the_end_is_allowed_exactly_when_the_text_is_whole(one: Constraints) -> None:
    matcher = one.grammar(grammar('root ::= "a" "b"*')).start()
    assert b"" not in allowed(one, matcher)
    feed(matcher, "a")
    assert allowed(one, matcher) == {b"b", b""}
    assert not matcher.ended
    matcher.consume(END)
    assert matcher.ended


def test_a_text_that_nothing_can_follow_has_ended(one: Constraints) -> None:
    matcher = one.grammar(grammar('root ::= "yes" | "no"')).start()
    feed(matcher, "ye")
    assert not matcher.over
    feed(matcher, "s")
    assert (matcher.ended, matcher.over, matcher.error) == (True, True, "")


def test_between_the_parts_of_json_there_is_little_space(one: Constraints) -> None:
    matcher = one.grammar(PAIR).start()
    assert allowed(one, matcher) == {b"{", b'{"'}
    feed(matcher, "{")
    assert allowed(one, matcher) == {b'"', b" ", b"\n"}
    feed(matcher, " ")
    assert allowed(one, matcher) == {b'"'}


def test_texts_of_one_grammar_do_not_know_of_each_other(one: Constraints) -> None:
    compiled = one.grammar(grammar('root ::= "a" "b" "c"'))
    first, second = compiled.start(), compiled.start()
    feed(first, "ab")
    assert (allowed(one, first), allowed(one, second)) == ({b"c"}, {b"a", b"ab"})


def test_a_grammar_is_compiled_once(one: Constraints) -> None:
    assert one.grammar(PAIR) is one.grammar(PAIR)


def test_a_refusal_is_remembered_and_names_the_field() -> None:
    fresh = constraints()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"the JSON schema cannot be used: Invalid type: x") as caught:
            fresh.grammar(Constraint("schema", '{"type":"x"}'))
        assert caught.value.param == "json_schema"


def test_only_so_many_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRAMMARS_KEPT", 2)
    fresh = constraints()
    made = [fresh.grammar(grammar(f'root ::= "{letter}"')) for letter in "abc"]
    assert fresh.grammar(grammar('root ::= "c"')) is made[2]
    assert fresh.grammar(grammar('root ::= "a"')) is not made[0]


def test_a_model_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(RequestError, match="no token that ends a text"):
        Constraints(len(TOKENS), TOKENS.__getitem__, [], 1).grammar(PAIR)


def test_a_text_that_no_token_can_continue_fails() -> None:
    # This vocabulary has no bytes.
    poor = Constraints(3, [b"a", b"b", b""].__getitem__, [2], 1)
    matcher = poor.grammar(grammar('root ::= "a" "c"')).start()
    matcher.consume(0)
    poor.allowed([matcher])
    assert matcher.error.startswith("the grammar: ")


def test_masks_of_many_texts_are_made_at_once_whatever_the_threads() -> None:
    for threads in (1, 2):
        fresh = constraints(threads)
        matchers = [fresh.grammar(grammar(f'root ::= "{letter}" [0-9]+')).start() for letter in "abcdefgh"]
        found = fresh.allowed([None, *matchers[:4], None, *matchers[4:]])
        assert found is not None
        assert found.places.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
        bits = np.unpackbits(found.masks, axis=1, bitorder="little")
        assert [np.flatnonzero(line)[0] for line in bits] == [ord(letter) for letter in "abcdefgh"]


def test_without_constrained_texts_there_is_nothing_to_do(one: Constraints) -> None:
    assert one.allowed([None, None]) is None


def test_a_grammar_that_takes_too_long_fails_its_texts_and_is_refused_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.0)
    monkeypatch.setattr(module, "FREE_S", 0.005)
    monkeypatch.setattr(module, "BUDGET_S", 0.05)
    fresh = constraints()
    hard, easy = (fresh.grammar(grammar(text)) for text in ("root ::= root root | [a] | ", "root ::= [a]+"))
    slow, other, quick = hard.start(), hard.start(), easy.start()
    for _ in range(500):
        fresh.allowed([slow, other, quick])
        if slow.over:
            break
        slow.consume(ord("a"))
        quick.consume(ord("a"))
    assert slow.error.startswith("the grammar: it is too complex")
    assert not quick.over
    fresh.allowed([other])
    assert other.error == slow.error
    with pytest.raises(RequestError, match="it is too complex"):
        fresh.grammar(grammar("root ::= root root | [a] | "))
    assert fresh.grammar(grammar("root ::= [a]+")) is easy


def test_a_text_over_the_limits_of_its_lexer_fails_with_the_reason() -> None:
    fresh = constraints()
    # More ways to have come to a place than are kept apart.
    matcher = fresh.grammar(grammar("root ::= ((([ab]{1,1000}){1,1000}){1,1000})")).start()
    for byte in b"ab" * 200:
        fresh.allowed([matcher])
        if matcher.over:
            break
        matcher.consume(byte)
    assert "cannot be followed any further" in matcher.error
    assert "it is too complex" in matcher.error
    again = fresh.grammar(grammar("root ::= ((([ab]{1,1000}){1,1000}){1,1000})"))
    assert again is not matcher.grammar
    assert again.start().error == ""


@given(
    st.integers(1, 300),
    st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_exactly_what_is_not_in_the_mask_is_forbidden(vocab_tokens: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    bits = random.random((3, vocab_tokens)) < share
    padded = np.zeros((3, -(-vocab_tokens // 32) * 32), np.bool_)
    padded[:, :vocab_tokens] = bits
    masks = np.packbits(padded, axis=1, bitorder="little")
    logits = random.standard_normal((5, vocab_tokens)).astype(np.float32)
    before = logits.copy()
    # Outputs are in rows 1 to 4; those at places 0, 2 and 3 of them are constrained.
    Allowed(np.array([0, 2, 3]), [], masks).forbid_others(logits, np.array([1, 2, 3, 4]))
    assert (logits[[0, 2]] == before[[0, 2]]).all()
    assert (logits[[1, 3, 4]] == np.where(bits, before[[1, 3, 4]], -np.inf)).all()


def test_the_token_of_a_failed_text_is_stuck(one: Constraints) -> None:
    matchers = [one.grammar(grammar('root ::= "ab"')).start() for _ in range(2)]
    found = one.allowed(matchers)
    assert found is not None
    matchers[0].fail("broken")
    tokens = np.array([ord("a"), ord("a")], np.int32)
    found.consume(tokens)
    assert tokens.tolist() == [STUCK, ord("a")]
    assert allowed(one, matchers[1]) == {b"b"}
