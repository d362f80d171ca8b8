"""What a request asks to be told of its tokens, and what its text is held to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scheduling.constraints import Constraint
from scheduling.errors import RequestError
from scheduling.requestlines import request_line
from scheduling.requests import Request, Sampling, parse_request
from tests.scheduling.reading import CHAT, parse, refusal

# ---------------------------------------------------------------- log-probabilities

GRAMMAR = 'root ::= "a"'
SCORED: dict[str, object] = {"prompt": "a", "continuations": ["b"]}


def test_log_probabilities_are_asked_for_as_each_endpoint_has_it() -> None:
    assert parse({**CHAT, "logprobs": True, "top_logprobs": 5}).logprobs == 5
    assert parse({**CHAT, "logprobs": True}).logprobs == 0
    assert parse({**CHAT, "logprobs": False, "top_logprobs": 0}).logprobs is None
    assert parse({"prompt": "a", "logprobs": 3}).logprobs == 3
    assert parse({"prompt": "a", "logprobs": 0}).logprobs == 0
    assert parse({"prompt": "a", "echo": True}).echo
    assert not parse({"prompt": "a", "echo": True}).scores


def test_a_prompt_or_continuations_are_scored() -> None:
    prompt = parse({"prompt": [1, 2], "echo": True, "logprobs": 1, "max_tokens": 1})
    assert (prompt.scores, prompt.sampling.max_tokens, prompt.logprobs) == (True, 1, 1)
    assert parse({"prompt": "a", "echo": True, "logprobs": 0, "max_tokens": 0}).scores
    given = parse({"prompt": "a", "continuations": ["b", [7, 8]]}, defaults=Sampling(max_tokens=64))
    assert (given.scores, given.continuations, given.logprobs) == (True, ("b", (7, 8)), 0)
    assert given.sampling.max_tokens == 0, "whatever the default for requests that generate"


def test_a_runs_form_of_answers_is_not_for_what_is_scored() -> None:
    held = Sampling(constraint=parse({"prompt": "a", "grammar": GRAMMAR}).sampling.constraint)
    assert parse({"prompt": "a"}, defaults=held).sampling.constraint is not None
    assert parse({**SCORED, "response_format": {"type": "text"}}, defaults=held).sampling.constraint is None
    assert parse({**SCORED}, defaults=held).sampling.constraint is None


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer from 0 to 20 in a completion"),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs", "left out in a completion"),
        ({**CHAT, "logprobs": 5}, "logprobs", "top_logprobs says how many"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs", "where logprobs is not true"),
        ({**CHAT, "echo": True}, "echo", "in a chat"),
        ({**CHAT, "continuations": ["a"]}, "continuations", "in a chat"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "0 beside echo and logprobs"),
        ({"prompt": "a", "max_tokens": 0, "echo": True}, "max_tokens", "0 beside echo and logprobs"),
        ({**CHAT, "max_tokens": 0, "logprobs": True}, "max_tokens", "0 beside echo and logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "max_tokens", "(or 1, for one token more)"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 2}, "max_tokens", "leave out echo"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}, "n", "one answer"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1, "grammar": GRAMMAR}, "grammar", "are scored"),
        ({**SCORED, "n": 2}, "n", "one answer"),
        ({**SCORED, "json_schema": {}}, "json_schema", "are scored"),
        ({**SCORED, "response_format": {"type": "json_object"}}, "response_format", "are scored"),
        ({**SCORED, "echo": True}, "echo", "beside continuations"),
        ({**SCORED, "max_tokens": 5}, "max_tokens", "nothing is generated"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(value: object, param: str, words: str) -> None:
    error = refusal(value)
    assert error.param == param
    assert words in str(error)
    assert "u2026" not in str(error), "a value that is not shown is left out"


# ---------------------------------------------------------------- what the text may be

YES_NO = 'root ::= "yes" | "no"'
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": True}}
NAMED = {"name": "pair", "schema": SCHEMA, "strict": True, "description": "Two of them."}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"grammar": YES_NO}, Constraint("grammar", YES_NO)),
        ({"grammar": YES_NO, "response_format": {"type": "text"}}, Constraint("grammar", YES_NO)),
        ({"json_schema": SCHEMA}, Constraint("schema", json.dumps(SCHEMA, separators=(",", ":")))),
        ({"response_format": {"type": "json_object"}}, Constraint("schema", '{"type":"object"}')),
        ({"response_format": {"type": "text"}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_request_says_what_its_text_may_be(given: dict[str, Any], expected: Constraint | None) -> None:
    assert parse({**CHAT, **given}).sampling.constraint == expected


def test_openais_form_of_a_schema_means_the_schema_whatever_its_name() -> None:
    form = {"type": "json_schema", "json_schema": NAMED}
    same = parse({"prompt": "a", "json_schema": SCHEMA})
    assert parse({"prompt": "a", "response_format": form}) == same
    assert parse({"custom_id": "d", "body": {"prompt": "a", "response_format": form}}) == same


def test_a_runs_constraint_holds_for_requests_that_do_not_say() -> None:
    defaults = Sampling(constraint=Constraint("grammar", YES_NO))
    assert parse({"prompt": "a", "json_schema": None}, defaults=defaults).sampling == defaults
    assert parse({"prompt": "a", "response_format": {"type": "text"}}, defaults=defaults).sampling.constraint is None
    assert parse({"prompt": "a", "json_schema": {}}, defaults=defaults).sampling.constraint == Constraint(
        "schema", "{}"
    )


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"grammar": YES_NO, "json_schema": {}}, "json_schema", "grammar and json_schema are both given"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, "response_format", "both given"),
        ({"grammar": "root ::= x"}, "grammar", "line 1, column 10: there is no rule named x"),
        ({"grammar": ""}, "grammar", "not empty"),
        ({"grammar": "#" * 70_000}, "grammar", "70,000 bytes; at most 65,536"),
        ({"json_schema": {"const": "x" * 70_000}}, "json_schema", "70,012 bytes; at most 65,536"),
        ({"json_schema": [SCHEMA]}, "json_schema", "a JSON schema that is an object"),
        ({"json_schema": "{}"}, "json_schema", "a JSON schema that is an object"),
        ({"json_schema": {"x-guidance": {}}}, "json_schema", "x-guidance, which is not supported"),
        ({"json_schema": json.loads('{"items":' * 101 + "{}" + "}" * 101)}, "json_schema", "nested deeper than 100"),
        ({"grammar": YES_NO, "ignore_eos": True}, "ignore_eos", "ends when it is whole"),
        ({"response_format": {"type": "xml"}}, "response_format", '{"type": "json_object"}'),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "it must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", '"schema"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema", "a JSON schema that is an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strct": True}}},
         "response_format.json_schema.strct", "did you mean strict?"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": 1}}},
         "response_format.json_schema.strict", "true or false"),
    ],
    ids=lambda item: str(item)[:30],
)  # fmt: skip
def test_what_cannot_be_a_constraint_is_refused_when_it_is_read(
    given: dict[str, Any], param: str, message: str
) -> None:
    for error in (refusal({"prompt": "a", **given}), refusal({"custom_id": "x", "body": {"prompt": "a", **given}})):
        assert error.param == param
        assert message in str(error)


@pytest.mark.parametrize(
    "constraint", [None, Constraint("grammar", YES_NO), Constraint("schema", '{"title":"b","const":2}')]
)
def test_a_constraint_survives_being_written_as_a_line(constraint: Constraint | None) -> None:
    request = Request(custom_id="a", kind="completion", prompt="p", sampling=Sampling(constraint=constraint))
    other = Sampling(constraint=Constraint("grammar", 'root ::= "other"'))
    assert parse_request(request_line(request), other) == request


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"tpye": "string"}, "tpye.*did you mean type"),
        ({"type": "object", "properties": {"a": {"type": "string", "maxlength": 3}}}, "properties.a has 'maxlength'"),
        ({"anyOf": [{"type": "string"}, {"foo": 1}]}, r"anyOf\[1\] has 'foo'"),
    ],
)
def test_what_is_no_keyword_of_a_schema_is_named(schema: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        parse_request(json.dumps({"prompt": "x", "json_schema": schema}).encode(), default_id="a")


def test_names_of_properties_may_be_anything_in_a_schema() -> None:
    schema = {"type": "object", "properties": {"tpye": {"enum": [{"foo": 1}]}}, "required": ["tpye"]}
    parse_request(json.dumps({"prompt": "x", "json_schema": schema}).encode(), default_id="a")
