"""Worker ranks around the real worker, and what all ranks do together.

A `WorkerRank` is a process: it starts a little late, turns and sleeps as `coordinator.serve` does, can be stopped,
killed, or cut off. Its sleep ends early when an envelope arrives or its engine speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from coordinator.collect import COLLECTIVE_PATIENCE_S, Blocks, collect
from coordinator.farewell import Farewell
from coordinator.relays import Branch
from coordinator.serve import step
from scheduling.errors import RankFailedError, RankLostError
from scheduling.link import Endpoint, Spoke
from tests.simulation.agenda import Agenda, Trace, ViolationError
from tests.simulation.engines import SimulatedEngine
from tests.simulation.network import SimulatedEndpoint
from tests.simulation.parting import Parting
from workers.worker import Worker

SILENT_S = 2.5
"""Heartbeats come every second."""
POLL_S = 0.2
"""How often a rank looks about while nothing happens that it could see."""
LIVELY_POLL_S = 0.02
"""The same of one that others may be waiting for."""

Rows = npt.NDArray[Any]


class RankDiedError(BaseException):
    """A worker rank has died in the middle of what it did."""


class WorkerRank:
    """See the module's text. `make` makes the worker on its link; `board` is where collectives meet."""

    def __init__(
        self, rank: int, agenda: Agenda, trace: Trace, dice: Random, endpoint: SimulatedEndpoint, board: Board,
        make: Callable[[Spoke], Worker], abort: Callable[[], None],
        branch: Callable[[Endpoint], Branch] | None, parting: Parting,
    ) -> None:  # fmt: skip
        self.rank = rank
        self._parting = parting
        self._farewell: Farewell | None = None
        self._through: Callable[[], bool] | None = None
        self._given_up_s = float("inf")
        self.at_goodbye: Callable[[], None] = lambda: None
        """Called when it is about to say goodbye."""
        self.branch: Branch | None = None
        self._make_branch = branch
        self._abort = abort
        self.engine: SimulatedEngine | None = None
        self.worker: Worker | None = None
        self.alive = True
        self.ended = False
        """It has left, through MPI's own end or without it."""
        self.dies_in_collective: Callable[[], None] | None = None
        self._agenda, self._trace, self._dice = agenda, trace, dice
        self._endpoint, self._board, self._make = endpoint, board, make
        self._stopped = False
        self._posts, self._posted_s = 0, agenda.now_s
        self._due_s = float("inf")
        agenda.after(dice.expovariate(5.0), self._start)

    def _start(self) -> None:
        if self.alive:
            self.branch = None if self._make_branch is None else self._make_branch(self._endpoint)
            self.worker = self._make(Spoke(self.branch or self._endpoint))
            self.stir(self._agenda.now_s)

    # ------------------------------------------------------------ turns

    def stir(self, at_s: float) -> None:
        """There is something to see at that time."""
        at_s = max(at_s, self._agenda.now_s) + 1e-4
        if at_s < self._due_s:
            self._due_s = at_s
            self._agenda.at(at_s, lambda: self._wake(at_s))

    def _wake(self, at_s: float) -> None:
        if at_s != self._due_s:
            return
        self._due_s = float("inf")
        if self.worker is None or not self.alive or self.ended or self._stopped:
            return
        if self._farewell is None:
            self._turn(self.worker)
        else:
            self._leave(self._farewell)

    def _turn(self, worker: Worker) -> None:
        busy = step(worker)
        self._judge_silence()
        if worker.collect_epoch is not None:
            worker.collect_epoch = None
            collectives = self._board.of(self.rank, self._must_live)
            try:
                collect(collectives, [worker.metrics], self._agenda.now_s, reduced=worker.reduced)
            except RankDiedError:
                return
            worker.on_collected()
        if (reason := worker.why_leave()) is not None and not worker.stopped:
            worker.close()
            self._trace.note(self._agenda.now_s, "rank", self.rank, "ends the job:", reason)
            self._abort()
            return
        if worker.stopped:
            worker.close()
            self._say_goodbye(worker)
            return
        if self.branch is not None:
            busy = self.branch.took_part() or busy
        lively = self.branch is not None and self.branch.lively
        pause_s = 0.0 if busy else LIVELY_POLL_S if lively else POLL_S
        self.stir(self._agenda.now_s + pause_s * self._dice.random())
        if self.engine is not None and (next_s := self.engine.next_s()) < float("inf"):
            self.stir(next_s)

    def _say_goodbye(self, worker: Worker) -> None:
        meet, self.at_goodbye = self.at_goodbye, lambda: None
        meet()
        if not self.alive or self._stopped:  # when it goes on it says so
            return
        comm = self._parting.comm(self.rank)
        self._farewell = Farewell(comm, comm)
        self._farewell.begin()
        if worker.silence_max_s is not None:
            self._given_up_s = self._agenda.now_s + worker.silence_max_s
        self.stir(self._agenda.now_s)

    def _leave(self, farewell: Farewell) -> None:
        """As `coordinator.mpi.World.leave` does it, without waiting."""
        if self._through is None:
            together = farewell.answered()
            if together:
                self._through = self._parting.enter(self.rank)
            elif together is None and self._agenda.now_s >= self._given_up_s:
                self._trace.note(self._agenda.now_s, "rank", self.rank, "ends the job: rank 0 does not leave")
                self._abort()
                return
            self.ended = together is False
        else:
            self.ended = self._through()
        if self.ended:
            self._trace.note(self._agenda.now_s, "rank ends", self.rank)
        else:
            self.stir(self._agenda.now_s + POLL_S * self._dice.random())

    def _judge_silence(self) -> None:
        """A rank that turns says something now and then."""
        now_s = self._agenda.now_s
        if self._endpoint.posts != self._posts:
            self._posts, self._posted_s = self._endpoint.posts, now_s
        elif now_s - self._posted_s > SILENT_S:
            raise ViolationError(f"rank {self.rank} lives and has said nothing for {now_s - self._posted_s:.1f} s")

    def _must_live(self, call: int) -> None:
        """Called before each part of a collective."""
        if self.dies_in_collective is not None and call == 1 + self.rank % 3:
            self.dies_in_collective()
            raise RankDiedError

    # ------------------------------------------------------------ what is done to it

    def stop(self) -> None:
        """As SIGSTOP does: its engine goes on."""
        self._stopped = True

    def go_on(self) -> None:
        self._stopped = False
        self.stir(self._agenda.now_s)

    def die(self) -> None:
        """As SIGKILL does; its engine ends with it."""
        self.alive = False


