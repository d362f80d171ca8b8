"""A request as a person writes it, validated before anything else of the system sees it.

Three ways to write one, a line each: OpenAI batch format (`custom_id`, `method`, `url`, `body`), a plain
`{"prompt": …}`, `{"messages": …}` or `{"input": …}` object, or a bare line of text. All become one frozen `Request`.
Unknown parameters are refused by name. `scheduling.wireform` and `scheduling.embeddings` hold the form of a line,
`scheduling.lines` says why one is refused; here it becomes a `Request`, and `scheduling.requestlines` writes it as a
line again. This module knows nothing about files: lines come in as bytes, requests or a `RequestError` come out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from scheduling.constraints import ANY_OBJECT, Constraint, of_grammar, of_schema
from scheduling.embeddings import EmbeddingBatch, EmbeddingBody, decode_embedding, inputs_of
from scheduling.errors import RequestError
from scheduling.lines import decode_line, refuse
from scheduling.wireform import (
    ALTERNATIVES_MAX,
    MAX_TOKENS_ALLOWED,
    Batch,
    Body,
    ObjectFormat,
    SchemaFormat,
    WireMessage,
)


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen. Defaults are OpenAI's: temperature 1, no truncation of the distribution.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `typical_p` 1 switch a filter off.
    `max_tokens` None means: what the run's default says. `seed` None: derived from (run seed, index). `constraint`:
    what the text may be.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    constraint: Constraint | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a chat."""

    role: str
    content: str
    name: str | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, validated. One of `messages` (chat), `prompt` (completion: text, or token ids) and `inputs`
    (embedding: a text or token ids each) is set.

    `encoding_format` and `dimensions` (None: all of the model's) are of an embedding, `sampling` and `stream` are not.

    `logprobs`: how many alternatives are wanted beside the log-probability of each token; None: no log-probabilities.
    `continuations` are what may follow the prompt, texts or token ids: they are weighed, nothing is generated.
    """

    custom_id: str
    kind: Literal["chat", "completion", "embedding"]
    sampling: Sampling = Sampling()
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] = ""
    inputs: tuple[str | tuple[int, ...], ...] = ()
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    logprobs: int | None = None
    echo: bool = False
    continuations: tuple[str | tuple[int, ...], ...] = ()
    model: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    stream: bool = False

    @property
    def scores(self) -> bool:
        """Whether tokens that are given are weighed: the prompt's, or those of `continuations`."""
        return bool(self.continuations) or (self.echo and self.logprobs is not None)


_DEFAULTS = Sampling()


def parse_request(
    line: bytes,
    defaults: Sampling = _DEFAULTS,
    *,
    line_number: int | None = None,
    default_id: str | None = None,
) -> Request:
    """The request that `line` (JSON, no newline needed) asks for.

    A parameter that the line does not give, or gives as null, is taken from `defaults`. `default_id` is the
    custom_id of a line without one. Of a key that is written twice the last one counts.

    Raises RequestError that names the field, its value and what is allowed; `line_number` is put before it.
    """
    try:
        embedding = decode_embedding(line)
        wire = decode_line(line) if embedding is None else embedding
        if isinstance(wire, EmbeddingBatch):
            return _build_embedding(wire.body, wire.custom_id, "body.", default_id)
        if isinstance(wire, Batch):
            return _build(wire.body, wire.custom_id, wire.url, defaults, default_id)
        if wire.id is not None and wire.custom_id is not None and wire.id != wire.custom_id:
            raise RequestError("custom_id and id are both given and differ; give one of them", "id")
        custom_id = wire.id if wire.custom_id is None else wire.custom_id
        if isinstance(wire, EmbeddingBody):
            return _build_embedding(wire, custom_id, "", default_id)
        return _build(wire, custom_id, None, defaults, default_id)
    except RequestError as error:
        if line_number is None:
            raise
        raise RequestError(f"line {line_number}: {error}", error.param) from None


def _build(
    body: Body, custom_id: str | int | None, url: str | None, defaults: Sampling, default_id: str | None
) -> Request:
    custom_id = _some_id(custom_id, default_id)
    written = body.messages
    if (written is None) == (body.prompt is None):
        had = "neither messages nor prompt" if written is None else "both messages and prompt"
        raise RequestError(f"the request has {had}; give one of them", "prompt" if written is None else "messages")
    if written is not None:
        if url == "/v1/completions":
            raise RequestError("/v1/completions takes prompt, not messages; the url may be wrong", "messages")
        return Request(
            custom_id=custom_id,
            kind="chat",
            sampling=_generating(_sampling(body, defaults)),
            messages=tuple([_message(message) for message in written]),
            logprobs=_chat_logprobs(body),
            model=body.model,
            user=body.user,
            metadata=body.metadata,
            stream=body.stream is True,
        )
    if url == "/v1/chat/completions":
        raise RequestError("/v1/chat/completions takes messages, not prompt; the url may be wrong", "prompt")
    logprobs, sampling = _completion_logprobs(body), _sampling(body, defaults)
    scores = body.continuations is not None or (body.echo is True and logprobs is not None)
    return Request(
        custom_id=custom_id,
        kind="completion",
        sampling=_scoring(sampling, body) if scores else _generating(sampling),
        prompt=body.prompt or "",
        logprobs=logprobs,
        echo=body.echo is True,
        continuations=body.continuations or (),
        model=body.model,
        user=body.user,
        metadata=body.metadata,
        stream=body.stream is True,
    )


def _build_embedding(body: EmbeddingBody, custom_id: str | int | None, where: str, default_id: str | None) -> Request:
    custom_id = _some_id(custom_id, default_id)
    if body.input is None:
        raise RequestError(f"{where}input is missing: the text, or the texts, to embed", "input")
    return Request(
        custom_id=custom_id,
        kind="embedding",
        sampling=_DEFAULTS,
        inputs=inputs_of(body.input, f"{where}input"),
        encoding_format=body.encoding_format or "float",
        dimensions=body.dimensions,
        model=body.model,
        user=body.user,
    )


def _some_id(custom_id: str | int | None, default_id: str | None) -> str:
    if custom_id is None:
        custom_id = default_id
        if custom_id is None:
            raise RequestError("custom_id is missing", "custom_id")
    return str(custom_id)


# ---------------------------------------------------------------- log-probabilities


def _chat_logprobs(body: Body) -> int | None:
    """How many alternatives a chat asks for."""
    if body.echo:
        refuse("echo", True, "false or left out in a chat; a completion can have its prompt back")
    if body.continuations is not None:
        raise RequestError(
            "continuations must be left out in a chat; give the text before them as the prompt of a completion",
            "continuations",
        )
    if body.logprobs is not None and not isinstance(body.logprobs, bool):
        refuse("logprobs", body.logprobs, "true or false in a chat; top_logprobs says how many alternatives")
    if not body.logprobs:
        if body.top_logprobs:
            refuse("top_logprobs", body.top_logprobs, "0 or left out where logprobs is not true")
        return None
    return body.top_logprobs or 0


def _completion_logprobs(body: Body) -> int | None:
    """How many alternatives a completion asks for. Continuations always have their log-probabilities."""
    allowed = f"an integer from 0 to {ALTERNATIVES_MAX} in a completion: how many alternatives each token has"
    if body.logprobs is True:
        refuse("logprobs", True, allowed)
    if body.top_logprobs:
        refuse("top_logprobs", body.top_logprobs, f"left out in a completion, and logprobs {allowed}")
    if body.continuations is not None and body.echo:
        refuse("echo", True, "false or left out beside continuations: each answer is one of them, without the prompt")
    if body.logprobs is None or body.logprobs is False:
        return None if body.continuations is None else 0
    return body.logprobs


def _generating(sampling: Sampling) -> Sampling:
    if sampling.max_tokens == 0:
        refuse("max_tokens", 0, MAX_TOKENS_ALLOWED)
    return sampling


def _scoring(sampling: Sampling, body: Body) -> Sampling:
    """Raises RequestError for what scoring cannot do."""
    if sampling.n != 1:
        refuse("n", sampling.n, "1 where tokens are scored: they have one answer")
    held = _held_to(body)
    if held:
        raise RequestError(
            f"{held[0]} must be left out where tokens are scored: they are given, and nothing is held to a form",
            held[0],
        )
    # A run's default is for what is generated.
    sampling = msgspec.structs.replace(sampling, constraint=None)
    if body.continuations is not None:
        asked = body.max_tokens or body.max_completion_tokens
        if asked:
            refuse("max_tokens", asked, "0 or left out beside continuations: nothing is generated")
        return msgspec.structs.replace(sampling, max_tokens=0)
    if sampling.max_tokens is None or sampling.max_tokens > 1:
        refuse(
            "max_tokens",
            sampling.max_tokens,
            "0 where echo and logprobs ask for the prompt's log-probabilities (or 1, for one token more); "
            "leave out echo to have those of a longer answer",
        )
    return sampling


def _message(message: WireMessage) -> Message:
    content = message.content
    if not isinstance(content, str):
        content = "\n".join([part.text for part in content])
    return Message(message.role, content, message.name)


def _sampling(b: Body, d: Sampling) -> Sampling:
    max_tokens = b.max_tokens
    if max_tokens is None:
        max_tokens = d.max_tokens if b.max_completion_tokens is None else b.max_completion_tokens
    elif b.max_completion_tokens is not None and b.max_completion_tokens != max_tokens:
        raise RequestError(
            f"max_tokens is {max_tokens} and max_completion_tokens is {b.max_completion_tokens}; they are two "
            "names of one parameter, give one of them",
            "max_completion_tokens",
        )
    stop = b.stop
    ignore_eos = d.ignore_eos if b.ignore_eos is None else b.ignore_eos
    constraint = _constraint(b, d)
    if ignore_eos and constraint is not None:
        raise RequestError(
            "ignore_eos cannot be true where a grammar or a schema says what the text is: it ends when it is whole",
            "ignore_eos",
        )
    return Sampling(
        max_tokens=max_tokens,
        temperature=d.temperature if b.temperature is None else b.temperature,
        top_k=d.top_k if b.top_k is None else b.top_k,
        top_p=d.top_p if b.top_p is None else b.top_p,
        min_p=d.min_p if b.min_p is None else b.min_p,
        typical_p=d.typical_p if b.typical_p is None else b.typical_p,
        repeat_penalty=d.repeat_penalty if b.repeat_penalty is None else b.repeat_penalty,
        repeat_last_n=d.repeat_last_n if b.repeat_last_n is None else b.repeat_last_n,
        presence_penalty=d.presence_penalty if b.presence_penalty is None else b.presence_penalty,
        frequency_penalty=d.frequency_penalty if b.frequency_penalty is None else b.frequency_penalty,
        seed=d.seed if b.seed is None else b.seed,
        logit_bias=d.logit_bias if b.logit_bias is None else b.logit_bias,
        stop=d.stop if stop is None else (stop,) if isinstance(stop, str) else stop,
        ignore_eos=ignore_eos,
        n=d.n if b.n is None else b.n,
        constraint=constraint,
    )


def _held_to(b: Body) -> list[str]:
    """The parameters given that hold the text to something."""
    given = {"grammar": b.grammar is not None, "json_schema": b.json_schema is not None}
    given["response_format"] = isinstance(b.response_format, ObjectFormat | SchemaFormat)
    return [name for name, is_given in given.items() if is_given]


def _constraint(b: Body, d: Sampling) -> Constraint | None:
    form = b.response_format
    names = _held_to(b)
    if len(names) > 1:
        raise RequestError(f"{names[0]} and {names[1]} are both given; give one of them", names[1])
    if b.grammar is not None:
        return of_grammar(b.grammar)
    if b.json_schema is not None:
        return of_schema(b.json_schema, "json_schema")
    if isinstance(form, SchemaFormat):
        return of_schema(form.json_schema.schema, "response_format.json_schema.schema")
    if isinstance(form, ObjectFormat):
        return Constraint("schema", ANY_OBJECT)
    return d.constraint if form is None else None
