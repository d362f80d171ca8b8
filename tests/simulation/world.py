"""One session of the job: all its ranks, from the moment they are started until the last of them has ended."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from unittest import mock

import msgspec

from coordinator import session as session_module
from coordinator.batchoptions import BatchOptions
from coordinator.config import JobConfig
from coordinator.farewell import LEAVE_S, Farewell
from coordinator.launch import detect
from coordinator.lead import Lead
from coordinator.mpi import END_S, end_in
from coordinator.relays import Branch
from coordinator.session import CLOSE_S
from coordinator.setup import Setup
from coordinator.signals import StopSignals
from coordinator.surroundings import Surroundings
from coordinator.timekeeper import GOODBYE_LEAST_S, StopOptions, Timekeeper
from scheduling import messages as m
from scheduling.errors import EngineError, LlmpiError
from scheduling.link import Endpoint, Spoke
from storage import record as record_module
from storage.staging import Staged
from tests.simulation.agenda import Agenda, Trace, ViolationError
from tests.simulation.disk import SimulatedDisk, Storage
from tests.simulation.engines import Deaths, SimulatedEngine, Temper
from tests.simulation.network import Network
from tests.simulation.oracles import Books, WatchedPlane, WatchedWriter
from tests.simulation.parting import Parting
from tests.simulation.rank0 import IDLE_S, Rank0, Rank0DiedError
from tests.simulation.ranks import Board, SimulatedRanks, WorkerRank
from tests.simulation.threads import InTurn, Threads
from tests.simulation.weather import Weather
from workers.port import Engine
from workers.worker import Worker, WorkerOptions

PID = 1000
TOLD_S = 0.5
"""How soon MPI tells of the death of a rank, at most."""
PUNCTUAL_S = 5 * IDLE_S
"""In this world each of rank 0's waits may take IDLE_S longer."""
ENDED_S = END_S + 30.0
"""How long the ranks have to end after rank 0 has returned: what may hold MPI's own end up is over by then."""


@dataclass(frozen=True)
class Shape:
    """What does not change from one session of a seed to the next."""

    seed: int
    size: int
    """Ranks started together; 1: no launcher."""
    setup: Setup
    input: Path
    run_dir: Path
    tempers: dict[int, Temper]
    launcher: str
    drain_timeout_s: float
    fault_tolerant: bool
    """The death of a rank is told to the others, and does not end the job."""
    leaders: dict[int, int]
    """Who carries for each worker; empty: all speak to rank 0 themselves."""

    @property
    def config(self) -> JobConfig:
        return self.setup.config


@dataclass(frozen=True)
class Ended:
    """How a session ended. `code` None: by the death of rank 0. `said`: what it printed."""

    code: int | None
    error: str
    said: str


