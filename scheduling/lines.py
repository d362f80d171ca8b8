"""Decodes one line of input, or says why it is refused.

Lines are decoded straight into the types of `scheduling.wireform`. Only when that fails does `explain` read the line
again, slowly, against the same types, to name the field, its value and what is allowed there. A line that merely
missed the fast path (an unusual but valid spelling) comes out of `explain` decoded.

This module knows nothing of `Request`, of files, or of what the parameters do.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import typing
from typing import Any, Final, NoReturn

import msgspec
from msgspec import Meta

from scheduling.errors import RequestError
from scheduling.wireform import Batch, Body, NamedSchema, Plain, TextPart, WireMessage

_batch = msgspec.json.Decoder(Batch)
_plain = msgspec.json.Decoder(Plain)
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

_OTHER_NAMES: Final = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "typ_p": "typical_p",
    "text": "prompt",
    "input": "prompt",
}
"""What other programs call a parameter, where the nearest spelling would not find it."""


def decode_line(line: bytes) -> Batch | Plain:
    """The wire form of `line`.

    Raises RequestError that names the field, its value and the allowed range, or the place where the line stops
    being JSON or UTF-8.
    """
    try:
        return _batch.decode(line) if b'"body"' in line else _plain.decode(line)
    except DECODE_ERRORS:
        return explain(line)


def explain(line: bytes) -> Batch | Plain:
    """Read a line field by field, slowly. Raises RequestError with the first reason to refuse it, if any."""
    value = decode_any(line)
    if not isinstance(value, dict):
        hint = "; write one object per line" if isinstance(value, list) else ""
        raise RequestError(f"a request must be a JSON object, not {kind_of(value)}{hint}")
    form: type[Batch] | type[Plain] = Plain if value.keys().isdisjoint(("body", "method", "url")) else Batch
    if form is Batch:
        _check_batch(value)
    else:
        _check_body(value, Plain, "")
    try:
        return msgspec.json.decode(line, type=form)
    except DECODE_ERRORS as error:
        # The checks above know all fields; this is what keeps a gap in them from becoming another exception.
        raise RequestError(f"this request cannot be read: {error}") from None


def refuse(name: str, value: object, allowed: str, *, unsupported: bool = False) -> NoReturn:
    """Raise the RequestError for a field `name` (with its path) whose `value` is not `allowed`."""
    middle = "not supported in this version: it" if unsupported else "it"
    raise RequestError(f"{name} is {show(value)}; {middle} must be {allowed}", name.removeprefix("body."))


def show(value: object) -> str:
    """`value` as JSON, cut to what fits in a message."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= 60 else f"{text[:57]}…"


