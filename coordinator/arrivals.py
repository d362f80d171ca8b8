"""One line of input as it goes on its way: an `Arrival`, with what rank 0 must know of it and no more.

A line of a checked file is only peeked at; any other is parsed in full, and what cannot be run arrives with its
error. Nothing here reads files or keeps state; `mark_duplicates` works on the caller's `IdSet`.
"""

from __future__ import annotations

import json

import msgspec
import numpy as np

from coordinator.ids import IdSet, hash_id
from coordinator.inputfile import default_id, text_of
from scheduling.embeddings import may_embed
from scheduling.errors import RequestError
from scheduling.estimates import estimate_tokens
from scheduling.requestlines import text_line
from scheduling.requests import Sampling, parse_request


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request of the input. `error` is set if it cannot be run; then `line` need not be a request.

    `line` has a custom_id even if the input's own had none. `max_tokens` None: the run's default applies; 0: it asks
    for embeddings.
    """

    index: int
    line: bytes
    custom_id: str
    prompt_tokens_estimate: int
    max_tokens: int | None = None
    error: RequestError | None = None


class _PeekBody(msgspec.Struct, frozen=True, gc=False):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Peek(msgspec.Struct, frozen=True, gc=False):
    """What rank 0 needs from a line that is known to be good: about a fifth of the cost of parsing it."""

    custom_id: str | int | None = None
    id: str | int | None = None
    body: _PeekBody | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_peek = msgspec.json.Decoder(_Peek)


class _PeekId(msgspec.Struct, frozen=True, gc=False):
    custom_id: str | int | None = None
    id: str | int | None = None


_peek_id = msgspec.json.Decoder(_PeekId)


def id_or_default(line: bytes, index: int) -> str:
    """The custom_id of a line that need not be a request."""
    try:
        found = _peek_id.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        try:
            # Python's own parser takes what JSON is not (half of a surrogate pair, NaN): the line still has its name.
            found = msgspec.convert(json.loads(line), _PeekId)
            str(found.custom_id or found.id).encode()
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return default_id(index)
    custom_id = found.id if found.custom_id is None else found.custom_id
    return default_id(index) if custom_id is None or custom_id == "" else str(custom_id)


def _with_id(line: bytes, custom_id: str) -> bytes:
    """`line`, a JSON object with at least one key, given a custom_id. At the end: there it overrides a null."""
    return b'%b,"custom_id":%b}' % (line[:-1], msgspec.json.encode(custom_id))


def of_request(index: int, line: bytes, defaults: Sampling) -> Arrival:
    """Parse `line` in full. What cannot be run arrives with its error."""
    own_id = default_id(index)
    try:
        request = parse_request(line, defaults, default_id=own_id)
    except RequestError as error:
        return of_refused(index, line, error)
    if request.custom_id == own_id:
        line = _with_id(line, own_id)
    return Arrival(
        index=index,
        line=line,
        custom_id=request.custom_id,
        prompt_tokens_estimate=estimate_tokens(len(line)),
        max_tokens=0 if request.inputs else request.sampling.max_tokens,
    )


def of_checked(index: int, line: bytes, defaults: Sampling) -> Arrival:
    """Read only what is needed from a `line` that the check has found good. The worker parses it in full."""
    try:
        found = _peek.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return of_request(index, line, defaults)
    custom_id = found.id if found.custom_id is None else found.custom_id
    if custom_id is None:
        custom_id = default_id(index)
        line = _with_id(line, custom_id)
    body = found if found.body is None else found.body
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if limit is None:
        limit = 0 if may_embed(line) else defaults.max_tokens
    return Arrival(
        index=index,
        line=line,
        custom_id=str(custom_id),
        prompt_tokens_estimate=estimate_tokens(len(line)),
        max_tokens=limit,
    )


def of_text(index: int, line: bytes, defaults: Sampling) -> Arrival:
    custom_id = default_id(index)
    try:
        return Arrival(
            index=index,
            line=text_line(text_of(line), custom_id),
            custom_id=custom_id,
            prompt_tokens_estimate=estimate_tokens(len(line)),
            max_tokens=defaults.max_tokens,
        )
    except RequestError as error:
        return Arrival(index=index, line=line, custom_id=custom_id, prompt_tokens_estimate=1, error=error)


def of_refused(index: int, line: bytes, error: RequestError) -> Arrival:
    custom_id = id_or_default(line, index)
    return Arrival(index=index, line=line, custom_id=custom_id, prompt_tokens_estimate=1, error=error)


def mark_duplicates(ids: IdSet, arrivals: list[Arrival], earlier: bytearray) -> None:
    """Give an error to each of `arrivals` whose custom_id came before. `earlier`: hashes of skipped requests."""
    hashes = earlier + b"".join([hash_id(arrival.custom_id) for arrival in arrivals])
    seen = ids.add(hashes)[len(earlier) // 8 :]
    for place in np.flatnonzero(seen):
        arrival = arrivals[place]
        if arrival.error is None:
            name = msgspec.json.encode(arrival.custom_id).decode()
            error = RequestError(f"custom_id {name} was given to an earlier request; give each its own", "custom_id")
            arrivals[place] = msgspec.structs.replace(arrival, error=error)