class World:
    """See the module's text. `number` counts the sessions of the seed."""

    def __init__(
        self, shape: Shape, number: int, now_s: float, trace: Trace, weather: Weather, storage: Storage, books: Books
    ) -> None:
        self.shape, self.trace, self.weather = shape, trace, weather
        self.storage, self.books = storage, books
        self.agenda = Agenda(now_s)
        self.signals = StopSignals()
        self.calm = False
        self.deaths = Deaths()
        self.aborted: int | None = None
        self.asked_to_stop = False
        self._goodbye_at = -math.inf
        """When the goodbye began: a while is granted for it, however late it is."""
        self.lead: Lead | None = None
        self._number = number
        self._dice = self.dice("world")
        self.network = Network(self.agenda, trace, weather, self.dice("network"), self._arrived)
        self.board = Board(self.agenda, self.dice("board"), shape.size, self._stir_rank0)
        self.parting = Parting(self.agenda, self.network, shape.size, self._hindered)
        endpoint = self.network.endpoint(0)
        self.rank0 = Rank0(self.agenda, trace, 1e3 * self._dice.random())
        self.disk = SimulatedDisk(storage, self.rank0, self._completes)
        self.hosted: dict[int, SimulatedEngine] = {}
        self.workers: dict[int, WorkerRank] = {}
        for rank in range(1, shape.size):
            self.workers[rank] = WorkerRank(
                rank, self.agenda, trace, self.dice(f"rank {rank}"), self.network.endpoint(rank), self.board,
                partial(self._make_worker, rank), self.everyone_dies,
                partial(self._make_branch, rank) if shape.leaders else None, self.parting,
            )  # fmt: skip
        self._ranks = SimulatedRanks(
            endpoint, self.board, partial(self.rank0.sleep, []), self.rank0.clock, self._abort, self._fence,
            shape.fault_tolerant, shape.leaders,
        )  # fmt: skip
        if now_s >= weather.calm_at_s:
            self.calm_down()

    def dice(self, of: str) -> Random:
        """A stream of random numbers for one thing of this session."""
        return Random(f"{self.shape.seed} {self._number} {of}")

    def note(self, *what: object) -> None:
        self.trace.note(self.agenda.now_s, *what)

    def must_be_heard(self, rank: int) -> bool:
        calm_s = self.agenda.now_s - self.weather.calm_at_s
        return calm_s > self.shape.config.lease_s + 1.0 and (rank not in self.workers or self.workers[rank].alive)

    # ------------------------------------------------------------ who is woken

    def _arrived(self, rank: int) -> None:
        if rank in self.workers:
            self.workers[rank].stir(self.agenda.now_s)
        else:
            self._stir_rank0()

    def _stir_rank0(self) -> None:
        self.rank0.stir()

    def _stir(self, rank: int, at_s: float) -> None:
        """The engine of a rank will have something to say."""
        if rank in self.workers:
            self.workers[rank].stir(at_s)
        else:
            self.agenda.at(at_s, self._stir_rank0)

    # ------------------------------------------------------------ workers and engines

    def engines(self) -> dict[int, SimulatedEngine]:
        """Those that live now, by rank."""
        all_of_them = {rank: one.engine for rank, one in self.workers.items() if one.alive} | self.hosted
        return {rank: engine for rank, engine in sorted(all_of_them.items()) if engine is not None and engine.lives}

    def _make_branch(self, rank: int, endpoint: Endpoint) -> Branch:
        offset_s = 1e3 * self._dice.random()
        return Branch(
            endpoint, rank, self.shape.leaders, lambda: self.agenda.now_s + offset_s,
            self.shape.config.lease_s,
        )  # fmt: skip

    def _make_worker(
        self, rank: int, spoke: Spoke, clock: Callable[[], float] | None = None,
        wall_clock: Callable[[], float] | None = None,
    ) -> Worker:  # fmt: skip
        offset_s = 1e3 * self._dice.random()
        setup = self.shape.setup
        return Worker(
            spoke,
            WorkerOptions(
                rank=rank, hello=msgspec.structs.replace(setup.hello(), pid=PID + rank), model_name=setup.model_name,
                defaults=setup.config.sampling,
                engine_factory=partial(self._make_engine, rank),
                clock=clock or (lambda: self.agenda.now_s + offset_s), wall_clock=wall_clock or self.rank0.wall_clock,
                metrics_interval_s=setup.config.metrics_interval_s, engine_lease_s=setup.config.engine_lease_s,
                lease_s=setup.config.lease_s, request_timeout_s=setup.config.request_timeout_s,
                welcome_max_s=setup.config.welcome_max_s,
            ),
        )  # fmt: skip

    def _build_hosted(
        self, setup: Setup, rank: int, spoke: Spoke, log: Path | None, clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> Worker:  # fmt: skip
        return self._make_worker(rank, spoke, clock, wall_clock)

    def _make_engine(self, rank: int, placement: m.Placement) -> Engine:
        temper = self.shape.tempers[rank]
        if self._happens("engine refuses to start", 0.3):
            raise EngineError("the engine's process cannot be started")
        if self._happens("engine fails while it loads", 0.3):
            temper = Temper(
                slots=temper.slots, load_s=temper.load_s, token_s=temper.token_s, max_tokens=temper.max_tokens,
                fails_loading=True,
            )  # fmt: skip
        engine = SimulatedEngine(
            lambda: self.agenda.now_s, partial(self._stir, rank), self._dice, temper, self.deaths
        )  # fmt: skip
        if rank in self.workers:
            self.workers[rank].engine = engine
        else:
            self.hosted[rank] = engine
        return engine

    def _happens(self, kind: str, part: float) -> bool:
        """Whether a fault comes with what is done just now; where it does, it is counted."""
        if self.calm or self._dice.random() >= part * self.weather.chance(kind):
            return False
        self.trace.fault(self.agenda.now_s, kind)
        return True

    # ------------------------------------------------------------ ends

    def _completes(self) -> bool:
        """Whether this session has brought the run to its end: only then its metrics are looked at."""
        coordinator = None if self.lead is None else self.lead.session.coordinator
        return coordinator is not None and coordinator.outcome is not None and coordinator.outcome.outcome == "done"

    def _abort(self, code: int) -> NoReturn:
        self.aborted = code
        self.trace.note(self.agenda.now_s, "rank 0 ends all ranks", code)
        self.everyone_dies()
        raise Rank0DiedError

    def everyone_dies(self) -> None:
        """The launcher, or rank 0, ends the job."""
        self.rank0.die()
        self.network.die(0)
        for rank in self.workers:
            self.worker_dies(rank)

    def worker_dies(self, rank: int) -> None:
        """As SIGKILL does it to one rank; nobody is told."""
        if self.workers[rank].alive:
            self.workers[rank].die()
            self.network.die(rank)

    def death_is_told(self, rank: int) -> None:
        """MPI notices a dead rank a little later, when everything has come that will."""

        def tell() -> None:
            self.network.tell_death(rank)
            self.board.gone.add(rank)
            self.trace.note(self.agenda.now_s, "MPI tells of the death of rank", rank)
            self._stir_rank0()

        self.agenda.at(self.network.all_come_s(rank) + self._dice.uniform(0.0, TOLD_S), tell)

    def _fence(self, pids: Sequence[int]) -> bool:
        victims = [pid - PID for pid in pids if self.shape.fault_tolerant and self.workers[pid - PID].alive]
        for rank in victims:
            self.trace.note(self.agenda.now_s, "rank 0 kills rank", rank)
            self.worker_dies(rank)
            self.death_is_told(rank)
        return bool(victims)

    def calm_down(self) -> None:
        """From here on nothing goes wrong, and what can heal has healed."""
        self.calm = True
        self.trace.note(self.agenda.now_s, "calm")
        self.rank0.heal()
        self.rank0.go_on()
        self.network.calm()
        for engine in self.engines().values():
            if not engine.for_good:
                engine.go_on()
            engine.slowness = 1.0
        for worker in self.workers.values():
            worker.dies_in_collective = None
            worker.at_goodbye = lambda: None
            worker.go_on()

    # ------------------------------------------------------------ the session

    def run(self) -> Ended:
        """Rank 0 from its start to its end, then the others to theirs."""
        shape, rank0 = self.shape, self.rank0
        self.trace.note(self.agenda.now_s, "session", self._number, "of", shape.size, "ranks")
        variables = {"OMPI_COMM_WORLD_SIZE": str(shape.size), "OMPI_COMM_WORLD_RANK": "0"}
        if shape.launcher == "mpich":
            variables = {"PMI_SIZE": str(shape.size), "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}
        around = Surroundings(
            clock=rank0.clock, wall_clock=rank0.wall_clock, sleep=rank0.sleep, disk=self.disk, recorder=self._recorder,
            executor=partial(InTurn, self.agenda, rank0.stir),
        )  # fmt: skip
        limit_s = self._dice.uniform(2.0, 15.0) if self._happens("time limit", 1.0) else None
        stopping = StopOptions(drain_timeout_s=shape.drain_timeout_s, time_limit_s=limit_s)
        self.keeper = Timekeeper(stopping, self.signals, rank0.clock, rank0.wall_clock, environ={})
        options = BatchOptions(input=shape.input, output=shape.run_dir, stopping=stopping, quiet=True)
        code, failure, said = None, "", io.StringIO()
        with self._in_place(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                lead = self.lead = Lead(
                    shape.setup, options, detect(variables if shape.size > 1 else {}),
                    self._ranks if shape.size > 1 else None, Staged(), self.signals, around, self.keeper,
                )  # fmt: skip
                code = lead.run()
            except Rank0DiedError:
                code = self.aborted
            except LlmpiError as error:
                code, failure = error.exit_code, f"{type(error).__name__}: {error}"
            try:
                if not rank0.dead and shape.size > 1:
                    self._leave(code)
            except Rank0DiedError:
                code = self.aborted
            if self.aborted is not None or not rank0.dead:
                self._judge_time()
            if rank0.dead:
                code = self.aborted
            else:
                self._wait_for_all()
        self.trace.note(self.agenda.now_s, "session ends", code, failure.replace(str(shape.run_dir.parent), ""))
        return Ended(code, failure, said.getvalue())

    def _leave(self, code: int | None) -> None:
        """Rank 0's part in the end, as `coordinator.mpi.World.leave` does it."""
        assert code is not None
        rank0, comm = self.rank0, self.parting.comm(0)
        farewell = Farewell(comm, comm, rank0.clock, partial(rank0.sleep, []))
        patience_s, began = self.keeper.goodbye_s(self.shape.config.lease_s + CLOSE_S), rank0.clock()
        self._goodbye_at = began
        if silent := farewell.hear(patience_s, self.network.told()):
            self.note("no goodbye from rank", *silent)
            if heard := [rank for rank in silent if self.must_be_heard(rank)]:
                raise ViolationError(f"rank {heard[0]} has not ended though the job is over")
            self._abort(code)
        if farewell.dismiss():
            through = self.parting.enter(0, end_in(patience_s - (rank0.clock() - began)))
            while not through():
                rank0.sleep([], 0.1)

    def _hindered(self) -> bool:
        """Whether a rank may have been kept from MPI's own end after it had said goodbye."""
        return not self.calm or not all(worker.alive for worker in self.workers.values())

    def _recorder(self, *arguments: Any) -> WatchedWriter:
        self.books.record_opened()
        assert self.lead is not None
        self.books.deaths[self.lead.session.number] = self.deaths
        writer = WatchedWriter(*arguments)
        writer.books = self.books
        return writer

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """What the product takes from modules, in this session's place."""
        with (
            mock.patch.object(session_module, "ControlPlane", partial(WatchedPlane, self)),
            mock.patch.object(session_module, "build_worker", self._build_hosted),
            mock.patch.object(record_module, "threading", Threads(self.agenda, self.rank0.stir)),
        ):
            yield

    def _judge_time(self) -> None:
        """Where somebody has said until when, the job is gone by then, but for what held rank 0 up."""
        coordinator = None if self.lead is None else self.lead.session.coordinator
        outcome = None if coordinator is None else coordinator.outcome
        exit_by = self.keeper.exit_by
        if exit_by is None or (outcome is not None and outcome.outcome == "done"):
            return
        granted_s = max(exit_by, self._goodbye_at + GOODBYE_LEAST_S + LEAVE_S)
        late_s = self.rank0.clock() - granted_s - self.rank0.held_up_s
        if late_s > PUNCTUAL_S:
            raise ViolationError(f"the job ended {late_s:.1f} s later than it was to, {outcome}")

    def _wait_for_all(self) -> None:
        """Rank 0 has returned: every rank that it can reach ends, its engine closed."""
        until_s = self.agenda.now_s + ENDED_S
        reachable = [one for one in self.workers.values() if one.alive]
        while not all(one.ended or not one.alive for one in reachable) and self.agenda.next_s() <= until_s:
            self.agenda.step()
        for one in reachable:
            if not one.alive:
                continue
            if not one.ended and self.calm:
                raise ViolationError(f"rank {one.rank} has not ended though the job is over")
            if one.ended and one.engine is not None and not one.engine.closed:
                raise ViolationError(f"rank {one.rank} has ended and left its engine running")
        for rank, engine in self.hosted.items():
            if engine.lives:
                raise ViolationError(f"rank 0 has ended and left the engine of worker {rank} running")
