"""Workers, a reader and a record that exist only as books, driven at random against the real control plane.

`World(scenario).run()` plays one whole run: messages of a worker arrive in order, those of different workers in any
order; requests start, finish, fail; recalls are confirmed late; engines and workers die and come back; messages
arrive twice; records become durable late; then faults stop and everything has to end. `Oracle` judges every event.
The same scenario always plays the same way. `World.story` is what happened, for the reader of a failure.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from scheduling.control import ControlPlane, Limits
from scheduling.errors import BugError, ProtocolError
from scheduling.events import (
    Assign,
    Cancel,
    Committed,
    DrainRequested,
    EngineLost,
    Event,
    Heard,
    InputEnded,
    NewRequest,
    Recall,
    RecallConfirmed,
    Reported,
    RequestRejected,
    RequestsArrived,
    Tick,
    TimeLimited,
    WorkerLost,
    WorkerReady,
)
from scheduling.ledger import WorkerState
from scheduling.messages import Finished
from tests.scheduling.oracle import Oracle


def answer(index: int, attempt: int = 1, ok: bool = True, output_tokens: int = 5) -> Finished:
    return Finished(index, attempt, ok, 3, output_tokens, b"")


def frozen(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """All that can be reached from `value`, as nested tuples that compare by content. `inside`: ids of where it is."""
    if id(value) in inside:
        return "..."
    if value is None or isinstance(value, (int, float, str, bytes, Enum)):
        return value
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    inside = (*inside, id(value))
    if isinstance(value, dict):
        return tuple((frozen(key, inside), frozen(item, inside)) for key, item in value.items())
    if isinstance(value, (list, tuple, deque)):
        return tuple(frozen(item, inside) for item in value)
    if is_dataclass(value):
        return tuple(frozen(getattr(value, field.name), inside) for field in fields(value))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*slots, *getattr(value, "__dict__", ())]
    return (type(value).__name__, *((name, frozen(getattr(value, name), inside)) for name in names))


def refused(plane: ControlPlane, event: Event, now: float = 0.0) -> str:
    """Why the plane refuses the event. Fails if it does not, or if the refusal changes anything."""
    before = frozen(plane)
    try:
        plane.handle(event, now)
    except ProtocolError as error:
        assert frozen(plane) == before, f"{event} was refused, but has changed something"
        return str(error)
    raise AssertionError(f"{event} was not refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What one `World` plays. `slots` are given to the workers in turn."""

    seed: int
    schedule: str = "work-stealing"
    workers: int = 3
    slots: tuple[int, ...] = (1, 2)
    requests: int = 20
    prefetch: int | None = None
    faults: bool = True
    drain: bool = False
    copies: bool = True
    eager: bool = False
    """What runs is copied whether or not that would help."""
    killers: tuple[int, ...] = ()
    """Requests that kill every engine: those with even numbers while they run, the others when they are handed over."""
    limit: bool = False
    steps: int = 250
    last_steps: int = 0
    """With a reader that does not tarry: what follows the input's end happens, too."""


def scenario_of(seed: int) -> Scenario:
    """A scenario of any kind, from a seed alone."""
    rng = random.Random(seed)
    straggles = rng.random() < 0.4
    return Scenario(
        seed=seed,
        schedule="round-robin" if rng.random() < 0.25 and not straggles else "work-stealing",
        workers=rng.randint(2, 3) if straggles else rng.randint(1, 5),
        slots=tuple(rng.choices([1, 2, 3, 5], k=3)),
        requests=rng.randint(3, 10) if straggles else rng.randint(0, 40),
        prefetch=rng.choice([None, 0, 1, 4, 8]),
        faults=rng.random() < 0.8,
        drain=rng.random() < 0.2,
        eager=straggles,
        steps=30 if straggles else 250,
        last_steps=600 if straggles else 0,
        killers=tuple(rng.sample(range(40), rng.choice([0, 0, 1, 2]))),
        limit=rng.random() < 0.25,
    )


