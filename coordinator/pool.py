"""The Python API: a pool of engines on all ranks, or in this process alone, and the results as they come.

Under a launcher every rank runs the same script. On rank 0 the body of `with` runs; on every other rank `__enter__`
serves until rank 0 has left its body, then the body runs there too with `is_root` False, and `generate` yields
nothing. Without a launcher the pool hosts one engine for each visible GPU, or one on the CPU.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from coordinator.callbacks import Callbacks, Snapshot
from coordinator.config import JobConfig, checked_sampling
from coordinator.launch import detect
from coordinator.loop import Coordinator, outcome_error
from coordinator.memory import MemoryRecord
from coordinator.optionwords import as_arguments, spoken_as_arguments
from coordinator.ranks import open_world, serve_rank
from coordinator.session import Session
from coordinator.setup import prepare
from coordinator.source import IterableSource
from coordinator.staging import stage_models
from coordinator.transport import Backoff
from scheduling.errors import EXIT_OK, ConfigError, HandshakeError, RequestError, StagingError
from scheduling.logprobs import Score
from scheduling.messages import Delta
from scheduling.requestlines import prompt_line
from scheduling.requests import Request, Sampling, parse_request
from scheduling.vectors import Vectors, from_base64

Prompt = str | Mapping[str, Any] | Request
EmbeddingInput = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any] | Request


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `texts` has one text for each of the request's `n` choices; `text` is the first.

    `index`: the request's place among those of the same call, from 0.

    `logprobs` has for each choice what OpenAI's `choices[].logprobs` holds, None where it was not asked for. `scores`
    has what each of the request's `continuations` comes to.

    Of a request for embeddings, `embeddings` has a vector of norm 1 for each input, 1-D float32; `embedding` is the
    first.

    `error` is set, and there are no texts or embeddings, if the request failed. Times in seconds, measured by the
    engine from when it received the request; None where undefined. `cached_tokens`: those of the prompt that were not
    computed, because they were in the cache.
    """

    custom_id: str
    index: int
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    rank: int
    attempt: int
    embeddings: tuple[Vectors, ...] = ()
    logprobs: tuple[dict[str, Any] | None, ...] = ()
    scores: tuple[Score, ...] = ()
    error: str | None = None

    @property
    def embedding(self) -> Vectors:
        return self.embeddings[0] if self.embeddings else np.empty(0, np.float32)

    @property
    def text(self) -> str:
        return self.texts[0] if self.texts else ""

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[0] if self.finish_reasons else "error"


def result_of(line: bytes) -> Result:
    """The result that a line of the record holds."""
    entry = msgspec.json.decode(line)
    part, response, error = entry["llmpi"], entry["response"], entry["error"]
    choices = response["body"].get("choices", ()) if response is not None else ()
    data = response["body"].get("data", ()) if response is not None else ()
    return Result(
        custom_id=entry["custom_id"], index=part["index"],
        texts=tuple(c["message"]["content"] if "message" in c else c["text"] for c in choices),
        finish_reasons=tuple(c["finish_reason"] for c in choices) or tuple("stop" for _ in data),
        embeddings=tuple(_vector(one["embedding"]) for one in data), prompt_tokens=part["prompt_tokens"],
        cached_tokens=part["cached_tokens"],
        output_tokens=part["output_tokens"], queue_s=part["queue_s"], ttft_s=part["ttft_s"], tpot_s=part["tpot_s"],
        e2e_s=part["e2e_s"], rank=part["rank"], attempt=part["attempt"],
        logprobs=tuple(c["logprobs"] for c in choices),
        scores=tuple(Score(**c["llmpi"]) for c in choices if "llmpi" in c),
        error=as_arguments(error["message"]) if error is not None else None,
    )  # fmt: skip


def _vector(written: list[float] | str) -> Vectors:
    return from_base64(written) if isinstance(written, str) else np.array(written, np.float32)


