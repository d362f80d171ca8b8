"""A worker's logic: between its link to rank 0 and its engine. No MPI, no process, no clock of its own.

`step()` does one turn: handle what rank 0 said (`on_assign`, `on_recall`, …), handle what the engine said, send one
envelope with everything that came of it. The caller sleeps between turns. The worker holds every request it was
assigned until it has been reported or given back, so that when the engine dies it can say exactly what was lost.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from scheduling import messages as m
from scheduling.errors import RequestError
from scheduling.link import Spoke
from scheduling.requests import Sampling, parse_request
from scheduling.seeds import derive_seed
from workers.care import LEASE_S
from workers.endings import Endings, Held
from workers.gauges import Gauges, Sampler
from workers.gpuhealth import GpuHealth
from workers.keeper import Down, Keeper
from workers.metrics import RankMetrics
from workers.port import Engine
from workers.protocol import Answer, EngineFailed, EngineLoaded, Frame, FromEngine, Job, Returned, Stats

HEARTBEAT_S = 3.0
OVERDUE_CHECK_S = 0.25


def heartbeat_s(lease_s: float) -> float:
    """How often a worker that has had nothing else to say tells that it is here: five times in its lease at least."""
    return min(HEARTBEAT_S, lease_s / 5)


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
    telemetry_factory: Callable[[m.Placement, int | None], Sampler] | None = None
    """From placement and the engine's pid."""
    telemetry_interval_s: float = 1.0
    metrics_interval_s: float = 10.0
    """How often rank 0 is told what a killed job would lose."""
    engine_lease_s: float = LEASE_S
    """See `workers.care`."""
    lease_s: float = 60.0
    """Rank 0 takes a worker for lost that says nothing for so long."""
    welcome_max_s: float | None = None
    """A worker that hears nothing from rank 0 for so long, before this has welcomed it, leaves. None: it waits."""
    request_timeout_s: float | None = None
    """A request that has run for longer is stopped, and has failed."""
    health_factory: Callable[[m.Placement], GpuHealth] | None = None
    """From placement to what knows of its GPUs when an engine has died. None: nobody is asked."""