def kind_of(value: object) -> str:
    """What a person calls a JSON value of this type."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a plain value")


def _check_batch(value: dict[str, Any]) -> None:
    check_fields({key: item for key, item in value.items() if key != "body"}, Batch, "")
    body = value.get("body")
    if body is None:
        raise RequestError("body is missing: a batch line carries the parameters in it", "body")
    if not isinstance(body, dict):
        refuse("body", body, "an object with the request's parameters")
    _check_body(body, Body, "body.")


def _check_body(body: dict[str, Any], form: type[msgspec.Struct], where: str) -> None:
    _check_format(body.get("response_format"), f"{where}response_format")
    check_fields(body, form, where)
    _check_messages(body.get("messages"))


def check_fields(value: dict[str, Any], form: type[msgspec.Struct], where: str) -> None:
    """Raise RequestError for the first field of `value` that `form` does not know or whose value it does not allow.

    `where` stands before the names of fields in messages.
    """
    rules = rules_of(form)
    for key, item in value.items():
        if key not in rules:
            _refuse_unknown(key, form, where)
        if item is None or key == "messages":
            continue
        if key == "prompt" and isinstance(item, list) and any(isinstance(part, str | list) for part in item):
            raise RequestError("prompt is a list of prompts; write one request per line", "prompt")
        rule, allowed, unsupported = rules[key]
        try:
            if _not_finite(item):
                raise ValueError
            msgspec.convert(item, rule, str_keys=True)
        except DECODE_ERRORS:
            refuse(where + key, item, allowed, unsupported=unsupported)


def _check_messages(messages: object) -> None:
    if messages is None:
        return
    if not isinstance(messages, list) or not messages:
        refuse("messages", messages, rules_of(Body)["messages"][1])
    for place, message in enumerate(messages):
        path = f"messages[{place}]"
        if not isinstance(message, dict):
            refuse(path, message, "an object with role and content")
        for part_place, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ()):
            _check_part(part, f"{path}.content[{part_place}]")
        for key in ("role", "content"):
            if message.get(key) is None:
                allowed = rules_of(WireMessage)[key][1]
                raise RequestError(f"{path}.{key} is missing; it must be {allowed}", f"{path}.{key}")
        check_fields(message, WireMessage, f"{path}.")


def _check_format(value: object, path: str) -> None:
    """What is wrong inside a `json_schema`; `check_fields` sees the rest."""
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return
    inner, path = value.get("json_schema"), f"{path}.json_schema"
    if not isinstance(inner, dict):
        refuse(path, inner, 'an object: {"name": …, "schema": {…}}')
    if inner.get("schema") is None:
        refuse(f"{path}.schema", None, rules_of(NamedSchema)["schema"][1])
    check_fields(inner, NamedSchema, f"{path}.")


def _check_part(part: object, path: str) -> None:
    if not isinstance(part, dict):
        refuse(path, part, 'a {"type": "text", "text": …} object')
    if part.get("type") != "text":
        refuse(f"{path}.type", part.get("type"), '"text": this version reads no images, audio or files')
    if not isinstance(part.get("text"), str):
        refuse(f"{path}.text", part.get("text"), "a string")
    check_fields(part, TextPart, f"{path}.")


def _refuse_unknown(key: str, form: type[msgspec.Struct], where: str) -> NoReturn:
    rules = rules_of(form)
    near = _OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key[:64], rules, 1, 0.7)), None)
    if form is Batch and key in rules_of(Body):
        hint = "it belongs inside body"
    elif near in rules:
        hint = f"did you mean {near}?"
    else:
        hint = "what is known is listed in docs/requests.md"
    raise RequestError(f"unknown parameter {where}{show(key)[1:-1]}; {hint}", where.removeprefix("body.") + key[:64])


def _not_finite(value: object) -> bool:
    """Whether a NaN or an infinity is in `value`, as deep as parameters go (the values of logit_bias)."""
    if isinstance(value, dict):
        return any(isinstance(item, float) and not math.isfinite(item) for item in value.values())
    return isinstance(value, float) and not math.isfinite(value)


def decode_any(line: bytes) -> Any:
    """`line` as plain JSON values. Raises RequestError that says where it is none."""
    try:
        return msgspec.json.decode(line)
    except DECODE_ERRORS as error:
        _refuse_text(line, error)


def _refuse_text(line: bytes, error: Exception) -> NoReturn:
    """Say why `line` is not JSON. Python's own parser takes NaN and lone surrogates, so it tells these apart."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as wrong:
        raise RequestError(
            f"byte {wrong.start + 1} of the line (0x{line[wrong.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as wrong:
        raise RequestError(f"this is not JSON: {wrong.msg} at character {wrong.pos + 1}") from None
    except RecursionError:
        raise RequestError("the JSON is nested too deeply for a request") from None
    except ValueError:
        raise RequestError("the line holds a number that is too long") from None
    if isinstance(value, dict):
        body = value.get("body")
        for where, part in (("body.", body if isinstance(body, dict) else {}), ("", value)):
            for key, item in part.items():
                if _not_finite(item):
                    rule = rules_of(Plain).get(key)
                    refuse(where + key, item, rule[1] if rule else "a finite number")
    if "\\ud" in line.decode("utf-8").lower():
        raise RequestError("a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    raise RequestError(f"this is not JSON: {error}")


@functools.cache
def rules_of(form: type[msgspec.Struct]) -> dict[str, tuple[Any, str, bool]]:
    """For each field of `form`: its type, what a person is told is allowed, whether later versions allow more."""
    hints = typing.get_type_hints(form, include_extras=True)
    return {name: (hint, *_told(hint)) for name, hint in hints.items() if name in form.__struct_fields__}


def _told(hint: Any) -> tuple[str, bool]:
    for meta in getattr(hint, "__metadata__", ()):
        if isinstance(meta, Meta) and meta.description:
            return meta.description, bool(meta.extra and meta.extra.get("unsupported"))
    for inner in typing.get_args(hint):
        allowed, unsupported = _told(inner)
        if allowed:
            return allowed, unsupported
    return "", False
