"""What the text of an answer may be: a grammar or a JSON schema, as a request gives it.

There are three ways to ask: OpenAI's `response_format`, llama.cpp's `json_schema` (the schema itself) and its
`grammar` (GBNF). All become one `Constraint`. Here is checked what can be said of it without a vocabulary: its form,
its size, a grammar's syntax. What a schema means is for the engine to say (`workers.constraints`).
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import msgspec

from scheduling.errors import RequestError
from scheduling.gbnf import parse_gbnf

TEXT_BYTES_MAX = 64 << 10
"""Largest schema (as compact JSON) or grammar."""
SCHEMA_DEEP_MAX = 100
"""Objects and lists within each other in a schema."""

ANY_OBJECT = '{"type":"object"}'
"""The schema of `{"type": "json_object"}`."""


_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Their value is an object whose keys are names of the user's and whose values are schemas."""
_SCHEMAS = (
    "anyOf", "allOf", "oneOf", "prefixItems", "items", "additionalProperties", "additionalItems", "not", "if", "then",
    "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "contentSchema",
)  # fmt: skip
"""Their value is a schema or a list of schemas."""
_OTHERS = (
    "type", "enum", "const", "$ref", "$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "$dynamicRef",
    "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "required", "minProperties", "maxProperties", "dependentRequired", "dependencies",
    "minItems", "maxItems", "uniqueItems", "minContains", "maxContains", "minLength", "maxLength", "pattern", "format",
    "contentEncoding", "contentMediaType", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
_KEYWORDS = frozenset((*_NAMED, *_SCHEMAS, *_OTHERS))
"""All that JSON Schema has. Which of them can be followed the engine says."""


class Constraint(msgspec.Struct, frozen=True):
    """`text` is a JSON schema, compact, or a grammar in GBNF."""

    kind: Literal["schema", "grammar"]
    text: str

    def field(self) -> dict[str, Any]:
        """The field of a plain request line that means this."""
        if self.kind == "grammar":
            return {"grammar": self.text}
        return {"json_schema": msgspec.json.decode(self.text)}


def of_schema(schema: dict[str, Any], where: str) -> Constraint:
    """Raises RequestError, which calls the schema `where`, if it is too large, too deep, or holds what none has."""
    if _deeper(schema, SCHEMA_DEEP_MAX):
        raise RequestError(f"{where} is nested deeper than {SCHEMA_DEEP_MAX}; use $defs and $ref", where)
    if "x-guidance" in schema:
        raise RequestError(f"{where} has the key x-guidance, which is not supported", where)
    _check_keywords(schema, where, where)
    text = msgspec.json.encode(schema)
    _check_size(len(text), where)
    return Constraint("schema", text.decode())


def of_grammar(grammar: str) -> Constraint:
    """Raises RequestError if `grammar` is too large or not GBNF; the message names the line."""
    _check_size(len(grammar.encode("utf-8", "replace")), "grammar")
    parse_gbnf(grammar)
    return Constraint("grammar", grammar)


def _check_keywords(schema: object, path: str, where: str) -> None:
    """Refuse what is no keyword: a misspelt one would be passed over, and the answer not held to it."""
    if isinstance(schema, list):
        for place, one in enumerate(schema):
            _check_keywords(one, f"{path}[{place}]", where)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key not in _KEYWORDS:
            near = next(iter(difflib.get_close_matches(key[:64], _KEYWORDS, 1, 0.6)), None)
            hint = f"; did you mean {near}?" if near else ""
            raise RequestError(f"{path} has {key[:64]!r}, which is no keyword of JSON Schema{hint}", where)
        if key in _NAMED and isinstance(value, dict):
            for name, one in value.items():
                _check_keywords(one, f"{path}.{key}.{name[:64]}", where)
        elif key in _SCHEMAS:
            _check_keywords(value, f"{path}.{key}", where)


def _check_size(size: int, where: str) -> None:
    if size > TEXT_BYTES_MAX:
        raise RequestError(f"{where} has {size:,} bytes; at most {TEXT_BYTES_MAX:,} are accepted", where)


def _deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))
