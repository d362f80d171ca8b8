"""Engines that compute nothing: they answer after a while, and can die, hang, slow down, or not load at all.

`SimulatedEngine` is a `workers.port.Engine`. It lives in simulated time: whatever is asked of it first brings it up to
the present, event by event. What it has said lies in its pipe until it is polled; an engine that is killed may take the
end of that with it, as it takes all that it was running.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.simulation.agenda import ViolationError
from tests.simulation.work import POISON, REFUSED_BY_ENGINE, answer_text
from workers.protocol import Answer, Choice, EngineFailed, EngineLoaded, Frame, FromEngine, Job, Returned, Stats

STATS_S = 1.0
POISON_S = 0.01
"""How long an engine lives with a request that it cannot bear."""


@dataclass(slots=True)
class Running:
    """A request in a slot. Times in seconds of the engine's own clock."""

    job: Job
    received_s: float
    started_s: float
    ends_s: float
    first_s: float
    text: str
    tokens: int


@dataclass
class Deaths:
    """How often an engine died that had been given a request and had not told its end, by index, over one session."""

    counts: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Temper:
    """What an engine is like. `fails_loading`: it says why and ends. `max_tokens`: of requests without a limit."""

    slots: int
    load_s: float
    token_s: float
    max_tokens: int
    fails_loading: bool = False


def prompt_of(job: Job) -> str:
    prompt = job.request.prompt
    return prompt if isinstance(prompt, str) else ""


