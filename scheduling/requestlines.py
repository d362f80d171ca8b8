"""Requests as lines that we write ourselves: of bare texts, of objects that a caller made, of a `Request`.

What is written is what a person could have written: `scheduling.requests.parse_request` reads it, and refuses it if
it must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from scheduling.errors import RequestError
from scheduling.requests import Request


def text_line(text: str, custom_id: str | None = None) -> bytes:
    """The line for a bare text prompt. Raises RequestError if `text` holds a lone surrogate."""
    fields = {"prompt": text} if custom_id is None else {"custom_id": custom_id, "prompt": text}
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError as error:
        raise _surrogate(error) from None


def request_line(request: Mapping[str, Any] | Request) -> bytes:
    """The line for a request given as an object: a body, a whole batch line, or a `Request`.

    A `Request` is written with all its sampling parameters, so that no default of a run changes it. The line is
    not validated here: `parse_request` does that. Raises RequestError for what JSON cannot say.
    """
    fields = request_fields(request) if isinstance(request, Request) else request
    try:
        # Not msgspec's encoder: it writes NaN as null, and so would turn a mistake into 'not given'.
        return json.dumps(dict(fields), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise _surrogate(error) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the request cannot be written as JSON: {error}") from None


def prompt_line(prompt: object, custom_id: str | None = None) -> bytes:
    """The line for what a caller gave as a prompt: a text, which is called `custom_id`, or an object.

    Raises RequestError for what is neither, or cannot be written.
    """
    if isinstance(prompt, str):
        return text_line(prompt, custom_id)
    if isinstance(prompt, Mapping | Request):
        return request_line(prompt)
    raise RequestError(f"a prompt must be a str, a dict or a Request, not {type(prompt).__name__}")


def request_fields(request: Request) -> dict[str, Any]:
    """`request` as the object of a plain line: what `parse_request` turns into the same `Request` again."""
    fields: dict[str, Any] = {"custom_id": request.custom_id}
    if request.kind == "embedding":
        names = ("encoding_format", "dimensions", "model", "user")
        return _without_none(fields | {"input": request.inputs} | {name: getattr(request, name) for name in names})
    sampling = msgspec.structs.asdict(request.sampling)
    constraint = sampling.pop("constraint")
    # Without one this says so, lest a run's default takes its place.
    sampling |= {"response_format": {"type": "text"}} if constraint is None else constraint.field()
    if request.kind == "chat":
        fields["messages"] = [_without_none(msgspec.structs.asdict(message)) for message in request.messages]
        if request.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    else:
        fields |= {"prompt": request.prompt, "logprobs": request.logprobs}
        fields |= {"echo": True} if request.echo else {}
        fields |= {"continuations": request.continuations} if request.continuations else {}
    others = {"model": request.model, "user": request.user, "metadata": request.metadata}
    return _without_none({**fields, **sampling, **others, "stream": request.stream})


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _surrogate(error: UnicodeEncodeError) -> RequestError:
    return RequestError(
        f"character {error.start + 1} of a string is half of a surrogate pair, which is no character", "prompt"
    )
