"""What a line may look like that asks for embeddings: the counterpart of `scheduling.wireform` for /v1/embeddings.

Its body is a form of its own with few parameters, so that one which steers the generation of text is refused by name
where it would mean nothing. A plain line is a request for embeddings if it has an `input` and nothing to continue.

This module knows nothing of `Request`, of files, or of models.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from scheduling.errors import RequestError
from scheduling.lines import DECODE_ERRORS, check_fields, decode_any, refuse, rules_of
from scheduling.wireform import Body, CustomId, Text, TokenId

URL: Final = "/v1/embeddings"
INPUTS_MAX: Final = 2_048
"""Most inputs of one request."""
DIMENSIONS_MAX: Final = 65_536

_ONE_INPUT: Final = "a string that is not empty, or a list of token ids (integers from 0 to 2,147,483,647)"
_SOME_TEXT = Annotated[str, Meta(min_length=1)]
_SOME_TOKENS = Annotated[tuple[TokenId, ...], Meta(min_length=1)]
Input = Annotated[
    _SOME_TEXT | Annotated[tuple[TokenId | _SOME_TEXT | _SOME_TOKENS, ...], Meta(min_length=1)],
    Meta(description=f"{_ONE_INPUT}, or a list of up to {INPUTS_MAX:,} of either"),
]
"""What is written as `input`. `inputs_of` says what msgspec's types cannot: that a list holds one kind of thing."""


class EmbeddingBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """All parameters of the endpoint. None is 'not given', and so is JSON's null."""

    input: Input | None = None
    model: Text | None = None
    encoding_format: Annotated[Literal["float", "base64"], Meta(description='"float" or "base64"')] | None = None
    dimensions: (
        Annotated[int, Meta(ge=1, le=DIMENSIONS_MAX, description=f"an integer from 1 to {DIMENSIONS_MAX:,}")] | None
    ) = None
    user: Text | None = None


class EmbeddingPlain(EmbeddingBody, frozen=True, forbid_unknown_fields=True, gc=False):
    """A line that is the body itself, with an id if one is wanted."""

    custom_id: CustomId | None = None
    id: CustomId | None = None


class EmbeddingBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A line of OpenAI's batch format."""

    body: Annotated[EmbeddingBody, Meta(description="an object with the request's parameters")]
    custom_id: CustomId | None = None
    method: Annotated[Literal["POST"], Meta(description='"POST"')] | None = None
    url: Annotated[Literal["/v1/embeddings"], Meta(description='"/v1/embeddings"')] | None = None


_batch = msgspec.json.Decoder(EmbeddingBatch)
_plain = msgspec.json.Decoder(EmbeddingPlain)
_MEANT_INPUT: Final = ("prompt", "messages", "text", "texts", "inputs", "sentences", "content")
"""What other endpoints and programs call the input."""


def may_embed(line: bytes) -> bool:
    """False if `line` surely asks for text. At a glance: a text that quotes such a line is escaped and not taken for
    one, a string that is exactly 'input' is."""
    return b'"input"' in line or b'"/v1/embeddings"' in line


def decode_embedding(line: bytes) -> EmbeddingBatch | EmbeddingPlain | None:
    """The wire form of `line`; None if it does not ask for embeddings.

    Raises RequestError that names the field, its value and what is allowed.
    """
    if not may_embed(line):
        return None
    try:
        return _batch.decode(line) if b'"body"' in line else _plain.decode(line)
    except DECODE_ERRORS:
        return _explain(line)


def inputs_of(written: object, name: str = "input") -> tuple[str | tuple[int, ...], ...]:
    """The inputs that `written` stands for, one or a list of them.

    Raises RequestError for a list of several kinds, or of too many.
    """
    if isinstance(written, str):
        return (written,)
    assert isinstance(written, tuple)
    kinds = {type(item) for item in written}
    if kinds == {int}:
        return (written,)
    if len(kinds) > 1:
        raise RequestError(f"{name} mixes texts, token ids and lists of token ids; give one kind of them", "input")
    if len(written) > INPUTS_MAX:
        raise RequestError(
            f"{name} is a list of {len(written):,}; at most {INPUTS_MAX:,} inputs go into one request: make several",
            "input",
        )
    return written


def _explain(line: bytes) -> EmbeddingBatch | EmbeddingPlain | None:
    """Read a line field by field, slowly. Raises RequestError with the first reason to refuse it."""
    value = decode_any(line)
    if not isinstance(value, dict):
        return None
    body = value.get("body")
    batch = not value.keys().isdisjoint(("body", "method", "url"))
    inside = body if isinstance(body, dict) else {}
    if value.get("url") not in (None, URL) or (
        value.get("url") is None and not _only_input(inside if batch else value)
    ):
        return None
    if batch:
        outside = {key: item for key, item in value.items() if key != "body"}
        if misplaced := outside.keys() & rules_of(EmbeddingBody).keys():
            name = min(misplaced)
            raise RequestError(f"unknown parameter {name}; it belongs inside body", name)
        check_fields(outside, EmbeddingBatch, "")
        if not isinstance(body, dict):
            raise RequestError("body is missing: a batch line carries the parameters in it, as an object", "body")
        _check_body(body, EmbeddingBody, "body.")
    else:
        _check_body(value, EmbeddingPlain, "")
    try:
        return (_batch if batch else _plain).decode(line)
    except DECODE_ERRORS as error:
        # The checks above know all fields; this is what keeps a gap in them from becoming another exception.
        raise RequestError(f"this request cannot be read: {error}") from None


def _only_input(body: object) -> bool:
    return isinstance(body, dict) and "input" in body and "prompt" not in body and "messages" not in body


def _check_body(body: dict[str, Any], form: type[msgspec.Struct], where: str) -> None:
    rules = rules_of(form)
    for key in body.keys() - rules.keys():
        if key in _MEANT_INPUT:
            raise RequestError(f"unknown parameter {where}{key}; did you mean input?", key)
        if key in rules_of(Body):
            hint = "" if where else ". A text to continue is given as prompt, not as input"
            raise RequestError(
                f"{where}{key} is for requests that generate text; one for embeddings takes input, model, "
                f"encoding_format, dimensions and user{hint}",
                key,
            )
    _check_elements(body.get("input"), f"{where}input")
    check_fields(body, form, where)


def _check_elements(written: object, name: str) -> None:
    """Name the place in a list where something is wrong: the list as a whole is too long to be shown."""
    if not isinstance(written, list):
        return
    for place, item in enumerate(written):
        try:
            msgspec.convert(item, TokenId | _SOME_TEXT | _SOME_TOKENS)
        except DECODE_ERRORS:
            refuse(f"{name}[{place}]", item, _ONE_INPUT)