class FakeWorker:
    """A worker rank: what it holds, and its two channels. `alive` False: the process is dead.

    As in a real one `generation` counts its engines: rank 0 stamps what it assigns with the generation that said
    'ready', and a worker drops what was meant for another. Each entry of a channel goes with such a number.
    """

    def __init__(self, worker: int, slots: int) -> None:
        self.id = worker
        self.slots = slots
        self.generation = 0
        self.slowness = 1
        """It finishes something in one of so many rounds."""
        self.outbox: deque[tuple[Event, int]] = deque()
        self.inbox: deque[tuple[Assign | Recall | Cancel, int]] = deque()
        self.start_process()

    def start_process(self) -> None:
        """A new process, in the place of a dead one: nothing is left of that."""
        self.alive = True
        self.engine_up = False
        self.engine_dead = False
        self.held: dict[int, int] = {}
        self.running: dict[int, int] = {}
        self.recalls: deque[tuple[int, list[int]]] = deque()
        self.started: list[tuple[int, int]] = []
        self.finished: list[Finished] = []
        self.tokens = 0.0
        self.outbox.clear()
        self.inbox.clear()

    def say(self, event: Event) -> None:
        self.outbox.append((event, self.generation))

    def load(self) -> None:
        if self.alive and not self.engine_up and not self.engine_dead:
            self.engine_up = True
            self.generation += 1
            self.say(WorkerReady(self.id, self.slots))

    def receive(self) -> None:
        """Take one message from rank 0."""
        if not self.inbox or not self.alive:
            return
        message, generation = self.inbox.popleft()
        if isinstance(message, Recall):
            self.recalls.append((message.recall, [index for index in message.indexes if index in self.held]))
        elif isinstance(message, Cancel):
            self.cancel(message.items)
        elif self.engine_up and generation == self.generation:
            for index, attempt in message.items:
                assert index not in self.held.keys() | self.running.keys(), f"request {index} came twice"
                self.held[index] = attempt

    def start(self) -> None:
        """Fill free slots, oldest first."""
        while self.alive and self.engine_up and self.held and len(self.running) < self.slots:
            index = next(iter(self.held))
            self.running[index] = self.held.pop(index)
            self.started.append((index, self.running[index]))

    def finish(self, index: int, ok: bool) -> None:
        self.finished.append(answer(index, self.running.pop(index), ok, 5 + index * 37 % 250))

    def cancel(self, items: list[tuple[int, int]]) -> None:
        """Stop these. A real worker is told their indexes alone, so it must not have them in another attempt."""
        for index, attempt in items:
            if index in self.held:
                self.running[index] = self.held.pop(index)
            if index in self.running:
                assert self.running[index] == attempt, f"attempt {self.running[index]} of {index} is cancelled instead"
                self.finish(index, ok=True)

    def pass_time(self, elapsed_s: float) -> None:
        if self.alive:
            self.tokens += len(self.running) * 2000.0 / self.slowness * elapsed_s

    def confirm(self) -> None:
        """Answer the oldest recall with what has not started."""
        if self.alive and self.recalls:
            recall, indexes = self.recalls.popleft()
            self.say(RecallConfirmed(self.id, recall, [i for i in indexes if self.held.pop(i, None) is not None]))

    def report(self) -> None:
        made = int(self.tokens)
        if self.alive and (self.started or self.finished or made):
            self.say(Reported(self.id, self.started, self.finished, [], made))
            self.started, self.finished = [], []
            self.tokens -= made

    def lose_engine(self, restarting: bool, report_first: bool) -> None:
        """`report_first` False: what it knew of its requests comes after the bad news, and is late."""
        if report_first:
            self.report()
        started, unstarted = list(self.running.items()), list(self.held.items())
        self.say(EngineLost(self.id, "segmentation fault", started, unstarted, restarting))
        self.report()
        self.running.clear()
        self.held.clear()
        self.recalls = deque((recall, []) for recall, _ in self.recalls)
        self.engine_up, self.engine_dead = False, not restarting


