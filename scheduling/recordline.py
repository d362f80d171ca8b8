"""One line of the durable record: how it is encoded, sealed with a checksum, checked and read again.

A line is an object of OpenAI's batch output format with two additions: `llmpi` (index, attempt, rank, session and
timings) and, always last, `crc32`: eight hex digits of zlib.crc32 over every byte of the line that stands before
`,"crc32":"`. So a line ends in exactly SEAL_BYTES bytes whose shape is known, and checking one needs no JSON.

Ranks encode (100,000 lines cost rank 0 nothing), rank 0 appends the bytes unseen. Raw newlines cannot occur in a
line, because JSON escapes them. This module is pure: no files, no clocks; `created` and all times come in.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec

from scheduling.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    Score,
    TokenLogprobs,
    chat_logprobs,
    completion_logprobs,
    score,
)
from scheduling.requests import Request
from scheduling.tables import finish_number
from scheduling.vectors import Vectors, to_base64, to_numbers

SEAL_OPEN = b',"crc32":"'
SEAL_CLOSE = b'"}\n'
SEAL_BYTES = len(SEAL_OPEN) + 8 + len(SEAL_CLOSE)
"""Bytes from the end of what the checksum covers to the end of the line, newline included."""

_SEVERITY = ("stop", "length", "cancelled", "error")


# ---------------------------------------------------------------- the object, as structs


class _Message(msgspec.Struct, frozen=True, gc=False):
    role: str
    content: str


class _ChatChoice(msgspec.Struct, frozen=True, gc=False):
    index: int
    message: _Message
    logprobs: ChatLogprobs | None
    finish_reason: str


class _TextChoice(msgspec.Struct, frozen=True, gc=False):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class _ScoredChoice(_TextChoice, frozen=True, gc=False):
    """A continuation. OpenAI has nothing like it: what it comes to stands under `llmpi`."""

    llmpi: Score


class _PromptDetails(msgspec.Struct, frozen=True, gc=False):
    cached_tokens: int


class _Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails


class _Body(msgspec.Struct, frozen=True, gc=False):
    id: str
    object: str
    created: int
    model: str
    choices: list[_ChatChoice] | list[_TextChoice]
    usage: _Usage


class _Embedding(msgspec.Struct, frozen=True, gc=False):
    object: str
    index: int
    embedding: list[float] | str


class _EmbeddingUsage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int
    total_tokens: int


class _EmbeddingBody(msgspec.Struct, frozen=True, gc=False):
    object: str
    data: list[_Embedding]
    model: str
    usage: _EmbeddingUsage


class _Response(msgspec.Struct, frozen=True, gc=False):
    status_code: int
    request_id: str
    body: _Body | _EmbeddingBody


class Failure(msgspec.Struct, frozen=True, gc=False):
    """Why a request failed: `code` for programs, `message` for people."""

    code: str
    message: str


class Timing(msgspec.Struct, frozen=True, gc=False):
    """The `llmpi` part of a line. Times in seconds on the engine's clock; None where undefined.

    `ttft_s` is None without output, `tpot_s` = (e2e_s - ttft_s) / (output_tokens - 1) also for one token and for
    several choices, whose tokens overlap in time. `cached_tokens`: those of the prompt that were not computed, because
    they were in the cache.
    """

    index: int
    attempt: int
    rank: int
    session: int
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    cached_tokens: int = 0
    end_s: float | None = None
    """When it ended, since rank 0 welcomed the rank; None where no rank had it, and in older records."""
    stolen_from: int | None = None
    """The rank that it was taken from before it started; None: from none."""


class _Line(msgspec.Struct, frozen=True, gc=False):
    id: str
    custom_id: str
    response: _Response | None
    error: Failure | None
    llmpi: Timing


class Row(msgspec.Struct, frozen=True, gc=False):
    """What a reader of the record wants of a line without the answer's text. `error` None: the request is ok."""

    custom_id: str
    llmpi: Timing
    error: Failure | None = None


_encode = msgspec.json.Encoder().encode
_decode_row = msgspec.json.Decoder(Row).decode


# ---------------------------------------------------------------- writing


def seal(line: bytes) -> bytes:
    """`line` (one JSON object with at least one member, no newline) with checksum and newline added."""
    covered = line[:-1]
    return b'%b,"crc32":"%08x"}\n' % (covered, zlib.crc32(covered))


def encode_result(
    request: Request,
    index: int,
    attempt: int,
    rank: int,
    session: int,
    answer_choices: list[tuple[str, str, int]],
    prompt_tokens: int,
    output_tokens: int,
    queue_s: float,
    ttft_s: float,
    e2e_s: float,
    created: int,
    model: str,
    cached_tokens: int = 0,
    logprobs: Sequence[TokenLogprobs | None] = (),
    end_s: float | None = None,
    stolen_from: int | None = None,
) -> bytes:
    """The sealed line of a request that was answered.

    `answer_choices` is a list of (text, finish reason, output tokens). `created` is Unix time in whole seconds.
    `logprobs`: one for each choice; or none, where the request asked for none. With several choices the line's finish
    reason is the gravest of theirs.
    """
    ident = str(index)
    several = len(answer_choices) > 1
    chat = request.kind == "chat"
    body_id, name = ("chatcmpl-" + ident, "chat.completion") if chat else ("cmpl-" + ident, "text_completion")
    packed = logprobs or [None] * len(answer_choices)
    choices: list[_ChatChoice] | list[_TextChoice]
    if chat:
        choices = _chat_choices(answer_choices, packed)
    else:
        choices = _text_choices(answer_choices, packed, scored=bool(request.continuations))
    tpot_s = None if several or output_tokens < 2 else (e2e_s - ttft_s) / (output_tokens - 1)
    timing = Timing(
        index,
        attempt,
        rank,
        session,
        queue_s,
        ttft_s if output_tokens else None,
        tpot_s,
        e2e_s,
        prompt_tokens,
        output_tokens,
        _gravest([why for _, why, _ in answer_choices]) if several else answer_choices[0][1],
        cached_tokens,
        end_s,
        stolen_from,
    )
    usage = _Usage(prompt_tokens, output_tokens, prompt_tokens + output_tokens, _PromptDetails(cached_tokens))
    response = _Response(200, "req_" + ident, _Body(body_id, name, created, model, choices, usage))
    return seal(_encode(_Line("batch_req_" + ident, request.custom_id, response, None, timing)))