class Board:
    """Where what the ranks bring to collectives is put down: number of the call, rank, values."""

    def __init__(self, agenda: Agenda, dice: Random, size: int, arrived: Callable[[], None]) -> None:
        self.size = size
        self._agenda, self._dice, self._arrived = agenda, dice, arrived
        self._calls: dict[int, dict[int, Rows]] = {}
        self.gone: set[int] = set()
        """Ranks whose death MPI has told of."""

    def of(self, rank: int, before: Callable[[int], None] = lambda call: None) -> Collectives:
        return Collectives(self, rank, before)

    def give(self, rank: int, call: int, values: Rows) -> None:
        """Put down one rank's values of a call, which others see a little later."""

        def lay_down() -> None:
            self._calls.setdefault(call, {})[rank] = values
            self._arrived()

        if rank == 0:
            lay_down()
        else:
            self._agenda.after(self._dice.expovariate(200.0) * (1 + call), lay_down)

    def all_of(self, call: int, ranks: Sequence[int]) -> list[Rows] | None:
        """What these ranks have brought, in their order; None while some are missing."""
        there = self._calls.get(call, {})
        return [there[rank] for rank in ranks] if all(rank in there for rank in ranks) else None


class Collectives:
    """One rank's `coordinator.collect.Collecting`. Only rank 0 waits for the others and is given the result.

    A rank brings the same whenever the others begin again, so that only rank 0 has to.
    """

    def __init__(self, board: Board, rank: int, before: Callable[[int], None]) -> None:
        self.rank, self.size = rank, board.size
        self.ranks: Sequence[int] = range(board.size)
        self._board, self._before = board, before
        self._call = 0
        self.sleep: Callable[[float], None] | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.patience_s, self.until_s = COLLECTIVE_PATIENCE_S, math.inf

    def sum(self, values: Rows) -> Rows:
        return self._together(values, lambda parts: np.sum(parts, axis=0))

    def minimum(self, values: Rows) -> Rows:
        return self._together(values, lambda parts: np.min(parts, axis=0))

    def maximum(self, values: Rows) -> Rows:
        return self._together(values, lambda parts: np.max(parts, axis=0))

    def gather_rows(self, rows: Rows | Blocks, take: Callable[[Rows], None]) -> None:
        together = self._together(rows[:], np.concatenate)
        if self.rank == 0:
            take(together)

    def agree(self, well: bool) -> bool:
        return well

    def shrink(self) -> None:
        if self.rank == 0 and not self._board.gone:
            raise RankLostError("ranks were lost, and the others cannot go on")
        self.ranks = [rank for rank in self.ranks if rank not in self._board.gone]
        self._call = 0

    def _together(self, values: Rows, operation: Callable[[list[Rows]], Rows]) -> Rows:
        self._before(self._call)
        call = self._call
        self._call += 1
        self._board.give(self.rank, call, np.array(values))
        if self.sleep is None:
            return values
        deadline_s = min(self.clock() + self.patience_s, self.until_s)
        while (parts := self._board.all_of(call, self.ranks)) is None:
            if self._board.gone.intersection(self.ranks):
                raise RankFailedError("a rank has died")
            if self.clock() > deadline_s:
                raise RankLostError("a collective did not end in time")
            self.sleep(5e-4)
        return operation(parts)


class SimulatedRanks:
    """`coordinator.world.Ranks` as rank 0 sees them."""

    rank = 0

    def __init__(
        self, endpoint: Endpoint, board: Board, sleep: Callable[[float], None], clock: Callable[[], float],
        abort: Callable[[int], NoReturn], fence: Callable[[Sequence[int]], bool], fault_tolerant: bool,
        leaders: dict[int, int],
    ) -> None:  # fmt: skip
        self.size = board.size
        self.leaders = leaders
        self.fault_tolerant = fault_tolerant
        self._fence = fence
        self._endpoint, self._board, self._sleep, self._clock, self._abort = endpoint, board, sleep, clock, abort

    def library(self) -> str:
        return "simulated ranks"

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S, in_all_s: float = math.inf) -> Collectives:
        own = self._board.of(0)
        own.sleep, own.clock, own.patience_s = self._sleep, self._clock, patience_s
        own.until_s = self._clock() + in_all_s
        return own

    def fence(self, pids: Sequence[int]) -> bool:
        return self._fence(pids)

    def abort(self, code: int) -> NoReturn:
        self._abort(code)

    def die(self, code: int) -> NoReturn:
        self._abort(code)
