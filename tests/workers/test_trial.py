"""A grammar that would hang, crash or fill the engine ends a process of its own instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from scheduling.constraints import Constraint, of_schema
from tests.workers.grammar_fakes import grammar
from workers.lark import HEAD, to_lark
from workers.trial import Trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    one = Trial()
    yield one
    one.close()


def schema(value: dict[str, Any]) -> Constraint:
    return of_schema(value, "json_schema")


def chain(levels: int, link: dict[str, Any]) -> dict[str, Any]:
    """Definitions of which each refers to the next, `link` holding "NEXT" where."""

    def linked(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: linked(item, name) for key, item in value.items()}
        if isinstance(value, list):
            return [linked(item, name) for item in value]
        return name if value == "NEXT" else value

    definitions = {f"d{place}": linked(link, f"#/$defs/d{place + 1}") for place in range(levels)}
    return {"$defs": {**definitions, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


SIBLINGS = {
    "type": "array",
    "prefixItems": [{"$ref": "NEXT", "type": ["string", "array"]}, {"$ref": "NEXT", "type": ["array", "string"]}],
    "minItems": 2,
}


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema({"patternProperties": {f"^k{n}[a-z]*(a|b){{1,9}}x$": {} for n in range(600)}}), "more than 3 seconds"),
        (schema(chain(40, SIBLINGS)), "more than 256 MiB of memory"),
        (schema({"allOf": [{"anyOf": [{"properties": {f"k{n}": {"const": m}}} for m in range(4)]} for n in range(10)]}),
         "schema too large"),
        (grammar("".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(40)) + 'r40 ::= [ab]\nroot ::= r0'),
         "it is too complex"),
        (schema({"type": "integer", "multipleOf": 982451653}), "it is too complex"),
        (schema({"type": "number", "maximum": 1e300}), "they go up to 9e18"),
        (schema({"type": "integer", "maximum": 10**400}), "a number in it is too large"),
        (schema({"type": "number", "multipleOf": 0}), "multipleOf must be a number above 0"),
        (schema({"$ref": "https://example.com/schema.json"}), "is not in the schema, and none is fetched"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no text at all can satisfy it"),
        (schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"}),
         "circular references"),
        (schema({"not": {"type": "string"}, "uniqueItems": True}), "keywords that are not supported"),
        (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (schema({"type": "string", "pattern": "(" * 2000 + "a" + ")" * 2000}), "regex parse error"),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum (3) is greater than maximum (2)"),
        (schema({"oneOf": [{"minLength": 1}, {"maxLength": 2}]}), "anyOf always does"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (grammar("root ::= x\nx ::= root"), "no text at all can satisfy it"),
    ],
    ids=lambda item: str(getattr(item, "text", item))[:40],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_with_a_reason(trial: Trial, constraint: Constraint, reason: str) -> None:
    said = trial.reason(to_lark(constraint))
    assert reason in said
    assert "\n" not in said
    assert trial.reason(to_lark(grammar('root ::= "still here"'))) == ""


@pytest.mark.parametrize(
    "constraint",
    [
        schema(chain(1_000, {"items": {"$ref": "NEXT"}})),
        schema({"enum": [f"value {n}" for n in range(4_000)]}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000, "maxItems": 100_000}),
        schema({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}),
        schema({"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(1_000)}}),
        grammar("".join(f'r{n} ::= "a" r{n + 1}\n' for n in range(3_000)) + "r3000 ::= root?\nroot ::= r0"),
        grammar("root ::= root root root | [ab] | "),
        grammar("root ::= ((([ab]{1,1000}){1,1000}){1,1000})"),
        grammar("root ::= " + " | ".join(f'"word {n}"' for n in range(3_000))),
    ],
    ids=lambda item: item.text[:40],
)
def test_what_only_looks_hostile_is_compiled(trial: Trial, constraint: Constraint) -> None:
    assert trial.reason(to_lark(constraint)) == ""


def test_a_stack_that_overflows_ends_the_trial_alone(trial: Trial) -> None:
    deep = HEAD + "".join(f't{n}: "a" t{n + 1}\n' for n in range(40_000)) + 't40000: "b"\nstart: t0'
    assert trial.reason(deep) == "its parts are nested too deeply"
    assert trial.reason(HEAD + 'start: "a"') == ""
