"""A worker's logic: between its link to rank 0 and its engine. No MPI, no process, no clock of its own.

`step()` does one turn: handle what rank 0 said (`on_assign`, `on_recall`, …), handle what the engine said, send one
envelope with everything that came of it. The caller sleeps between turns. The worker holds every request it was
assigned until it has been reported or given back, so that when the engine dies it can say exactly what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduling import messages as m
from scheduling.errors import LlmpiError, RequestError, UserError
from scheduling.link import Spoke
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request, Sampling, derive_seed, parse_request
from scheduling.tables import finish_number
from scheduling.vectors import from_bytes
from workers.metrics import RankMetrics
from workers.port import Engine
from workers.protocol import Answer, EngineFailed, EngineLoaded, Frame, FromEngine, Job, Returned, Stats

HEARTBEAT_S = 1.0
RESTARTS_MAX = 3
RESTART_BACKOFF_S = 0.5
TELEMETRY_ROWS_MAX = 4096
"""Rows of telemetry that a worker keeps: rank 0 gets them earlier than after an interval then."""
NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker needs to know beside its engine. `wall_clock` gives seconds since the epoch for `created`."""

    rank: int
    hello: m.Hello
    model_name: str
    defaults: Sampling
    engine_factory: Callable[[m.Placement], Engine]
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    telemetry_factory: Callable[[m.Placement, int | None], Callable[[], list[tuple[Any, ...]]]] | None = None
    """From placement and the engine's pid to a sampler: each call gives rows of scheduling.tables.TELEMETRY without
    t_s, rank and session, one for each GPU."""
    telemetry_interval_s: float = 1.0
    metrics_interval_s: float = 10.0
    """How often rank 0 is told what a killed job would lose."""


class _Held:
    """One request with this worker. `started` once the engine has taken it into a slot."""

    __slots__ = ("attempt", "request", "started", "stolen_from")

    def __init__(self, attempt: int, request: Request, stolen_from: int | None) -> None:
        self.attempt = attempt
        self.stolen_from = stolen_from
        self.request = request
        self.started = False