class Pool:
    """Engines for one model. Use as a context manager; see `llmpi` for an example.

    Args:
        model: path of a GGUF file, or name or digest of a model of the store.
        on_result: called with each `Result`, before `generate` yields it.
        on_tick: called four times a second with a `Snapshot` while `generate` runs.
        on_note: called with a line of text when something worth telling happens (an engine was lost, say).
        **options: fields of `coordinator.config.JobConfig`: schedule, slots, ctx, contexts, threads, gpu_layers,
            device, gpus_per_rank, ranks_per_gpu, coordinator_works, max_tokens, seed, chat_template, pooling,
            draft_model, loras (a list of PATH or PATH:SCALE), stage, stage_dir, embeddings (True where only `embed`
            will be called: nothing is kept ready for generating text), …

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        on_result: Callable[[Result], None] | None = None,
        on_tick: Callable[[Snapshot], None] | None = None,
        on_note: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(JobConfig.__struct_fields__))
        if unknown:
            near = difflib.get_close_matches(unknown[0], JobConfig.__struct_fields__, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(JobConfig.__struct_fields__)}"
            raise ConfigError(f"a Pool has no option {unknown[0]!r}: {hint}")
        given = {"model": model, **options}
        try:
            with spoken_as_arguments():
                self._config = msgspec.convert({name: _written(value) for name, value in given.items()}, JobConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(_wrong_option(error, options)) from None
        self._on_result = on_result
        self._on_tick = on_tick
        self._on_note = on_note
        self._session: Session | None = None
        self._next_index = 0
        self._busy = False
        self._launch = detect(os.environ)
        self.is_root = not self._launch.rank_claimed
        """True on rank 0, and where there is no launcher."""

    def __enter__(self) -> Pool:
        with spoken_as_arguments():
            return self._open()

    def _open(self) -> Pool:
        alone = self._launch.launcher == "none"
        world = None if alone else open_world(self._launch, fanout=self._config.fanout)
        self.is_root = world is None or world.rank == 0
        if world is not None and not self.is_root:
            try:
                serve_rank(prepare(self._config, stage_models(self._config, world)), world, None)
            except (HandshakeError, StagingError) as error:
                # Rank 0 raises and says why. A script that went on here would wait for it in its next Pool.
                # Status 0: mpirun ends the job at the first other one, and would cut off what rank 0 has to say.
                raise SystemExit(EXIT_OK) from error
            return self
        staged = stage_models(self._config, world)
        setup = prepare(self._config, staged)
        session = Session(setup, world)
        if setup.problem is not None:
            session.refuse(str(setup.problem))
            raise setup.problem
        for note in (*staged.notes, *session.start()):
            self._note(note)
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close("done" if error is None else f"{type(error).__name__}: {error}")

    def generate(self, prompts: Iterable[Prompt], **sampling: Any) -> Iterator[Result]:
        """Answer `prompts`, yielding each `Result` as it is finished. On other ranks than 0 this yields nothing.

        `prompts` are texts to continue, dicts (a body with `messages` or `prompt`, or a whole line in OpenAI batch
        format) or `Request`s; an iterable is read lazily. `sampling` holds parameters for requests that do not give
        their own (max_tokens, temperature, top_p, stop, seed, n, …). A request that cannot be run yields a `Result`
        with its `error`.

        Raises:
            ConfigError: a parameter is unknown or out of range.
            EngineError: no engine is left, or none could start.
        """
        if not self.is_root:
            return iter(())
        if self._session is None:
            raise ConfigError("the Pool is not open: use it in a with statement")
        with spoken_as_arguments():
            defaults = checked_sampling(**sampling)
        source = IterableSource(self._numbered(prompts, defaults), first_index=self._next_index)
        return self._results(self._session, source)

    def embed(self, inputs: Iterable[EmbeddingInput], *, dimensions: int | None = None) -> Iterator[Result]:
        """Make vectors of `inputs`, yielding a `Result` for each as it is finished: `Result.index` tells which.

        Each of `inputs` is a text, a list of token ids, or a list of several of either, which make one `Result` with
        several `embeddings`; or a dict (a body with `input`) or a `Request`. An iterable is read lazily. `dimensions`
        cuts vectors to their first so many numbers: only models trained for that keep a meaning.

        Raises:
            EngineError: no engine is left, or none could start.
        """
        if isinstance(inputs, str | bytes | Mapping | Request) or not isinstance(inputs, Iterable):
            return self.generate(inputs)  # which says what is wrong with it
        return self.generate(_embedding_body(one, dimensions) for one in inputs)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """Answer one prompt, yielding its text piece by piece as it is made.

        Raises:
            RequestError: the prompt cannot be run.
        """
        pieces: list[str] = []

        def on_delta(delta: Delta) -> None:
            if delta.choice == 0:
                pieces.append(delta.text)

        if not self.is_root:
            return
        if self._session is None:
            raise ConfigError("the Pool is not open: use it in a with statement")
        with spoken_as_arguments():
            request = _parsed(prompt, checked_sampling(**sampling), f"request-{self._next_index}")
        if request.scores or request.inputs:
            raise RequestError("nothing of this request comes piece by piece: use generate, or embed")
        source = IterableSource([msgspec.structs.replace(request, stream=True)], first_index=self._next_index)
        for result in self._results(self._session, source, on_delta, idle=lambda: bool(pieces)):
            yield from pieces
            pieces.clear()
            if result is not None and result.error is not None:
                raise RequestError(result.error)

    def _results(
        self,
        session: Session,
        source: IterableSource,
        on_delta: Callable[[Delta], None] | None = None,
        idle: Callable[[], bool] = lambda: False,
    ) -> Iterator[Any]:
        """Drive the session; yields results, and None where `idle` says that there is something else to see."""
        if self._busy:
            raise ConfigError("this Pool is in the middle of another generate: finish it, or close its iterator")
        self._busy = True
        first = self._next_index
        arrived: list[bytes] = []
        callbacks = Callbacks(on_result=arrived.append, on_delta=on_delta, on_tick=self._on_tick, on_note=self._note)
        coordinator = session.begin(source, MemoryRecord(), callbacks)
        backoff = Backoff()
        try:
            while True:
                busy = session.turn()
                for line in arrived:
                    result = result_of(line)
                    result = msgspec.structs.replace(result, index=result.index - first)
                    if self._on_result is not None:
                        self._on_result(result)
                    yield result
                arrived.clear()
                if idle():
                    yield None
                if coordinator.outcome is not None:
                    self._end(coordinator)
                    return
                if busy:
                    backoff.reset()
                else:
                    session.wait(backoff.next_s(coordinator.in_flight))
        finally:
            self._busy = False
            self._next_index = max(self._next_index, coordinator.plane.highest + 1)

    def _end(self, coordinator: Coordinator) -> None:
        assert coordinator.outcome is not None
        error = outcome_error(coordinator.outcome)
        if error is not None:
            with spoken_as_arguments():
                raise error

    def _numbered(self, prompts: Iterable[Prompt], defaults: Sampling) -> Iterable[Prompt]:
        if isinstance(prompts, str | bytes | Mapping | Request) or not isinstance(prompts, Iterable):
            return prompts  # the source says what is wrong with it
        first = self._next_index
        return (_with_defaults(prompt, defaults, f"request-{first + k}") for k, prompt in enumerate(prompts))

    def _note(self, text: str) -> None:
        if self._on_note is not None:
            self._on_note(text)


def _embedding_body(one: EmbeddingInput, dimensions: int | None) -> Prompt:
    if not isinstance(one, str | list | tuple):
        return one  # type: ignore[return-value]  # what is no request fails alone, and says why
    # As bytes in base64: numbers written out take ten times as long, here and there.
    written = one if isinstance(one, str) else list(one)
    return {"input": written, "encoding_format": "base64", "dimensions": dimensions}


def _parsed(prompt: Prompt, defaults: Sampling, default_id: str) -> Request:
    if isinstance(prompt, Request):
        return prompt
    return parse_request(prompt_line(prompt), defaults, default_id=default_id)


def _with_defaults(prompt: Prompt, defaults: Sampling, default_id: str) -> Prompt:
    """The prompt as a whole `Request`; what is none goes on as it is and fails alone."""
    if not isinstance(prompt, str | Mapping | Request):
        return prompt
    try:
        return _parsed(prompt, defaults, default_id)
    except RequestError:
        return prompt


def _written(value: Any) -> Any:
    """An option as a command line would give it: paths as text."""
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _wrong_option(error: msgspec.ValidationError, options: Mapping[str, Any]) -> str:
    """Which option is wrong, and what it may be where that is one of a few words."""
    # msgspec speaks of JSON.
    what, _, place = str(error).replace("`array`", "`list`").replace("null", "None").partition(" - at `$.")
    name = place.rstrip("`")
    hint = get_type_hints(JobConfig).get(name)
    words = [repr(word) for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
    if not words:
        return f"a Pool's option {name} is wrong: {what}" if name else f"a Pool's option is wrong: {what}"
    allowed = ["a whole number", *words] if int in get_args(hint) else words
    return f"a Pool's option {name} is {options.get(name)!r}: it must be {' or '.join(allowed)}"
