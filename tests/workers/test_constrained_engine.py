"""Grammars and schemas in the engine process: SmolLM2 for sense, the tiny random model for everything that can come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduling.constraints import ANY_OBJECT, Constraint, of_grammar, of_schema
from tests.workers.test_engine import PROMPTS, Session, chat, config, text
from tests.workers.test_supervisor import PATIENCE_S
from workers.protocol import Choice

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 60},
        "kind": {"enum": ["fact", "text", "number"]},
        "sure": {"type": "boolean"},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["answer", "kind", "sure", "score"],
    "additionalProperties": False,
}
LIST = 'root ::= item{2,3}\nitem ::= "- " [^\\r\\n]{1,20} "\\n"'
SUM = 'root ::= sum " = " number\nsum ::= number | sum " + " number | "(" sum ")"\nnumber ::= [1-9] [0-9]{0,2}'
GAME = r"""
root ::= "1. " move " " move "\n2. " move " " move "\n"
move ::= ([NBKQR] [a-h]? "x"? [a-h] [1-8] | ([a-h] "x")? [a-h] [1-8] | "O-O" "-O"?) [+#]?
"""
KANA = 'root ::= [\u3041-\u3096]{2,6} "\U0001f642"?'


@pytest.fixture(scope="module")
def real(real_model: Path) -> Iterator[Session]:
    session = Session(config(real_model))
    yield session
    session.engine.close(PATIENCE_S)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Session]:
    session = Session(config(tiny_model, slots=6, contexts=2))
    yield session
    session.engine.close(PATIENCE_S)


def schema(value: dict[str, Any]) -> Constraint:
    return of_schema(value, "json_schema")


def test_twenty_answers_are_instances_of_the_schema(real: Session) -> None:
    held = schema(ANSWER_SCHEMA)
    jobs = [
        chat(place, f"{prompt} Answer in JSON.", constraint=held, max_tokens=120, temperature=place % 2, seed=place)
        for place, prompt in enumerate(PROMPTS)
    ]
    for answer in real.ask(*jobs).values():
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text(answer)), ANSWER_SCHEMA)


def test_any_object_is_an_object(real: Session) -> None:
    held = Constraint("schema", ANY_OBJECT)
    jobs = [
        chat(100 + place, f"{prompt} Answer in short JSON.", constraint=held, max_tokens=100)
        for place, prompt in enumerate(PROMPTS[:6])
    ]
    choices = [answer.choices[0] for answer in real.ask(*jobs).values()]
    whole = [json.loads(choice.text) for choice in choices if choice.finish_reason == "stop"]
    assert whole
    assert all(isinstance(value, dict) for value in whole)
    assert all(choice.text.startswith("{") for choice in choices)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (LIST, r"(- [^\r\n]{1,20}\n){2,3}"),
        (SUM, r"[(]*[1-9][0-9]{0,2}[)]*( \+ [1-9][0-9]{0,2}[)]*)* = [1-9][0-9]{0,2}"),
        (GAME, r"1\. \S+ \S+\n2\. \S+ \S+\n"),
        (KANA, "[\u3041-\u3096]{2,6}\U0001f642?"),
    ],
    ids=["list", "sum", "chess", "kana"],
)
def test_texts_follow_a_grammar(real: Session, grammar: str, pattern: str) -> None:
    held = of_grammar(grammar)
    jobs = [
        chat(key, "Say something.", constraint=held, max_tokens=90, temperature=key % 3 / 2, seed=key)
        for key in range(200, 206)
    ]
    choices = [answer.choices[0] for answer in real.ask(*jobs).values()]
    whole = [choice.text for choice in choices if choice.finish_reason == "stop"]
    assert whole
    assert [one for one in whole if not re.fullmatch(pattern, one)] == []


def test_neighbours_without_a_grammar_say_the_same(real_model: Path) -> None:
    """Greedy, with flash attention and nothing reused: what then runs beside a text hardly ever changes it."""
    session = Session(msgspec.structs.replace(config(real_model), prefix_reuse=False, flash_attention=True))
    free = [chat(300 + place, prompt) for place, prompt in enumerate(PROMPTS[:4])]
    held = [chat(320 + place, "Describe a river.", constraint=schema(ANSWER_SCHEMA)) for place in range(3)]
    # One at a time beside three of the others.
    plain = [chat(340 + place, "Describe a river.", max_tokens=job.request.sampling.max_tokens, ignore_eos=True)
             for place, job in enumerate(held)]  # fmt: skip
    for place, job in enumerate(free):
        mixed = session.ask(job, *held)[job.key]
        alone = session.ask(job, *plain)[job.key]
        assert text(mixed) == text(alone), PROMPTS[place]
    session.engine.close(PATIENCE_S)


def test_streaming_seeds_and_choices_hold_to_the_schema(tiny: Session) -> None:
    held = schema({"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"],
                   "additionalProperties": False})  # fmt: skip
    one = chat(400, "x", constraint=held, n=4, temperature=4.0, seed=5, max_tokens=100)
    first = tiny.ask(one)[400].choices
    assert len({choice.text for choice in first}) == 4
    assert all(len(json.loads(choice.text)["a"]) <= 9 for choice in first if choice.finish_reason == "stop")
    streamed = tiny.ask(chat(401, "x", constraint=held, temperature=4.0, seed=5, max_tokens=100, stream=True))[401]
    assert tiny.text(401) == text(streamed)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema({"type": "strin"}), "the JSON schema cannot be used: Invalid type: strin"),
        (schema({"$ref": "file:///etc/passwd"}), "none is fetched"),
        (of_grammar("root ::= x\nx ::= root"), "the grammar cannot be used: no text at all can satisfy it"),
    ],
)
def test_what_cannot_be_used_fails_alone(tiny: Session, constraint: Constraint, reason: str) -> None:
    bad, good = tiny.ask(chat(500, "x", constraint=constraint), chat(501, "x")).values()
    answers = {answer.key: answer for answer in (bad, good)}
    assert reason in (answers[500].error or "")
    assert answers[501].error is None


def test_nobody_else_waits_for_a_schema_that_takes_long(tiny: Session) -> None:
    held = schema({"patternProperties": {f"^k{n}[a-z]*(a|b){{1,9}}x$": {} for n in range(600)}})
    got = tiny.ask(chat(300, "Hi", constraint=held), *(chat(key, "Hi", max_tokens=1) for key in range(301, 309)))
    assert list(got)[-1] == 300
    assert "more than 3 seconds" in (got[300].error or "")


def test_an_ambiguous_grammar_ends_its_request_and_no_other(tiny: Session) -> None:
    hostile = of_grammar("root ::= (.? .? .?){0,200} (.? .? .? .?){0,200} [a-z]{0,50} root | .")
    jobs = [chat(600, "x", constraint=hostile, max_tokens=200, ignore_eos=False, temperature=1.0),
            chat(601, "x", max_tokens=150, ignore_eos=True)]  # fmt: skip
    answers = tiny.ask(*jobs)
    assert answers[601].error is None
    assert answers[601].output_tokens == 150
    assert (answers[600].error or "").startswith("the grammar: ")
    assert tiny.ask(chat(602, "still here?"))[602].error is None


_names = st.sampled_from(["a", "b", "id", "na me", "\u00e9\u4e16", 'quo"te'])
_leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-99, 99),
              st.integers(0, 500)),
    st.builds(lambda low, size: {"type": "number", "minimum": low, "maximum": low + size}, st.integers(-9, 9),
              st.integers(1, 9)),
    st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more}, st.integers(0, 3),
              st.integers(0, 6)),
    st.sampled_from([
        {"type": "boolean"}, {"type": "null"}, {"const": {"x": [1, None]}}, {"type": "string", "format": "date"},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"}, {"type": ["boolean", "null"]}, {"type": "string",
        "format": "ipv4"},
    ]),
    st.lists(st.one_of(st.integers(-5, 5), st.text("ab\u00e9\\\"\n", max_size=3)), min_size=1, max_size=4).map(
        lambda values: {"enum": values}),
)  # fmt: skip


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(_names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {"type": "object", "properties": properties, "required": sorted(required),
                              "additionalProperties": False}))  # fmt: skip


_schemas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(lambda items, least, more: {"type": "array", "items": items, "minItems": least,
                                              "maxItems": least + more}, inner, st.integers(0, 2), st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_schemas, st.integers(0, 2**31))
def test_what_a_random_model_says_is_an_instance_of_any_schema(tiny: Session, value: dict[str, Any], seed: int) -> None:
    held = schema(value)
    jobs = [chat(key, "x", constraint=held, temperature=1.0, seed=seed + key, max_tokens=150) for key in range(1, 5)]
    for answer in tiny.ask(*jobs).values():
        assert answer.error is None, (answer.error, value)
        choice: Choice = answer.choices[0]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.text), value, format_checker=jsonschema.FormatChecker())