class Worker:
    """See the module's text. `stopped` and `collect_epoch` tell the caller what rank 0 has asked for."""

    def __init__(self, spoke: Spoke, options: WorkerOptions) -> None:
        self._spoke = spoke
        self._options = options
        self._clock = options.clock
        self._held: dict[int, _Held] = {}
        self._started: list[tuple[int, int]] = []
        self._finished: list[m.Finished] = []
        self._deltas: list[m.Delta] = []
        self._made_tokens = 0
        self._engine: Engine | None = None
        self._loaded = False
        self._generation = 0
        self._restarts = 0
        self._restart_at: float | None = None
        self._placement = m.Placement()
        self._run_seed = 0
        self._work_exists = True
        self._sample: Callable[[], list[tuple[Any, ...]]] | None = None
        self._sample_at = 0.0
        self._counters_at = math.inf
        self._born = self._last_said = self._clock()
        self.metrics = RankMetrics(options.rank, 0, options.hello.host.hostname)
        self.collect_epoch: int | None = None
        self._engine_end_s = m.ENGINE_END_S
        self.stopped = False
        self.crashed = False
        self.refused: str | None = None
        spoke.send(options.hello)

    # ------------------------------------------------------------ one turn

    def step(self) -> bool:
        """One turn. True if anything happened: then do not sleep before the next."""
        now = self._clock()
        heard = self._spoke.poll()
        for message in heard:
            self._handle(message)
        said = self._engine.poll() if self._engine is not None else []
        for frame in said:
            self._hear(frame)
        self._look_after_engine(now)
        self.metrics.pass_time(len(self._held), self._work_exists, now)
        self._take_telemetry(now)
        if self._started or self._finished or self._deltas or self._made_tokens:
            self._tell_progress()
        elif now - self._last_said > HEARTBEAT_S:
            self._spoke.send(m.Heartbeat())
        if now >= self._counters_at or len(self.metrics.telemetry) >= TELEMETRY_ROWS_MAX:
            self._tell_counters(now)
        if self._spoke.flush():
            self._last_said = now
        return bool(heard or said)

    def _tell_progress(self) -> None:
        """Put all that has gathered into the envelope."""
        report = m.Report(
            started=self._started, finished=self._finished, deltas=self._deltas, made_tokens=self._made_tokens
        )
        self._spoke.send(report)
        self._started, self._finished, self._deltas, self._made_tokens = [], [], [], 0

    def _tell_counters(self, now: float) -> None:
        metrics = self.metrics
        self._counters_at = now + self._options.metrics_interval_s
        buckets = np.flatnonzero(metrics.itl.counts)
        self._spoke.send(
            m.Counters(
                row=metrics.rank_row(now).tobytes(), itl_buckets=buckets.tolist(),
                itl_counts=metrics.itl.counts[buckets].tolist(), telemetry=metrics.telemetry.rows().tobytes(),
            )
        )  # fmt: skip
        metrics.telemetry.clear()

    @property
    def in_flight(self) -> bool:
        """Whether requests are with this worker: the caller sleeps less then."""
        return bool(self._held)

    def fileno(self) -> int | None:
        """A descriptor that wakes a sleeping caller when the engine has said something."""
        return self._engine.fileno() if self._engine is not None else None

    def crash(self, reason: str, traceback: str) -> None:
        """An exception of our own ended the turn: say so to rank 0 and take no more work."""
        self._tell_progress()  # what is counted here must reach the record too
        self.crashed = True
        self._spoke.send(m.Crashed(reason=reason, traceback=traceback))
        self._spoke.flush()
        self._held.clear()
        self._close_engine(0.0)

    def listen(self) -> bool:
        """A turn after a crash: only what ends this worker, or asks for its metrics, still counts."""
        heard = self._spoke.poll()
        for message in heard:
            if isinstance(message, m.Collect | m.Stop | m.Refuse):
                self._handle(message)
        return bool(heard)

    def close(self, engine_s: float | None = None) -> None:
        """End the engine within that time, or rank 0's, keeping what it last said of its work."""
        self._close_engine(self._engine_end_s if engine_s is None else engine_s)

    # ------------------------------------------------------------ what rank 0 says

    def _handle(self, message: m.FromCoordinator) -> None:
        match message:
            case m.Assign():
                self.on_assign(message)
            case m.Recall():
                self.on_recall(message)
            case m.Cancel():
                self.on_cancel(message)
            case m.Exhausted():
                self.metrics.pass_time(len(self._held), self._work_exists, self._clock())
                self._work_exists = not message.empty
            case m.Welcome():
                self.on_welcome(message)
            case m.Refuse():
                self.refused = message.reason
                self.stopped = True
            case m.Collect():
                self._engine_end_s = message.engine_s
                self.collect_epoch = message.epoch
            case m.Stop():
                self._engine_end_s = message.engine_s
                self.stopped = True

    def on_welcome(self, message: m.Welcome) -> None:
        self._placement = message.placement
        self._run_seed = message.run_seed
        # All ranks count from here: a welcome reaches them at about the same time, however long each took to start.
        self._born = self._clock()
        self.metrics.session = message.session
        self.metrics.device = message.placement.note
        self._start_engine()

    def on_assign(self, message: m.Assign) -> None:
        if not self._loaded or self._engine is None or message.generation != self._generation:
            return  # meant for an engine that has died: `EngineDown` has told rank 0, which assigns it anew
        jobs = []
        defaults = self._options.defaults
        for item in message.items:
            try:
                request = parse_request(item.line, defaults, default_id=f"request-{item.index}")
            except RequestError as error:
                self._finish_failed(
                    item.index, item.attempt, f"request-{item.index}", "invalid_request", str(error),
                    stolen_from=item.stolen_from,
                )  # fmt: skip
                continue
            self._held[item.index] = _Held(item.attempt, request, item.stolen_from)
            seed = request.sampling.seed
            seed = derive_seed(self._run_seed, item.index) if seed is None else seed
            jobs.append(Job(item.index, seed, request.stream, request))
        self._engine.submit(jobs)

    def on_recall(self, message: m.Recall) -> None:
        if self._engine is None:
            self._spoke.send(m.Recalled(message.recall, []))
            return
        self._engine.recall(message.recall, message.indexes)

    def on_cancel(self, message: m.Cancel) -> None:
        if self._engine is not None:
            self._engine.cancel([index for index in message.indexes if index in self._held])

    # ------------------------------------------------------------ what the engine says

    def _hear(self, frame: FromEngine) -> None:
        match frame:
            case Frame():
                self._on_frame(frame)
            case Stats():
                self._on_stats(frame)
            case Returned():
                self._on_returned(frame)
            case EngineLoaded():
                self._on_loaded(frame)
            case EngineFailed():
                self._on_engine_failed(frame)

    def _on_loaded(self, loaded: EngineLoaded) -> None:
        now = self._clock()
        self._loaded = True
        self._generation += 1
        self._counters_at = min(self._counters_at, now + self._options.metrics_interval_s)
        self.metrics.engine_ready(loaded.slots, now)
        engine = self._engine
        pid = engine.pid if engine is not None else None
        if self._options.telemetry_factory is not None:
            self._sample = self._options.telemetry_factory(self._placement, pid)
            self._sample_at = now
        self._spoke.send(
            m.Ready(
                slots=loaded.slots, generation=self._generation, load_s=loaded.load_s, backend=loaded.backend,
                model_desc=loaded.model_desc,
                engine_pid=pid,
            )
        )  # fmt: skip

    def _on_frame(self, frame: Frame) -> None:
        held = self._held
        ended = {answer.key for answer in frame.finished} if frame.started and frame.finished else ()
        for key in frame.started:
            one = held.get(key)
            if one is not None:
                one.started = True
                if key not in ended:
                    self._started.append((key, one.attempt))
        for piece in frame.pieces:
            one = held.get(piece.key)
            if one is not None:
                self._deltas.append(m.Delta(piece.key, one.attempt, piece.choice, piece.text, piece.tokens))
        for answer in frame.finished:
            self._finish(answer)

    def _on_stats(self, stats: Stats) -> None:
        metrics = self.metrics
        self._made_tokens += stats.output_tokens
        metrics.steps += stats.steps
        metrics.busy_s += stats.busy_s
        metrics.slot_s += stats.slot_s
        metrics.decode_s += stats.decode_s
        metrics.sample_s += stats.sample_s
        metrics.drafted_tokens += stats.drafted_tokens
        metrics.accepted_tokens += stats.accepted_tokens
        metrics.itl.add_sparse(stats.itl_buckets, stats.itl_counts)

    def _on_returned(self, returned: Returned) -> None:
        for key in returned.keys:
            self._held.pop(key, None)
        # What started and finished before the engine gave the rest back must be told before the confirmation.
        self._tell_progress()
        self._spoke.send(m.Recalled(returned.recall, returned.keys))

    def _finish(self, answer: Answer) -> None:
        one = self._held.pop(answer.key, None)
        if one is None:
            return
        self._restarts = 0
        if answer.error is not None:
            self._finish_failed(
                answer.key, one.attempt, one.request.custom_id, "request_failed", answer.error,
                answer.prompt_tokens, answer.queue_s, answer.e2e_s, answer.cached_tokens, one.stolen_from,
            )  # fmt: skip
            return
        if one.request.inputs and any(choice.finish_reason == "cancelled" for choice in answer.choices):
            # Some vectors are worth nothing: unlike a text, this answer has no useful beginning.
            self._finish_failed(
                answer.key, one.attempt, one.request.custom_id, "cancelled", "the request was cancelled",
                answer.prompt_tokens, answer.queue_s, answer.e2e_s, stolen_from=one.stolen_from,
            )  # fmt: skip
            return
        options, metrics = self._options, self.metrics
        end_s = self._now_s()
        line = self._line(one, answer, end_s)
        tokens = answer.output_tokens
        tpot_s = (answer.e2e_s - answer.ttft_s) / (tokens - 1) if tokens > 1 and len(answer.choices) == 1 else NAN
        metrics.requests.append(
            (
                answer.key, options.rank, one.attempt, metrics.session, answer.prompt_tokens, answer.cached_tokens,
                tokens, answer.queue_s, answer.ttft_s if tokens else NAN, tpot_s, answer.e2e_s,
                end_s, _number_of(one.stolen_from), finish_number(answer.choices[0].finish_reason), 1,
            )
        )  # fmt: skip
        metrics.finished += 1
        metrics.prompt_tokens += answer.prompt_tokens
        metrics.cached_tokens += answer.cached_tokens
        metrics.output_tokens += tokens
        self._finished.append(m.Finished(answer.key, one.attempt, True, answer.prompt_tokens, tokens, line))

    def _now_s(self) -> float:
        """Since the welcome; a ten thousandth of a second is finer than what a frame's way takes."""
        return round(self._clock() - self._born, 4)

    def _line(self, one: _Held, answer: Answer, end_s: float) -> bytes:
        """The record's line of a request that was answered."""
        options, request, session = self._options, one.request, self.metrics.session
        if request.inputs:
            return encode_embeddings(
                request, answer.key, one.attempt, options.rank, session,
                from_bytes(answer.vectors, len(request.inputs)), answer.prompt_tokens, answer.queue_s, answer.e2e_s,
                options.model_name, end_s, one.stolen_from,
            )  # fmt: skip
        choices = [(choice.text, choice.finish_reason, choice.output_tokens) for choice in answer.choices]
        return encode_result(
            request, answer.key, one.attempt, options.rank, session, choices, answer.prompt_tokens,
            answer.output_tokens, answer.queue_s, answer.ttft_s, answer.e2e_s, int(options.wall_clock()),
            options.model_name, answer.cached_tokens, [choice.logprobs for choice in answer.choices],
            end_s, one.stolen_from,
        )  # fmt: skip

    def _finish_failed(
        self, index: int, attempt: int, custom_id: str, code: str, reason: str,
        prompt_tokens: int = 0, queue_s: float = 0.0, e2e_s: float = 0.0, cached_tokens: int = 0,
        stolen_from: int | None = None,
    ) -> None:  # fmt: skip
        rank, metrics, end_s = self._options.rank, self.metrics, self._now_s()
        line = encode_failure(
            custom_id, index, attempt, rank, metrics.session, code, reason, prompt_tokens, queue_s, e2e_s,
            cached_tokens, end_s, stolen_from,
        )  # fmt: skip
        metrics.requests.append(
            (
                index, rank, attempt, metrics.session, prompt_tokens, cached_tokens, 0, queue_s, NAN, NAN, e2e_s,
                end_s, _number_of(stolen_from), finish_number("error"), 0,
            )
        )  # fmt: skip
        metrics.finished += 1
        metrics.failed += 1
        metrics.prompt_tokens += prompt_tokens
        metrics.cached_tokens += cached_tokens
        self._finished.append(m.Finished(index, attempt, False, prompt_tokens, 0, line))

    # ------------------------------------------------------------ the engine's life

    def _start_engine(self) -> None:
        self._loaded = False
        self._restart_at = None
        try:
            self._engine = self._options.engine_factory(self._placement)
        except (LlmpiError, OSError) as error:
            self._engine_down(
                f"the engine cannot be started: {error}", restart=False, user=isinstance(error, UserError)
            )

    def _look_after_engine(self, now: float) -> None:
        if self._restart_at is not None and now >= self._restart_at:
            self._start_engine()
        if self._engine is not None and not self._engine.alive:
            reason = self._engine.exit_reason()
            self._restarts += 1
            self._engine_down(reason, restart=self._restarts <= RESTARTS_MAX, user=False)

    def _on_engine_failed(self, frame: EngineFailed) -> None:
        # The engine itself says that it cannot go on: trying the same again would fail the same way.
        self._engine_down(frame.reason, restart=False, user=frame.user_error)

    def _engine_down(self, reason: str, restart: bool, user: bool) -> None:
        now = self._clock()
        self.metrics.engine_gone(len(self._held), self._work_exists, now)
        self._tell_progress()
        started = [(index, one.attempt) for index, one in self._held.items() if one.started]
        unstarted = [(index, one.attempt) for index, one in self._held.items() if not one.started]
        self._held.clear()
        self._spoke.send(
            m.EngineDown(
                reason=reason, started=started, unstarted=unstarted, restarting=restart, user_error=user
            )
        )  # fmt: skip
        self._close_engine(1.0)
        if restart:
            self._restart_at = now + RESTART_BACKOFF_S * 2.0 ** (self._restarts - 1)

    def _close_engine(self, timeout_s: float) -> None:
        engine, self._engine = self._engine, None
        self._loaded = False
        self._sample = None
        if engine is not None:
            engine.close(timeout_s)
            for frame in engine.poll():
                if isinstance(frame, Stats):
                    self._on_stats(frame)

    # ------------------------------------------------------------ telemetry

    def _take_telemetry(self, now: float) -> None:
        if self._sample is None or now < self._sample_at:
            return
        self._sample_at = now + self._options.telemetry_interval_s
        rank, session = self._options.rank, self.metrics.session
        for row in self._sample():
            self.metrics.telemetry.append((now - self._born, rank, session, *row))


def _number_of(rank: int | None) -> int:
    return -1 if rank is None else rank
