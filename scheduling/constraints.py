"""What the text of an answer may be: a grammar or a JSON schema, as a request gives it.

There are three ways to ask: OpenAI's `response_format`, llama.cpp's `json_schema` (the schema itself) and its
`grammar` (GBNF). All become one `Constraint`. Here is checked what can be said of it without a vocabulary: its form,
its size, a grammar's syntax. What a schema means is for the engine to say (`workers.constraints`).
"""

from __future__ import annotations

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
    text = msgspec.json.encode(schema)
    _check_size(len(text), where)
    return Constraint("schema", text.decode())


def of_grammar(grammar: str) -> Constraint:
    """Raises RequestError if `grammar` is too large or not GBNF; the message names the line."""
    _check_size(len(grammar.encode("utf-8", "replace")), "grammar")
    parse_gbnf(grammar)
    return Constraint("grammar", grammar)


def _check_size(size: int, where: str) -> None:
    if size > TEXT_BYTES_MAX:
        raise RequestError(f"{where} has {size:,} bytes; at most {TEXT_BYTES_MAX:,} are accepted", where)


def _deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))
