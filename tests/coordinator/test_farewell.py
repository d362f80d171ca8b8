"""The last exchange over a fake MPI: who is missing, who has died, and how the others are told to leave."""

# ruff: noqa: N802 - the names are MPI's

from __future__ import annotations

import builtins
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator import leaving
from coordinator.farewell import ALONE, LEAVE_S, TAG, TOGETHER, Farewell
from coordinator.mpi import END_S, World, end_in


class FakeMPI:
    """As much of the module mpi4py.MPI, and of a communicator of four ranks, as is used."""

    BYTE = "byte"

    class Exception(builtins.Exception):
        """A call of MPI has failed."""

    def __init__(self, *, silent: tuple[int, ...] = (), dead: tuple[int, ...] = (), answer: int = TOGETHER) -> None:
        self.silent, self.dead, self.answer = silent, dead, answer
        self.sent: list[tuple[int, bytes]] = []

    def Get_size(self) -> int:
        return 4

    def Isend(self, what: list[Any], dest: int, tag: int) -> FakeRequest:
        assert tag == TAG
        self.sent.append((dest, bytes(what[0])))
        return FakeRequest(lambda: self._reach(dest))

    def Irecv(self, into: list[Any], source: int, tag: int) -> FakeRequest:
        assert tag == TAG

        def come() -> bool:
            self._reach(source)
            into[0][0] = self.answer
            return source not in self.silent

        return FakeRequest(come)

    def _reach(self, rank: int) -> bool:
        if rank in self.dead:
            raise self.Exception(f"rank {rank} has died")
        return True


class FakeRequest:
    def __init__(self, test: Callable[[], bool]) -> None:
        self.Test = test


def test_when_all_have_said_goodbye_they_leave_through_mpis_own_end() -> None:
    mpi = FakeMPI()
    farewell = Farewell(mpi, mpi)
    assert farewell.hear(0.0) == []
    assert farewell.dismiss()
    assert mpi.sent == [(rank, bytes([TOGETHER])) for rank in (1, 2, 3)]


def test_a_rank_that_says_nothing_is_named() -> None:
    mpi = FakeMPI(silent=(2,))
    assert Farewell(mpi, mpi).hear(0.0) == [2]
    assert mpi.sent == [], "nobody leaves before the job is ended"


@pytest.mark.parametrize(("lost", "dead"), [((3,), ()), ((), (3,))], ids=["known before", "found now"])
def test_when_one_has_died_the_others_leave_without_mpis_own_end(lost: tuple[int, ...], dead: tuple[int, ...]) -> None:
    mpi = FakeMPI(dead=dead)
    farewell = Farewell(mpi, mpi)
    assert farewell.hear(0.0, lost) == []
    assert not farewell.dismiss()
    assert mpi.sent == [(rank, bytes([ALONE])) for rank in (1, 2)]


@pytest.mark.parametrize(("answer", "in_order"), [(TOGETHER, True), (ALONE, False)])
def test_a_worker_leaves_as_rank_0_says(answer: int, in_order: bool) -> None:
    mpi = FakeMPI(answer=answer)
    assert Farewell(mpi, mpi).say() is in_order
    assert mpi.sent == [(0, b"\0")]


def test_a_worker_waits_for_rank_0_for_as_long_as_it_is_told() -> None:
    now = [0.0]
    mpi = FakeMPI(silent=(0,))

    def sleep(delay_s: float) -> None:
        now[0] += delay_s

    assert Farewell(mpi, mpi, lambda: now[0], sleep).say(30.0) is None
    assert now[0] == pytest.approx(30.0, abs=0.5)


def test_a_worker_whose_rank_0_has_died_does_not_enter_mpis_own_end() -> None:
    mpi = FakeMPI(dead=(0,))
    assert not Farewell(mpi, mpi).say()


@pytest.mark.parametrize(("left_s", "end_s"), [(70.0, END_S), (5.0, 5.0), (-3.0, LEAVE_S)])
def test_mpis_own_end_has_what_is_left_of_rank_0s_patience(left_s: float, end_s: float) -> None:
    assert end_in(left_s) == end_s


def test_an_alarm_of_the_programs_own_is_given_back_after_mpis_end() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError("it came")

    handler, timer = signal.signal(signal.SIGALRM, own), signal.setitimer(signal.ITIMER_REAL, 1000.0, 7.0)
    try:
        with World._watched(cast(World, SimpleNamespace(rank=1)), 60.0):
            assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
            assert 50.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60.0
        assert signal.getsignal(signal.SIGALRM) is own
        left_s, every_s = signal.getitimer(signal.ITIMER_REAL)
        assert 900.0 < left_s <= 1000.0
        assert every_s == 7.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def test_what_was_registered_is_called_once_the_last_one_first() -> None:
    called: list[str] = []

    def end(name: str, code: int) -> int:
        called.append(name)
        return code

    leaving.at_last(lambda code: end("first", code))
    leaving.at_last(lambda code: end("second", code + 1))
    assert leaving.leave(2) == 3
    assert leaving.leave(2) == 2
    assert called == ["second", "first"]
