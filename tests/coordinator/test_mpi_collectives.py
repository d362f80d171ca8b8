"""How long collectives over MPI are waited for, on a clock that the test moves and an MPI whose calls take a while."""

# ruff: noqa: N802 - the names are MPI's

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator import mpi_collectives
from coordinator.mpi_collectives import Collectives
from scheduling.errors import RankLostError
from tests.coordinator.fakes import FakeClock


class FakeComm:
    """Each barrier ends `takes_s` after it has begun."""

    def __init__(self, clock: FakeClock, takes_s: float) -> None:
        self._clock, self._takes_s = clock, takes_s

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 2

    def Get_group(self) -> None:
        return None

    def Shrink(self) -> FakeComm:
        time.sleep(self._takes_s)
        return self

    def Set_errhandler(self, handler: Any) -> None:
        """Errors come back as exceptions."""

    def Ibarrier(self) -> Any:
        ends_s = self._clock() + self._takes_s
        return SimpleNamespace(Test=lambda: self._clock() >= ends_s)


def made(
    patch: pytest.MonkeyPatch, takes_s: float, patience_s: float, in_all_s: float
) -> tuple[Collectives, FakeClock]:
    clock = FakeClock(0.0)
    patch.setattr(mpi_collectives, "time", SimpleNamespace(monotonic=clock))
    comm = FakeComm(clock, takes_s)
    group = SimpleNamespace(Translate_ranks=lambda group, places, everyone: places)
    MPI = SimpleNamespace(Group=group, Exception=ArithmeticError, ERRORS_RETURN=None)
    world: Any = SimpleNamespace(MPI=MPI, collectives_comm=comm, messages_comm=comm, unfinished=[], fault_tolerant=True)
    return Collectives(world, patience_s, lambda: clock.pass_(0.01), in_all_s), clock


def barriers(patch: pytest.MonkeyPatch, takes_s: float, patience_s: float, in_all_s: float) -> tuple[int, float]:
    """How many of ten end, and how long all of it takes."""
    collectives, clock = made(patch, takes_s, patience_s, in_all_s)
    for done in range(10):
        try:
            collectives.barrier()
        except RankLostError:
            return done, clock()
    return 10, clock()


def test_each_collective_has_its_patience_and_together_they_have_what_is_given_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for takes_s, in_all_s, (done, after_s) in [
        (0.4, math.inf, (10, 4.0)),
        (1.4, math.inf, (0, 1.0)),
        (0.4, 1.5, (3, 1.5)),
        (1.4, 1.5, (0, 1.0)),
    ]:
        assert barriers(monkeypatch, takes_s, 1.0, in_all_s) == pytest.approx((done, after_s), abs=0.2)


def test_ranks_that_are_left_may_come_together_though_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: list[int] = []
    monkeypatch.setattr(Collectives, "_give_up", lambda self: given_up.append(1))
    collectives, _ = made(monkeypatch, 0.05, 1.0, 0.0)
    collectives.shrink()
    assert not given_up
    assert collectives.ranks == (0, 1)