class World:
    """Everything around a control plane. See the module's text."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.now = 0.0
        self.story: deque[str] = deque(maxlen=80)
        ids = list(range(1, scenario.workers + 1))
        self.limits = Limits(
            prefetch=scenario.prefetch, prefetch_max=8, lease_s=60.0, deaths=2, copies=scenario.copies,
            copy_gain_s=-1e9 if scenario.eager else 0.05, copy_gain_share=-1e9 if scenario.eager else 0.2,
            copy_interval_s=0.03,
        )  # fmt: skip
        self.oracle = Oracle(ids, scenario.schedule, self.limits)
        self.workers = {i: FakeWorker(i, scenario.slots[i % len(scenario.slots)]) for i in ids}
        for worker in self.workers.values():
            worker.slowness = self.rng.choice([1, 1, 4, 12])
        self.haste = [self.rng.random() ** 2 + 0.05 for _ in ids]
        self.generations: dict[int, int] = {}
        self.delivered: list[Event] = []
        self.next_index = 0
        self.rejected: set[int] = set()
        self.asked = 0
        self.rounds = 0

    def run(self) -> Oracle:
        """Play it to its end. Raises AssertionError, with the story, if anything is wrong."""
        try:
            for _ in range(self.scenario.steps):
                self.step()
            for _ in range(self.scenario.last_steps):
                if self.oracle.stops:
                    break
                self.read()
                self.step()
            self.settle()
        except (AssertionError, BugError, ProtocolError, KeyError, ValueError) as error:
            story = "\n".join(line[:230] for line in list(self.story)[-40:])
            raise AssertionError(f"{type(error).__name__}: {error}\n{self.scenario}\n{story}") from error
        return self.oracle

    # ------------------------------------------------------------ random steps

    def step(self) -> None:
        """One thing happens somewhere."""
        self.elapse(0.01)
        [worker] = self.rng.choices(list(self.workers.values()), self.haste)
        dice = self.rng.random()
        if self.scenario.faults and self.oracle.copy and self.rng.random() < 0.1:
            self.strike()
        elif dice < 0.30:
            self.hear(worker)
        elif dice < 0.85:
            self.work(worker, dice)
        elif dice < 0.90:
            self.commit(self.rng.randint(0, 3))
        elif dice < 0.96 or not self.scenario.faults:
            self.read()
        else:
            self.fault(worker)
        if self.scenario.drain and self.rng.random() < 0.01:
            wait_s = self.rng.choice([None, 0.0, 0.3, 60.0])
            self.tell(DrainRequested("asked to", None if wait_s is None else self.now + wait_s))
        if self.scenario.limit and self.rng.random() < 0.02:
            self.tell(TimeLimited(self.now + self.rng.choice([0.1, 0.5, 1.0, 3.0]), "time is up"))

    def elapse(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        for worker in self.workers.values():
            worker.pass_time(elapsed_s)

    def work(self, worker: FakeWorker, dice: float) -> None:
        if dice < 0.45:
            self.receive(worker)
        elif dice < 0.55:
            worker.start()
        elif dice < 0.66 and worker.running and worker.alive and self.rng.random() < 2 / worker.slowness:
            index = self.rng.choice(list(worker.running))
            self.finish(worker, index, ok=self.rng.random() < 0.9)
        elif dice < 0.74:
            worker.report()
        elif dice < 0.80:
            worker.confirm()
        elif dice < 0.82 and worker.alive:
            self.tell(Heard(worker.id) if self.rng.random() < 0.5 else Tick())
        else:
            worker.load()

    def receive(self, worker: FakeWorker) -> None:
        worker.receive()
        if any(index % 2 and index in self.scenario.killers for index in worker.held):
            worker.lose_engine(True, report_first=True)

    def finish(self, worker: FakeWorker, index: int, ok: bool) -> None:
        if index in self.scenario.killers:
            worker.lose_engine(True, self.rng.random() < 0.7)
        else:
            worker.finish(index, ok)

    def fault(self, worker: FakeWorker) -> None:
        kind = self.rng.randrange(10)
        known = self.oracle.workers
        others = any(other.alive and known[other.id].state is not WorkerState.GONE
                     for other in self.workers.values() if other is not worker)  # fmt: skip
        if kind in (0, 1) and worker.alive and worker.engine_up:
            worker.lose_engine(not others or self.rng.random() < 0.8, self.rng.random() < 0.7)
        elif kind == 2 and (others or self.rng.random() < 0.1):
            # Its process died, or it has only been silent: then it goes on, and is late with all it says.
            worker.alive = worker.alive and self.rng.random() < 0.4
            self.tell(WorkerLost(worker.id, "silent"))
        elif kind == 3 and others:
            worker.alive = False
        elif kind in (4, 5) and not worker.alive:
            while worker.outbox and self.rng.random() < 0.7:
                self.hear(worker)
            if known[worker.id].state is WorkerState.GONE:
                worker.start_process()
        elif kind == 6:
            self.pass_time(self.rng.choice([2.0, 30.0, 61.0]))
        elif kind >= 7 and self.delivered:
            attempt = self.oracle.attempt
            stale = [each for each in self.delivered if isinstance(each, Reported)
                     and any(attempt[index] > number for index, number in each.started)]  # fmt: skip
            self.repeat(self.rng.choice(stale or self.delivered[-30:]))

    def strike(self) -> None:
        """A fault where something runs twice: at the copy, or at its original."""
        index, (copy, _) = self.rng.choice(list(self.oracle.copy.items()))
        worker = self.workers[self.rng.choice([copy, self.oracle.owner[index]])]
        if self.rng.random() < 0.3:
            self.tell(WorkerLost(worker.id, "silent"))
            worker.start_process()
        elif worker.alive and worker.engine_up:
            worker.lose_engine(True, self.rng.random() < 0.7)

    def pass_time(self, elapsed_s: float) -> None:
        """Those alive have sent heartbeats meanwhile, but for one now and then whose link is slow."""
        self.elapse(elapsed_s)
        for worker in self.workers.values():
            if worker.alive and self.rng.random() < 0.8:
                self.tell(Heard(worker.id))
        self.tell(Tick())

    def repeat(self, event: Event) -> None:
        """A message arrives again. Ends of engines and workers have no number: only while it means the same."""
        match event:
            case WorkerReady() if self.oracle.workers[event.worker].state is WorkerState.READY:
                self.story.append(f"again: {event}")
                assert "twice" in refused(self.oracle.plane, event, self.now)
            case WorkerReady():
                return
            case EngineLost() | WorkerLost() if self.oracle.workers[event.worker].state is WorkerState.READY:
                return
            case _:
                self.tell(event)

    # ------------------------------------------------------------ reader, record, channels

    def read(self) -> None:
        """The reader reads as much as was wanted a while ago, then asks anew."""
        for _ in range(self.rng.randint(0, self.asked)):
            self.read_line()
        left = self.scenario.requests - self.next_index
        if not left and not self.oracle.input_ended:
            self.tell(InputEnded())
        self.asked = min(left, self.oracle.plane.wanted())

    def read_line(self) -> None:
        index = self.next_index
        self.next_index += 1
        if self.rng.random() < 0.05:
            self.rejected.add(index)
            self.tell(RequestRejected(index, "no JSON"))
        else:
            self.tell(RequestsArrived([NewRequest(index, self.rng.randint(1, 50), self.rng.choice([None, 256]))]))

    def commit(self, count: int) -> None:
        count = min(count, len(self.oracle.unacknowledged))
        if count:
            self.tell(Committed(count))

    def hear(self, worker: FakeWorker) -> None:
        """Rank 0 receives one message of this worker."""
        if worker.outbox:
            event, generation = worker.outbox.popleft()
            if isinstance(event, WorkerReady):
                self.generations[worker.id] = generation
            self.tell(event)

    def tell(self, event: Event) -> None:
        """Give an event to the plane and put what it instructs into the workers' channels."""
        self.story.append(f"{self.now:.2f} {event}")
        out = self.oracle.handle(event, self.now)
        if isinstance(event, (Reported, RecallConfirmed, EngineLost, WorkerReady, WorkerLost, Heard)):
            self.delivered.append(event)
        for instruction in out:
            self.story.append(f"     -> {instruction}")
            if isinstance(instruction, (Assign, Recall, Cancel)):
                generation = self.generations[instruction.worker]
                self.workers[instruction.worker].inbox.append((instruction, generation))

    # ------------------------------------------------------------ the end

    def settle(self) -> None:
        """Without faults, and fairly: everything ends within a bounded number of rounds."""
        killers = len(self.scenario.killers)
        rounds = 12 * (40 + (8 + 8 * killers) * (self.scenario.requests + len(self.workers)))
        for _ in range(rounds):
            if self.oracle.stops:
                break
            self.round()
        assert self.oracle.stops, f"not over after {rounds} rounds without faults"
        if self.oracle.stops[0].outcome == "done":
            assert len(self.oracle.ended) == self.scenario.requests
        for worker in self.workers.values():  # what is still under way changes nothing any more
            while worker.inbox and worker.alive:
                worker.receive()
            worker.report()
            while worker.outbox:
                self.hear(worker)
            given_up = self.oracle.unfinished > 0  # they may be at it still
            if self.oracle.workers[worker.id].state is WorkerState.READY and worker.alive and not given_up:
                left = [*worker.held, *worker.running]
                assert not left, f"rank {worker.id} still has {left} when all is over"

    def round(self, finishes: int | None = None) -> None:
        """Everyone does everything there is to do, once; a worker finishes at most `finishes` requests."""
        self.elapse(0.01)
        self.rounds += 1
        if self.next_index < self.scenario.requests and self.oracle.plane.wanted():
            self.read_line()
        elif self.next_index == self.scenario.requests and not self.oracle.input_ended:
            self.tell(InputEnded())
        for worker in self.workers.values():
            worker.load()
            while worker.inbox and worker.alive:
                self.receive(worker)
            worker.start()
            worker.confirm()
            finishing = worker.alive and self.rounds % worker.slowness == 0
            for index in list(worker.running)[:finishes] if finishing else ():
                if index in worker.running:  # whose engine has not been killed by the one before
                    self.finish(worker, index, ok=True)
            worker.report()
            while worker.outbox:
                self.hear(worker)
            if not worker.alive:
                self.tell(WorkerLost(worker.id, "dead"))
        if self.scenario.drain or self.scenario.limit:
            self.tell(Tick())
        self.commit(len(self.oracle.unacknowledged))