def encode_embeddings(
    request: Request,
    index: int,
    attempt: int,
    rank: int,
    session: int,
    vectors: Vectors,
    prompt_tokens: int,
    queue_s: float,
    e2e_s: float,
    model: str,
    end_s: float | None = None,
    stolen_from: int | None = None,
) -> bytes:
    """The sealed line of a request for embeddings that was answered. `vectors`: (inputs, dimensions)."""
    ident = str(index)
    if request.encoding_format == "base64":
        data = [_Embedding("embedding", place, to_base64(one)) for place, one in enumerate(vectors)]
    else:
        data = [_Embedding("embedding", place, one) for place, one in enumerate(to_numbers(vectors))]
    body = _EmbeddingBody("list", data, model, _EmbeddingUsage(prompt_tokens, prompt_tokens))
    timing = Timing(
        index, attempt, rank, session, queue_s, None, None, e2e_s, prompt_tokens, 0, "stop", 0, end_s, stolen_from
    )  # fmt: skip
    response = _Response(200, "req_" + ident, body)
    return seal(_encode(_Line("batch_req_" + ident, request.custom_id, response, None, timing)))


_Choices = list[tuple[str, str, int]]
_Logprobs = Sequence[TokenLogprobs | None]


def _chat_choices(choices: _Choices, logprobs: _Logprobs) -> list[_ChatChoice]:
    return [
        _ChatChoice(k, _Message("assistant", text), None if packed is None else chat_logprobs(packed), why)
        for k, ((text, why, _), packed) in enumerate(zip(choices, logprobs, strict=True))
    ]


def _text_choices(choices: _Choices, logprobs: _Logprobs, scored: bool) -> list[_TextChoice]:
    made: list[_TextChoice] = []
    for k, ((text, why, _), packed) in enumerate(zip(choices, logprobs, strict=True)):
        tokens = None if packed is None else completion_logprobs(packed)
        if packed is not None and scored:
            made.append(_ScoredChoice(k, text, tokens, why, score(packed)))
        else:
            made.append(_TextChoice(k, text, tokens, why))
    return made


def encode_failure(
    custom_id: str,
    index: int,
    attempt: int,
    rank: int,
    session: int,
    code: str,
    message: str,
    prompt_tokens: int = 0,
    queue_s: float = 0.0,
    e2e_s: float = 0.0,
    cached_tokens: int = 0,
    end_s: float | None = None,
    stolen_from: int | None = None,
) -> bytes:
    """The sealed line of a request that failed. Its finish reason is `cancelled` for that code, else `error`."""
    reason = "cancelled" if code == "cancelled" else "error"
    timing = Timing(
        index, attempt, rank, session, queue_s, None, None, e2e_s, prompt_tokens, 0, reason, cached_tokens,
        end_s, stolen_from,
    )  # fmt: skip
    ident = "batch_req_" + str(index)
    try:
        return seal(_encode(_Line(ident, custom_id, None, Failure(code, message), timing)))
    except UnicodeEncodeError:
        # Texts of the operating system may carry undecodable bytes as lone surrogates, which JSON cannot hold.
        failure = Failure(_printable(code), _printable(message))
        return seal(_encode(_Line(ident, _printable(custom_id), None, failure, timing)))


def _gravest(reasons: list[str]) -> str:
    return max(reasons, key=lambda why: _SEVERITY.index(why) if why in _SEVERITY else 0)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------- reading


def line_checks(line: bytes) -> bool:
    """Whether `line`, newline included, is sealed and its checksum right."""
    return line[-1:] == b"\n" and text_checks(line[:-1])


def text_checks(text: bytes) -> bool:
    """`line_checks` for a line whose newline has been taken off, as a scan of a whole record does it."""
    covered = text[: 1 - SEAL_BYTES]
    return text[len(covered) :] == b',"crc32":"%08x"}' % zlib.crc32(covered) and len(covered) > 0


def decode_row(line: bytes) -> Row:
    """What `line` says beside the answer. Raises ValueError if it is not a line of this format."""
    try:
        return _decode_row(line)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def request_row(row: Row) -> tuple[float, ...]:
    """`row` as a tuple for `scheduling.tables.REQUEST`. Undefined times become NaN."""
    part = row.llmpi
    nan = float("nan")
    return (
        part.index,
        part.rank,
        part.attempt,
        part.session,
        part.prompt_tokens,
        part.cached_tokens,
        part.output_tokens,
        part.queue_s,
        nan if part.ttft_s is None else part.ttft_s,
        nan if part.tpot_s is None else part.tpot_s,
        part.e2e_s,
        nan if part.end_s is None else part.end_s,
        -1 if part.stolen_from is None else part.stolen_from,
        finish_number(part.finish_reason),
        1 if row.error is None else 0,
    )
