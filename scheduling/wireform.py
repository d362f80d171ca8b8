"""The wire form of a request: every parameter that a line of input may have, with its type and range, once.

`Plain`, `Batch` and `Body` are what `scheduling.lines` decodes a line straight into, so a good line costs a few
microseconds. The descriptions beside the types are what a person is told is allowed there.

This module knows nothing of `Request`, of files, or of what the parameters do.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

MAX_TOKENS_LIMIT = 1_048_576
"""Largest accepted `max_tokens`: beyond it a request asks for something no model can do."""

ID_CHARACTERS_MAX = 1_024
ALTERNATIVES_MAX = 20
"""Most alternatives that a request can have for each token."""
CONTINUATIONS_MAX = 1_024

_UNSUPPORTED: Final = {"unsupported": True}
"""Marks a field that only a later version can do; until then it must be left at the value that changes nothing."""

CustomId = Annotated[
    Annotated[str, Meta(min_length=1, max_length=ID_CHARACTERS_MAX)] | int,
    Meta(description=f"a string of 1 to {ID_CHARACTERS_MAX:,} characters, or an integer"),
]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
MAX_TOKENS_ALLOWED: Final = f"an integer from 1 to {MAX_TOKENS_LIMIT:,}, or 0 beside echo and logprobs"
MaxTokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS_LIMIT, description=MAX_TOKENS_ALLOWED)]
Alternatives = Annotated[int, Meta(ge=0, le=ALTERNATIVES_MAX)]
TextOrTokens = Annotated[str, Meta(min_length=1)] | Annotated[tuple[TokenId, ...], Meta(min_length=1)]
Prompt = Annotated[
    TextOrTokens,
    Meta(description="a string that is not empty, or a list of token ids (integers from 0 to 2,147,483,647)"),
]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0, description="a number from -2 to 2")]
StopString = Annotated[str, Meta(min_length=1, max_length=1_024)]
Stop = Annotated[
    StopString | Annotated[tuple[StopString, ...], Meta(max_length=16)],
    Meta(description="a string, or a list of up to 16 strings, each of 1 to 1,024 characters"),
]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]],
    Meta(
        max_length=1_024,
        description="an object of up to 1,024 entries, token ids as keys and numbers from -100 to 100 as values",
    ),
]
Nothing = Annotated[None, Meta(description="null or left out", extra=_UNSUPPORTED)]
NoList = Annotated[Annotated[list[Any], Meta(max_length=0)], Meta(description="[] or left out", extra=_UNSUPPORTED)]
Auto = Annotated[Literal["none", "auto"], Meta(description='"none", "auto" or left out', extra=_UNSUPPORTED)]
Text = Annotated[str, Meta(description="a string")]
Bool = Annotated[bool, Meta(description="true or false")]
Schema = Annotated[dict[str, Any], Meta(description="a JSON schema that is an object")]
Grammar = Annotated[str, Meta(min_length=1, description="a string that is not empty: a grammar in GBNF")]


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class ObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    pass


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name`, `description` and `strict` change nothing: the schema holds in any case."""

    schema: Schema
    name: Text | None = None
    description: Text | None = None
    strict: Bool | None = None


class SchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


Format = Annotated[
    TextFormat | ObjectFormat | SchemaFormat,
    Meta(
        description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
        '{"name": …, "schema": {…}}}'
    ),
]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: Text


class WireMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A message as written. `content` is required and is text: other kinds of part are refused."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        Meta(description="one of system, developer, user, assistant, tool"),
    ]
    content: Annotated[
        str | tuple[TextPart, ...], Meta(description='a string or a list of {"type": "text", "text": …} parts')
    ]
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: NoList | None = None
    function_call: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """All parameters of both endpoints. None is 'not given', and so is JSON's null."""

    messages: (
        Annotated[
            Annotated[tuple[WireMessage, ...], Meta(min_length=1)],
            Meta(description='a list of at least one {"role": …, "content": …} object'),
        ]
        | None
    ) = None
    prompt: Prompt | None = None
    model: Text | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: (
        Annotated[int, Meta(ge=1, le=MAX_TOKENS_LIMIT, description=f"an integer from 1 to {MAX_TOKENS_LIMIT:,}")] | None
    ) = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0, description="a number from 0 to 100")] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0, description="a number above 0 and up to 1")] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1, description="an integer from 0 (off) to 2,147,483,647")] | None = (
        None
    )
    min_p: Annotated[float, Meta(ge=0.0, lt=1.0, description="a number from 0 (off) to below 1")] | None = None
    typical_p: Annotated[float, Meta(gt=0.0, le=1.0, description="a number above 0 and up to 1 (off)")] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0, description="a number above 0 and up to 10")] | None = None
    repeat_last_n: (
        Annotated[int, Meta(ge=0, le=MAX_TOKENS_LIMIT, description=f"an integer from 0 (off) to {MAX_TOKENS_LIMIT:,}")]
        | None
    ) = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: (
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="an integer of 64 bits, from -2**63 to 2**63 - 1")]
        | None
    ) = None
    stop: Stop | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: Bool | None = None
    n: Annotated[int, Meta(ge=1, le=128, description="an integer from 1 to 128")] | None = None
    stream: Bool | None = None
    user: Text | None = None
    metadata: Annotated[dict[str, str], Meta(description="an object whose values are strings")] | None = None
    # Accepted because clients send them by themselves; nothing here depends on them.
    store: Bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    parallel_tool_calls: Bool | None = None
    stream_options: Annotated[dict[str, bool], Meta(description="an object of true and false")] | None = None
    response_format: Format | None = None
    json_schema: Schema | None = None
    grammar: Grammar | None = None
    # A chat has true and top_logprobs, a completion the number alone.
    logprobs: (
        Annotated[
            bool | Alternatives,
            Meta(description=f"true or false in a chat, an integer from 0 to {ALTERNATIVES_MAX} in a completion"),
        ]
        | None
    ) = None
    top_logprobs: (
        Annotated[Alternatives, Meta(description=f"an integer from 0 to {ALTERNATIVES_MAX}, beside logprobs in a chat")]
        | None
    ) = None
    echo: Bool | None = None
    continuations: (
        Annotated[
            Annotated[tuple[TextOrTokens, ...], Meta(min_length=1, max_length=CONTINUATIONS_MAX)],
            Meta(
                description=f"a list of 1 to {CONTINUATIONS_MAX:,} strings that are not empty, or lists of token ids "
                "(integers from 0 to 2,147,483,647)"
            ),
        ]
        | None
    ) = None
    # Accepted only at the value that changes nothing.
    suffix: Annotated[Literal[""], Meta(description='"" or left out', extra=_UNSUPPORTED)] | None = None
    best_of: Annotated[Literal[1], Meta(description="1 or left out", extra=_UNSUPPORTED)] | None = None
    tools: NoList | None = None
    tool_choice: Auto | None = None
    functions: NoList | None = None
    function_call: Auto | None = None
    modalities: (
        Annotated[tuple[Literal["text"]], Meta(description='["text"] or left out', extra=_UNSUPPORTED)] | None
    ) = None
    reasoning_effort: Annotated[Literal["none"], Meta(description='"none" or left out', extra=_UNSUPPORTED)] | None = (
        None
    )
    verbosity: Annotated[Literal["medium"], Meta(description='"medium" or left out', extra=_UNSUPPORTED)] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    web_search_options: Nothing = None


class Plain(Body, frozen=True, forbid_unknown_fields=True, gc=False):
    """A line that is the body itself, with an id if one is wanted."""

    custom_id: CustomId | None = None
    id: CustomId | None = None


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A line of OpenAI's batch format."""

    body: Annotated[Body, Meta(description="an object with the request's parameters")]
    custom_id: CustomId | None = None
    method: Annotated[Literal["POST"], Meta(description='"POST"')] | None = None
    url: (
        Annotated[
            Literal["/v1/chat/completions", "/v1/completions"],
            Meta(description='"/v1/chat/completions", "/v1/completions" or "/v1/embeddings"'),
        ]
        | None
    ) = None
