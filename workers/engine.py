"""The engine inside its process: one model, several contexts, the threads that drive them.

    reader (the main thread)   frames from the rank: submit, recall, cancel; end of file ends the engine
    preparing threads          chat templates, tokenising and compiling grammars, ahead of admission: one for all in
                               order, one for long texts and one for grammars, so that nobody else waits for those
    one thread a context       `workers.stepper`, `workers.embedder` or `workers.scorer` (`workers.lanes` makes them),
                               over llama.cpp or over the simulation of it
    a pool                     helps the stepping threads to choose tokens

Contexts are of a `Lane` each: what they are made for. Those of the lanes that the rank expects to need are opened when
the model is loaded, others when the first request comes that needs them; where that fails, the requests that need them
fail.

They meet in the `Backlog`, in the `Meter` and in the `Outbox`, which have locks. A blocked pipe blocks stepping:
that is the backpressure. An exception in any thread ends the engine with `EngineFailed`.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import numpy as np

from scheduling.errors import ConfigError, EngineError, ModelFileError, RequestError
from workers.backlog import Backlog
from workers.constraints import Constraints
from workers.continuations import ContinuationReader
from workers.draft_model import check_same_tokenizer
from workers.frames import read_frame
from workers.inputs import InputReader
from workers.lanes import Lanes
from workers.library import Library, Model
from workers.longtexts import LONG_CHARACTERS, PREPARING_STACK_BYTES, longest_text
from workers.meter import Meter
from workers.outbox import Outbox, fail
from workers.prompts import PromptReader
from workers.protocol import (
    Cancel,
    Choice,
    EngineConfig,
    EngineLoaded,
    Frame,
    Recall,
    Returned,
    Submit,
    decode_to_engine,
)
from workers.rendering import ConfinedTemplate, TemplateSource
from workers.shares import slots_of_contexts
from workers.stepper import Vocabulary
from workers.task import Lane, Task
from workers.text import PieceTable

EMBEDDED_AT_ONCE = 512
"""Requests to be given where nothing is generated: several batches of short inputs."""
JOIN_S = 2.0
"""How long the end waits for threads that are inside a decode."""


class BatchingEngine:
    """Loads when made; `serve` runs it until the rank closes the pipe."""

    def __init__(self, config: EngineConfig, outbox: Outbox, library: Library) -> None:
        """Raises `UserError` or `EngineError` if the model or a context cannot be had."""
        began_s = time.monotonic()
        self._outbox = outbox
        if config.ctx_tokens < 2:
            raise ConfigError(f"--ctx {config.ctx_tokens} leaves no room for a prompt and a token of output")
        slots_of_contexts(config.slots, config.contexts)  # refused before anything is loaded
        library.start()
        self._gpu_names = library.gpu_names() if config.gpu_layers else []
        self._check_gpu(config)
        self._config = config
        self._model = model = library.load(config)
        vocabulary = Vocabulary(model.eog_table(), PieceTable(model.vocab_tokens, model.piece, model.token_text))
        self._constraints = Constraints(
            model.vocab_tokens,
            vocabulary.pieces.__getitem__,
            np.flatnonzero(vocabulary.eog).tolist(),
            config.threads if self._gpu_names else 1,
        )
        self._compile_default(config)
        self._backlog = Backlog()
        self._meter = Meter(outbox.send, time.monotonic())
        own_template = model.chat_template()
        template = config.chat_template if config.chat_template is not None else own_template
        piece_bytes_max = model.piece_bytes_max()
        self._prompts = self._prompt_reader(config, model, template, piece_bytes_max)
        self._inputs = self._input_reader(config, model, piece_bytes_max)
        self._continuations = ContinuationReader(
            model.tokenize,
            model.piece,
            vocab_tokens=model.vocab_tokens,
            piece_bytes_max=piece_bytes_max,
            ctx_tokens=max(config.ctx_tokens, config.long_ctx_tokens),
        )
        self._lanes = Lanes(
            config,
            model,
            self._load_draft_model(config, model, library),
            on_gpu=bool(self._gpu_names),
            vocabulary=vocabulary,
            constraints=self._constraints,
            backlog=self._backlog,
            meter=self._meter,
            send=outbox.send,
            input_tokens=self._inputs.tokens_max,
        )
        self._threads: list[threading.Thread] = []
        self._long_ones: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._constrained: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._one_at_a_time = threading.Lock()
        """Of the preparing threads, where they open lanes."""
        self._open_lanes: dict[Lane, str] = {}
        """Lanes that were asked for, and why they could not be opened ("" where they could)."""
        lanes = [Lane(name) for name in config.lanes_at_start] if model.can_generate else [Lane.EMBED]
        for lane in lanes:
            self._open(lane)
        self.loaded = EngineLoaded(
            load_s=time.monotonic() - began_s,
            vocab_tokens=model.vocab_tokens,
            train_ctx_tokens=model.train_ctx_tokens,
            slots=config.slots if Lane.GENERATE in lanes else EMBEDDED_AT_ONCE,
            model_desc=model.desc,
            model_bytes=model.model_bytes,
            backend="+".join(self._gpu_names) or "CPU",
            chat_template=template is not None,
        )

    def _check_gpu(self, config: EngineConfig) -> None:
        asked = {name: value for name, value in config.device_mask.items() if value not in ("", "-1")}
        if asked and config.gpu_layers and not self._gpu_names:
            given = ", ".join(f"{name}={value}" for name, value in asked.items())
            raise ConfigError(
                f"a GPU was assigned ({given}), but llama.cpp sees none: install a llama-cpp-python built for it, "
                "or use --gpu-layers 0"
            )

    def _compile_default(self, config: EngineConfig) -> None:
        """Fail now if what all answers are to be held to is nothing that they can be."""
        if config.constraint is not None:
            try:
                self._constraints.grammar(config.constraint)
            except RequestError as error:
                raise ConfigError(f"{error} (all answers are held to it: --json-schema, --grammar-file)") from error

    @staticmethod
    def _load_draft_model(config: EngineConfig, model: Model, library: Library) -> Model | None:
        if config.draft_model is None or config.speculate == "never":
            return None
        draft = library.load(msgspec.structs.replace(config, model=config.draft_model, loras=()))
        for path, one in ((config.model, model), (config.draft_model, draft)):
            if not (one.can_generate and one.keeps_cells):
                raise ModelFileError(
                    f"--draft-model: what {path} ({one.desc}) has read cannot be taken back token by token, which "
                    "speculation needs; leave it out"
                )
        check_same_tokenizer(config.draft_model, draft, model)
        return draft

    @staticmethod
    def _prompt_reader(config: EngineConfig, model: Model, template: str | None, piece_bytes_max: int) -> PromptReader:
        chat = ConfinedTemplate(
            TemplateSource(
                template,
                bos=model.token_text(model.bos),
                eos=model.token_text(model.eos),
                control_texts=tuple(model.control_texts()),
            )
        )
        if config.chat_template is not None:
            chat.check()
        return PromptReader(
            chat,
            model.tokenize,
            vocab_tokens=model.vocab_tokens,
            piece_bytes_max=piece_bytes_max,
            bos=model.bos,
            ctx_tokens=max(config.ctx_tokens, config.long_ctx_tokens),
            max_tokens_default=config.max_tokens_default,
        )

    @staticmethod
    def _input_reader(config: EngineConfig, model: Model, piece_bytes_max: int) -> InputReader:
        return InputReader(
            model.tokenize,
            vocab_tokens=model.vocab_tokens,
            piece_bytes_max=piece_bytes_max,
            tokens_max=min(max(config.ctx_tokens, config.long_ctx_tokens, config.input_tokens), model.train_ctx_tokens),
            train_ctx_tokens=model.train_ctx_tokens,
            dimensions=model.dimensions,
        )

    # ------------------------------------------------ contexts

    def _open(self, lane: Lane) -> None:
        """Make the contexts of `lane` and start their threads. Raises `EngineError` if there is no memory for them."""
        for driver in self._lanes.drivers(lane):
            thread = threading.Thread(target=self._guard, args=(driver.run,), name=lane.value, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._open_lanes[lane] = ""

    def _need(self, lane: Lane) -> None:
        """Open `lane` if it is not open. Raises `RequestError`, each time, if it cannot be."""
        if lane not in self._open_lanes:
            try:
                self._open(lane)
            except (EngineError, ModelFileError) as error:
                self._open_lanes[lane] = str(error)
        if reason := self._open_lanes[lane]:
            raise RequestError(reason)

    # ------------------------------------------------ running

    def serve(self, in_fd: int) -> None:
        """Run until end of file on `in_fd`."""
        preparing = self._start_preparing()
        self._guard(lambda: self._read(in_fd))
        self._backlog.close()
        self._long_ones.put(None)
        self._constrained.put(None)
        deadline_s = time.monotonic() + JOIN_S
        for thread in (*preparing, *self._threads):
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._meter.close(time.monotonic())

    def _read(self, in_fd: int) -> None:
        while (body := read_frame(in_fd)) is not None:
            message = decode_to_engine(body)
            if isinstance(message, Submit):
                now_s = time.monotonic()
                self._backlog.add(Task(job, now_s) for job in message.jobs)
            elif isinstance(message, Recall):
                self._outbox.send(Returned(message.recall, self._backlog.recall(message.keys)))
            elif isinstance(message, Cancel):
                self._answer(self._backlog.cancel(message.keys))
            else:
                raise EngineError("the rank sent a second start to an engine that runs")

    def _answer(self, tasks: list[Task]) -> None:
        if tasks:
            now_s = time.monotonic()
            answers = [task.answer(now_s) for task in tasks]
            self._outbox.send(Frame(finished=answers, running=self._backlog.running))

    def _start_preparing(self) -> list[threading.Thread]:
        bodies = {
            "prepare": self._prepare,
            "prepare-long": self._prepare_long,
            "prepare-constrained": self._prepare_constrained,
        }
        threads = [
            threading.Thread(target=self._guard, args=(body,), name=name, daemon=True) for name, body in bodies.items()
        ]
        earlier = threading.stack_size(PREPARING_STACK_BYTES)
        try:
            for thread in threads:
                thread.start()
        finally:
            threading.stack_size(earlier)
        return threads

    def _prepare(self) -> None:
        while (task := self._backlog.next_raw()) is not None:
            if longest_text(task.job.request) > LONG_CHARACTERS:
                self._long_ones.put(task)
            else:
                self._prepare_one(task)

    def _prepare_long(self) -> None:
        while (task := self._long_ones.get()) is not None:
            self._prepare_one(task)

    def _prepare_constrained(self) -> None:
        while (task := self._constrained.get()) is not None:
            self._try(self._compile, task)
            self._prepared(task)

    def _prepare_one(self, task: Task) -> None:
        self._try(self._prepare_inputs if task.job.request.inputs else self._prepare_prompt, task)
        if task.error is None and task.lane is not Lane.EMBED and task.sampling.constraint is not None:
            self._constrained.put(task)
        else:
            self._prepared(task)

    @staticmethod
    def _try(part: Callable[[Task], None], task: Task) -> None:
        try:
            part(task)
        except RequestError as error:
            task.error = str(error)
        except Exception as error:  # one prompt must not end the engine
            traceback.print_exc()
            task.error = f"preparing the prompt failed: {type(error).__name__}: {error}"

    def _prepared(self, task: Task) -> None:
        """It may start, or has ended already."""
        if task.error is None and (task.limit >= 1 or task.lane is Lane.SCORE):
            self._backlog.ready(task)
        elif self._backlog.end_unstarted(task):
            task.choices = [Choice("", "length", 0) for _ in task.choices]
            self._answer([task])

    def _prepare_prompt(self, task: Task) -> None:
        self._prompts.check_sampling(task.sampling)
        request = task.job.request
        prompt = self._prompts.tokens(request)
        task.continuations = self._continuations.tokens(request, int(prompt.size))
        task.prompt = prompt
        task.limit = self._prompts.limit(task.sampling, int(prompt.size))
        task.lane = self._lane(task)
        with self._one_at_a_time:
            self._need(task.lane)

    def _compile(self, task: Task) -> None:
        assert task.sampling.constraint is not None
        task.grammar = self._constraints.grammar(task.sampling.constraint)

    def _prepare_inputs(self, task: Task) -> None:
        request = task.job.request
        task.lane = Lane.EMBED
        task.prompt, task.starts = self._inputs.read(request)
        task.vectors = np.empty((len(request.inputs), request.dimensions or self._inputs.dimensions), np.float32)
        task.limit = 1
        with self._one_at_a_time:
            self._need(task.lane)

    def _lane(self, task: Task) -> Lane:
        if task.job.request.scores:
            return Lane.SCORE
        fits = task.prompt.size + task.limit <= self._config.ctx_tokens
        return Lane.GENERATE if fits or not self._config.long_slots else Lane.LONG

    def _guard(self, body: Callable[[], None]) -> None:
        """Run a thread's body; what it raises ends the engine."""
        try:
            body()
        except BaseException as error:
            fail(self._outbox, error)
