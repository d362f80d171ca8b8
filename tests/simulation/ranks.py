"""Worker ranks around the real worker, and what all ranks do together.

A `WorkerRank` is a process: it starts a little late, turns and sleeps as `coordinator.serve` does, can be stopped,
killed, or cut off. Its sleep ends early when an envelope arrives or its engine speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from coordinator.collect import COLLECTIVE_PATIENCE_S, Blocks, collect
from coordinator.serve import step
from scheduling.errors import RankLostError
from scheduling.link import Endpoint, Spoke
from tests.simulation.agenda import Agenda, Trace
from tests.simulation.engines import SimulatedEngine
from workers.worker import Worker

POLL_S = 0.2
"""How often a rank looks about while nothing happens that it could see."""

Rows = npt.NDArray[Any]


class RankDiedError(BaseException):
    """A worker rank has died in the middle of what it did."""


class WorkerRank:
    """See the module's text. `make` makes the worker on its link; `board` is where collectives meet."""

    def __init__(
        self, rank: int, agenda: Agenda, trace: Trace, dice: Random, endpoint: Endpoint, board: Board,
        make: Callable[[Spoke], Worker],
    ) -> None:  # fmt: skip
        self.rank = rank
        self.engine: SimulatedEngine | None = None
        self.worker: Worker | None = None
        self.alive = True
        self.ended = False
        """It has left in order."""
        self.dies_in_collective: Callable[[], None] | None = None
        self._agenda, self._trace, self._dice = agenda, trace, dice
        self._endpoint, self._board, self._make = endpoint, board, make
        self._stopped = False
        self._due_s = float("inf")
        agenda.after(dice.expovariate(5.0), self._start)

    def _start(self) -> None:
        if self.alive:
            self.worker = self._make(Spoke(self._endpoint))
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
        if self.worker is not None and self.alive and not self.ended and not self._stopped:
            self._turn(self.worker)

    def _turn(self, worker: Worker) -> None:
        busy = step(worker)
        if worker.collect_epoch is not None:
            worker.collect_epoch = None
            worker.close()
            try:
                collect(self._board.of(self.rank, self._must_live), [worker.metrics], self._agenda.now_s)
            except RankDiedError:
                return
        if worker.stopped:
            worker.close()
            self.ended = True
            self._trace.note(self._agenda.now_s, "rank ends", self.rank)
            return
        self.stir(self._agenda.now_s + (0.0 if busy else POLL_S * self._dice.random()))
        if self.engine is not None and (next_s := self.engine.next_s()) < float("inf"):
            self.stir(next_s)

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
        self._counts = dict.fromkeys(range(size), 0)

    def of(self, rank: int, before: Callable[[int], None] = lambda call: None) -> Collectives:
        return Collectives(self, rank, before)

    def give(self, rank: int, values: Rows) -> int:
        """Put down one rank's values of its next call, which others see a little later."""
        call = self._counts[rank]
        self._counts[rank] += 1

        def lay_down() -> None:
            self._calls.setdefault(call, {})[rank] = values
            self._arrived()

        if rank == 0:
            lay_down()
        else:
            self._agenda.after(self._dice.expovariate(200.0) * (1 + call), lay_down)
        return call

    def all_of(self, call: int) -> list[Rows] | None:
        """What all ranks have brought, by rank; None while some are missing."""
        there = self._calls.get(call, {})
        return [there[rank] for rank in range(self.size)] if len(there) == self.size else None


class Collectives:
    """One rank's `coordinator.collect.Collecting`. Only rank 0 waits for the others and is given the result."""

    def __init__(self, board: Board, rank: int, before: Callable[[int], None]) -> None:
        self.rank, self.size = rank, board.size
        self._board, self._before = board, before
        self._call = 0
        self.sleep: Callable[[float], None] | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.patience_s = COLLECTIVE_PATIENCE_S

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

    def _together(self, values: Rows, operation: Callable[[list[Rows]], Rows]) -> Rows:
        self._before(self._call)
        self._call += 1
        call = self._board.give(self.rank, np.array(values))
        if self.sleep is None:
            return values
        deadline_s = self.clock() + self.patience_s
        while (parts := self._board.all_of(call)) is None:
            if self.clock() > deadline_s:
                raise RankLostError(f"a collective did not end within {self.patience_s:.0f} s")
            self.sleep(5e-4)
        return operation(parts)


class SimulatedRanks:
    """`coordinator.world.Ranks` as rank 0 sees them."""

    rank = 0

    def __init__(
        self, endpoint: Endpoint, board: Board, sleep: Callable[[float], None], clock: Callable[[], float],
        abort: Callable[[int], NoReturn],
    ) -> None:  # fmt: skip
        self.size = board.size
        self._endpoint, self._board, self._sleep, self._clock, self._abort = endpoint, board, sleep, clock, abort

    def library(self) -> str:
        return "simulated ranks"

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S) -> Collectives:
        own = self._board.of(0)
        own.sleep, own.clock, own.patience_s = self._sleep, self._clock, patience_s
        return own

    def abort(self, code: int) -> NoReturn:
        self._abort(code)