class SimulatedEngine:
    """See the module's text. `stir(at_s)` is told when there will be something to poll."""

    def __init__(
        self, clock: Callable[[], float], stir: Callable[[float], None], dice: Random, temper: Temper, deaths: Deaths
    ) -> None:
        self._clock, self._stir, self._dice, self.temper = clock, stir, dice, temper
        self._deaths = deaths
        self._said: list[FromEngine] = []
        self._queue: deque[tuple[Job, float]] = deque()
        self._running: dict[int, Running] = {}
        self._had: set[int] = set()
        """What it was given and has neither answered nor given back."""
        self._asked: list[Callable[[], None]] = []
        self._loads_s = clock() + temper.load_s
        self._loaded = False
        self._stats_s = math.inf
        self._told_tokens = self._steps = 0
        self._dies_s = math.inf
        self._hangs_since: float | None = None
        self._stalls_since: float | None = None
        self.for_good = False
        """It does not go on when it is calm again: somebody has to find that out."""
        self._reason = ""
        self._closed = False
        self.slowness = 1.0
        self.broken: Exception | None = None
        """To be raised by the next poll: a mistake of the worker's own."""
        self._plan()

    # ------------------------------------------------------------ the port

    def submit(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.key in self._had:
                raise ViolationError(f"request {job.key} is given to an engine that has it")
            self._had.add(job.key)
        self._ask(lambda: self._take(jobs))

    def recall(self, recall_id: int, keys: list[int]) -> None:
        self._ask(lambda: self._give_back(recall_id, set(keys)))

    def cancel(self, keys: list[int]) -> None:
        self._ask(lambda: self._cancel(set(keys)))

    def poll(self) -> list[FromEngine]:
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        self._advance()
        said, self._said = self._said, []
        return said

    def fileno(self) -> int | None:
        return None

    @property
    def alive(self) -> bool:
        return not self._closed and (not self._reason or bool(self._said))

    @property
    def pid(self) -> int | None:
        return 4711

    def exit_reason(self) -> str:
        return self._reason

    def close(self, timeout_s: float) -> None:
        if self._closed:
            return
        self._advance()
        if not self._reason:
            self._tell_stats()
            self._deaths.counts.update(self._had)
        self._closed = True
        self._forget()

    @property
    def closed(self) -> bool:
        return self._closed

    # ------------------------------------------------------------ what is done to it

    @property
    def lives(self) -> bool:
        return not self._reason and not self._closed

    @property
    def hangs(self) -> bool:
        return self._hangs_since is not None

    def kill(self, reason: str) -> None:
        """It ends now; what it said last may never have been written."""
        self._advance()
        if self.lives:
            if self._said and self._dice.random() < 0.3:
                cut = self._dice.randrange(len(self._said))
                lost = [frame for frame in self._said[cut:] if isinstance(frame, Frame)]
                del self._said[cut:]
                self._had.update(answer.key for frame in lost for answer in frame.finished)
            self._die(reason)

    def hang(self, for_good: bool = False) -> None:
        """It does nothing any more, and reads nothing, until `go_on`."""
        self._advance()
        if self.lives and self._hangs_since is None:
            self._hangs_since = self._clock()
            self.for_good = for_good

    def stall(self) -> bool:
        """One of what it runs makes no step any more, while the rest does. False if it runs nothing."""
        self._advance()
        if not self._running or self._stalls_since is not None:
            return False
        self._dice.choice(list(self._running.values())).ends_s = math.inf
        self._stalls_since = self._clock()
        return True

    def go_on(self) -> None:
        """Everything comes later by as long as it hung."""
        if self._hangs_since is None or not self.lives:
            return
        lost_s = self._clock() - self._hangs_since
        self._hangs_since = None
        self._loads_s += lost_s
        self._stats_s += lost_s
        self._dies_s += lost_s
        for running in self._running.values():
            running.ends_s += lost_s
        asked, self._asked = self._asked, []
        for do in asked:
            do()
        self._plan()

    # ------------------------------------------------------------ its life

    def _ask(self, do: Callable[[], None]) -> None:
        self._advance()
        if not self.lives:
            return
        if self._hangs_since is not None:
            self._asked.append(do)
            return
        do()
        self._plan()

    def next_s(self) -> float:
        """When something will happen in it by itself."""
        if not self.lives or self._hangs_since is not None:
            return math.inf
        if not self._loaded:
            return self._loads_s
        ends_s = min((running.ends_s for running in self._running.values()), default=math.inf)
        return min(ends_s, self._stats_s, self._dies_s)

    def _plan(self) -> None:
        at_s = self._clock() if self._said else self.next_s()
        if at_s < math.inf:
            self._stir(at_s)

    def _advance(self) -> None:
        now_s = self._clock()
        happened = False
        while (at_s := self.next_s()) <= now_s:
            happened = True
            self._happen(at_s)
        if happened:
            self._plan()

    def _happen(self, at_s: float) -> None:
        if not self._loaded:
            self._load(at_s)
        elif at_s == self._dies_s:
            self._die("it was killed by signal 11")
        elif at_s == self._stats_s:
            self._tell_stats()
            self._stats_s = at_s + STATS_S
        else:
            self._finish(at_s)

    def _load(self, at_s: float) -> None:
        temper = self.temper
        if temper.fails_loading:
            self._said.append(EngineFailed(reason="no memory is left on the device"))
            self._reason = "it ended with status 1"
            return
        self._loaded = True
        self._stats_s = at_s + STATS_S
        self._said.append(
            EngineLoaded(
                load_s=temper.load_s, vocab_tokens=1, train_ctx_tokens=1, slots=temper.slots, model_desc="simulated",
                model_bytes=0, backend="none", chat_template=False,
            )
        )  # fmt: skip
        self._fill_slots(at_s)

    def _take(self, jobs: list[Job]) -> None:
        now_s = self._clock()
        self._queue.extend((job, now_s) for job in jobs)
        if self._loaded:
            self._fill_slots(now_s)

    def _fill_slots(self, now_s: float) -> None:
        started = []
        while self._queue and len(self._running) < self.temper.slots:
            job, received_s = self._queue.popleft()
            prompt = prompt_of(job)
            limit = job.request.sampling.max_tokens
            text, tokens = answer_text(job.seed, prompt, self.temper.max_tokens if limit is None else limit)
            token_s = self.temper.token_s * self.slowness
            deadly = POISON in prompt
            takes_s = math.inf if deadly else token_s * (tokens + 1)
            self._running[job.key] = Running(
                job, received_s, now_s, now_s + takes_s, now_s + token_s, text, tokens
            )  # fmt: skip
            started.append(job.key)
            if deadly:
                self._dies_s = min(self._dies_s, now_s + POISON_S)
        if started:
            self._said.append(Frame(started=started))

    def _finish(self, at_s: float) -> None:
        keys = [key for key, running in self._running.items() if running.ends_s <= at_s]
        self._said.append(Frame(finished=[self._answer(self._running.pop(key), at_s, "stop") for key in keys]))
        self._fill_slots(at_s)

    def _answer(self, running: Running, at_s: float, why: str) -> Answer:
        job, self._steps = running.job, self._steps + running.tokens
        self._had.discard(job.key)
        prompt = prompt_of(job)
        queue_s, e2e_s = running.started_s - running.received_s, at_s - running.received_s
        prompt_tokens = 1 + len(prompt) // 4
        if REFUSED_BY_ENGINE in prompt:
            return Answer(job.key, [], prompt_tokens, 0, queue_s, 0.0, e2e_s, "the engine cannot run this")
        choices = [Choice(running.text, why, running.tokens)]
        ttft_s = min(running.first_s, at_s) - running.received_s
        return Answer(job.key, choices, prompt_tokens, running.tokens, queue_s, ttft_s, e2e_s)

    def _give_back(self, recall_id: int, asked: set[int]) -> None:
        returned = [job.key for job, _ in self._queue if job.key in asked]
        self._had.difference_update(returned)
        self._queue = deque((job, at_s) for job, at_s in self._queue if job.key not in asked)
        self._said.append(Returned(recall_id, returned))

    def _cancel(self, asked: set[int]) -> None:
        now_s = self._clock()
        answers = [
            self._answer(self._running.pop(key), now_s, "cancelled") for key in sorted(asked & self._running.keys())
        ]
        for job, received_s in [entry for entry in self._queue if entry[0].key in asked]:
            answers.append(self._answer(Running(job, received_s, now_s, now_s, now_s, "", 0), now_s, "cancelled"))
        self._queue = deque(entry for entry in self._queue if entry[0].key not in asked)
        self._said.append(Frame(finished=answers))
        self._fill_slots(now_s)

    def _tell_stats(self) -> None:
        tokens, self._told_tokens = self._steps - self._told_tokens, self._steps
        if tokens or self._running:
            self._said.append(
                Stats(
                    interval_s=STATS_S, steps=1 + tokens, prompt_tokens=0, output_tokens=tokens, busy_s=0.0, slot_s=0.0,
                    decode_s=0.0, sample_s=0.0, itl_buckets=[7], itl_counts=[tokens],
                    stalled_s=0.0 if self._stalls_since is None else self._clock() - self._stalls_since,
                )
            )  # fmt: skip

    def _forget(self) -> None:
        self._queue.clear()
        self._running.clear()
        self._had.clear()

    def _die(self, reason: str) -> None:
        self._reason = reason
        self._deaths.counts.update(self._had)
        self._forget()
        self._stir(self._clock())