class Worker:
    """See the module's text. `stopped`, `collect_epoch` and `reduced` tell the caller what rank 0 has asked for."""

    def __init__(self, spoke: Spoke, options: WorkerOptions) -> None:
        self._spoke = spoke
        self._options = options
        self._clock = options.clock
        self._held: dict[int, Held] = {}
        self._started: list[tuple[int, int]] = []
        self._finished: list[m.Finished] = []
        self._deltas: list[m.Delta] = []
        self._made_tokens = 0
        self._keeper = Keeper(options.engine_factory, options.engine_lease_s, options.clock)
        self._generation = 0
        self._overdue_at = 0.0
        self._run_seed = 0
        self._work_exists = True
        self._last_said = self._clock()
        self._heartbeat_s = heartbeat_s(options.lease_s)
        self.metrics = RankMetrics(options.rank, 0, options.hello.host.hostname)
        self._gauges = Gauges(self.metrics, options.telemetry_interval_s, options.metrics_interval_s)
        self._endings = Endings(
            options.rank, options.model_name, self.metrics, options.clock, options.wall_clock, options.request_timeout_s
        )
        self.collect_epoch: int | None = None
        self.reduced = False
        self._ready: m.Ready | None = None
        self._rejoin = 0
        self._heard_at = self._last_said
        self._silence_max_s = options.welcome_max_s
        self._engine_end_s = m.ENGINE_END_S
        self.stopped = False
        self.crashed = False
        self.refused: str | None = None
        spoke.send(options.hello)

    # ------------------------------------------------------------ one turn

    def step(self) -> bool:
        """One turn. True if anything happened: then do not sleep before the next. That rank 0 is here is nothing."""
        now = self._clock()
        # The engine first: what comes after its death is not to be laid to it.
        said = self._engine.poll() if self._engine is not None else []
        for frame in said:
            self._hear(frame)
        down = self._keeper.look(now, heard=bool(said), working=bool(self._held))
        if down is not None:
            self._engine_down(down)
        heard = self._listen(now)
        for message in heard:
            self._handle(message)
        self._stop_overdue(now)
        self._begin_anew()
        self.metrics.pass_time(len(self._held), self._work_exists, now)
        self._gauges.take(now, self._endings.born)
        if self._has_progress:
            self._tell_progress()
        elif now - self._last_said > self._heartbeat_s:
            self._spoke.send(m.Heartbeat())
        counters = self._gauges.counters(now)
        if counters is not None:
            self._spoke.send(counters)
        if self._spoke.flush():
            self._last_said = now
        return bool(said) or any(not isinstance(message, m.Heartbeat) for message in heard)

    @property
    def _engine(self) -> Engine | None:
        return self._keeper.engine

    @property
    def _has_progress(self) -> bool:
        return bool(self._started or self._finished or self._deltas or self._made_tokens)

    def _tell_progress(self) -> None:
        """Put all that has gathered into the envelope."""
        report = m.Report(
            started=self._started, finished=self._finished, deltas=self._deltas, made_tokens=self._made_tokens
        )
        self._spoke.send(report)
        self._started, self._finished, self._deltas, self._made_tokens = [], [], [], 0

    @property
    def in_flight(self) -> bool:
        """Whether requests are with this worker: the caller sleeps less then."""
        return bool(self._held)

    def fileno(self) -> int | None:
        """A descriptor that wakes a sleeping caller when the engine has said something."""
        return self._engine.fileno() if self._engine is not None else None

    def crash(self, reason: str, trace: str) -> None:
        """An exception of our own ended the turn: say so to rank 0 and take no more work."""
        self._tell_progress()  # what is counted here must reach the record too
        self.crashed = True
        self._spoke.send(m.Crashed(reason=reason, traceback=trace))
        self._spoke.flush()
        self._held.clear()
        with contextlib.suppress(Exception):  # of the same cause, maybe: one is told
            self._close_engine(0.0)

    def listen(self) -> bool:
        """A turn after a crash: only what ends this worker or its waiting, or asks for its metrics, still counts."""
        now = self._clock()
        heard = self._listen(now)
        for message in heard:
            if isinstance(message, m.Collect | m.Enter | m.Busy | m.Stop | m.Refuse):
                self._handle(message)
        if now - self._last_said > self._heartbeat_s:
            self._spoke.send(m.Heartbeat())
        if self._spoke.flush():
            self._last_said = now
        return bool(heard)

    def _listen(self, now: float) -> list[m.FromCoordinator]:
        heard = self._spoke.poll()
        if heard:
            self._heard_at = now
        return heard

    def why_leave(self) -> str | None:
        """Why this worker should leave although rank 0 has not said so: that it is gone. To be asked after a turn."""
        if self._spoke.rank0_lost:
            return "rank 0 has died"
        silent_s = self._clock() - self._heard_at
        if self._silence_max_s is not None and silent_s > self._silence_max_s:
            return f"nothing was heard of rank 0 for {silent_s:.0f} s"
        return None

    def on_collected(self) -> None:
        """The collectives, in which rank 0 says nothing else, have ended."""
        self._heard_at = self._clock()

    @property
    def silence_max_s(self) -> float | None:
        """How long rank 0 may say nothing; None: as long as it likes."""
        return self._silence_max_s

    def close(self, engine_s: float | None = None) -> None:
        """End the engine within that time, or rank 0's, keeping what it last said of its work.

        An exception of our own in what is kept is told to rank 0 and stops nobody.
        """
        self._keeper.leave()
        try:
            self._close_engine(self._engine_end_s if engine_s is None else engine_s)
        except Exception as error:
            self.crash(f"{type(error).__name__}: {error}", traceback.format_exc())

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
            case m.Rejoin():
                self.on_rejoin(message)
            case m.Collect():
                self._engine_end_s = message.engine_s
                self.on_collect(message)
            case m.Enter():
                self.collect_epoch, self.reduced = message.epoch, message.reduced
            case m.Busy():
                self._silence_max_s = message.silence_max_s
            case m.Heartbeat():
                pass
            case m.Stop():
                self._engine_end_s = message.engine_s
                self.stopped = True

    def on_welcome(self, message: m.Welcome) -> None:
        self._keeper.placement = message.placement
        self._run_seed = message.run_seed
        # All ranks count from here: a welcome reaches them at about the same time, however long each took to start.
        self._endings.born = self._heard_at = self._clock()
        self._silence_max_s = message.silence_max_s
        self.metrics.session = message.session
        self.metrics.device = message.placement.note
        if self._options.health_factory is not None:
            self._keeper.health = self._options.health_factory(message.placement)
        down = self._keeper.start()
        if down is not None:
            self._engine_down(down)

    def on_assign(self, message: m.Assign) -> None:
        if not self._keeper.loaded or self._engine is None or message.generation != self._generation:
            return  # meant for an engine that has died: `EngineDown` has told rank 0, which assigns it anew
        jobs = []
        defaults = self._options.defaults
        for item in message.items:
            try:
                request = parse_request(item.line, defaults, default_id=f"request-{item.index}")
            except RequestError as error:
                self._finished.append(self._endings.refused(item, str(error)))
                continue
            self._held[item.index] = Held(item.attempt, request, item.stolen_from)
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

    def on_rejoin(self, message: m.Rejoin) -> None:
        self._rejoin = message.number
        self._generation += 1  # what is on its way belongs to the past
        if self._engine is not None:
            self._engine.cancel(list(self._held))

    def _begin_anew(self) -> None:
        """Say `Ready` again once nothing of the past is left."""
        ready = self._ready
        if ready is None or ready.rejoin == self._rejoin or self._held or not self._keeper.loaded:
            return
        if self._has_progress:
            self._tell_progress()  # of the past, so it goes first
        self._say_ready(msgspec.structs.replace(ready, generation=self._generation, rejoin=self._rejoin))

    def _say_ready(self, ready: m.Ready) -> None:
        self._ready = ready
        self._spoke.send(ready)

    def on_collect(self, message: m.Collect) -> None:
        self.close()
        self._spoke.send(m.Collecting(message.epoch))

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
                self._engine_down(self._keeper.on_failed(frame))

    def _on_loaded(self, loaded: EngineLoaded) -> None:
        now = self._clock()
        self._keeper.on_loaded(now)
        self._generation += 1
        self.metrics.engine_ready(loaded.slots, now)
        engine = self._engine
        pid = engine.pid if engine is not None else None
        sampler_of = self._options.telemetry_factory
        self._gauges.engine_loaded(None if sampler_of is None else sampler_of(self._keeper.placement, pid), now)
        self._say_ready(
            m.Ready(
                slots=loaded.slots, generation=self._generation, load_s=loaded.load_s, backend=loaded.backend,
                model_desc=loaded.model_desc,
                engine_pid=pid, rejoin=self._rejoin,
            )
        )  # fmt: skip

    def _on_frame(self, frame: Frame) -> None:
        held, now = self._held, self._clock()
        ended = {answer.key for answer in frame.finished} if frame.started and frame.finished else ()
        for key in frame.started:
            one = held.get(key)
            if one is not None:
                one.started_at = now
                if key not in ended:
                    self._started.append((key, one.attempt))
        for piece in frame.pieces:
            one = held.get(piece.key)
            if one is not None:
                self._deltas.append(m.Delta(piece.key, one.attempt, piece.choice, piece.text, piece.tokens))
        for answer in frame.finished:
            self._finish(answer)

    def _on_stats(self, stats: Stats) -> None:
        self._keeper.on_stats(stats)
        self._made_tokens += stats.output_tokens
        self.metrics.count_steps(stats)

    def _on_returned(self, returned: Returned) -> None:
        for key in returned.keys:
            self._held.pop(key, None)
        # What started and finished before the engine gave the rest back must be told before the confirmation.
        self._tell_progress()
        self._spoke.send(m.Recalled(returned.recall, returned.keys))

    def _finish(self, answer: Answer) -> None:
        one = self._held.pop(answer.key, None)
        if one is not None:
            self._keeper.on_answered()
            self._finished.append(self._endings.answered(one, answer))

    # ------------------------------------------------------------ the engine's life

    def _engine_down(self, down: Down) -> None:
        """The engine is of no more use: tell rank 0 what it had, and have another one started if there is to be one."""
        now = self._clock()
        self.metrics.engine_gone(len(self._held), self._work_exists, now)
        self._tell_progress()
        started = [(index, one.attempt) for index, one in self._held.items() if one.started_at is not None]
        unstarted = [(index, one.attempt) for index, one in self._held.items() if one.started_at is None]
        self._held.clear()
        self._spoke.send(
            m.EngineDown(
                reason=down.reason, started=started, unstarted=unstarted, restarting=down.wait_s is not None,
                user_error=down.user_error,
            )
        )  # fmt: skip
        self._close_engine(down.close_s)
        if down.wait_s is not None:
            self._keeper.start_again(now + down.wait_s)

    def _stop_overdue(self, now: float) -> None:
        """Have the engine stop what has run for too long; it ends with an answer."""
        timeout_s = self._options.request_timeout_s
        if timeout_s is None or now < self._overdue_at:
            return
        self._overdue_at = now + OVERDUE_CHECK_S
        late = []
        for key, one in self._held.items():
            if one.started_at is not None and now - one.started_at > timeout_s and not one.overdue:
                one.overdue = True
                late.append(key)
        if late and self._engine is not None:
            self._engine.cancel(late)

    def _close_engine(self, timeout_s: float) -> None:
        self._gauges.engine_gone()
        for frame in self._keeper.close(timeout_s):
            if isinstance(frame, Stats):
                self._on_stats(frame)
