"""MPI's own end, and what carries the last exchange before it (`coordinator.farewell`).

Goodbyes go the way of envelopes: as late, held back by the same cut links, lost with who sent them. MPI's end is a
barrier: who has entered it leaves once all ranks have, or is ended by its watch. Nobody may enter it before every rank
has said that it is about to.
"""

# ruff: noqa: N802 - the names are MPI's

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.farewell import TAG
from coordinator.mpi import END_S
from tests.simulation.agenda import Agenda, ViolationError
from tests.simulation.network import Network


class Parting:
    """Of all ranks of a session. `hindered`: something keeps a rank from MPI's end after it has said goodbye."""

    def __init__(self, agenda: Agenda, network: Network, size: int, hindered: Callable[[], bool]) -> None:
        self.agenda, self.network, self.size = agenda, network, size
        self.said: set[int] = {0}
        """Who has said goodbye."""
        self._entered: set[int] = set()
        self._hindered = hindered

    def comm(self, rank: int) -> Comm:
        return Comm(self, rank)

    def enter(self, rank: int, end_s: float = END_S) -> Callable[[], bool]:
        """A rank enters MPI's end, which is given so long. Returns what tells whether it is through."""
        if missing := sorted(set(range(self.size)) - self.said):
            raise ViolationError(f"rank {rank} enters MPI's own end, rank {missing[0]} has not said goodbye")
        self._entered.add(rank)
        until_s, hindered = self.agenda.now_s + end_s, self._hindered()

        def through() -> bool:
            if len(self._entered) == self.size:
                return True
            if self.agenda.now_s >= until_s and not (hindered or self._hindered()):
                raise ViolationError(
                    f"MPI's own end does not come, {len(self._entered)} of {self.size} ranks are there"
                )
            return self.agenda.now_s >= until_s

        return through


@dataclass(frozen=True)
class Request:
    Test: Callable[[], bool]


class Comm:
    """As much of the module mpi4py.MPI, and of a communicator, as `Farewell` uses."""

    BYTE = "byte"

    class Exception(builtins.Exception):
        """A call of MPI has failed."""

    def __init__(self, parting: Parting, rank: int) -> None:
        self._parting, self._rank = parting, rank

    def Get_size(self) -> int:
        return self._parting.size

    def Isend(self, what: list[Any], dest: int, tag: int) -> Request:
        assert tag == TAG
        self._must_live(dest)
        if dest == 0:
            self._parting.said.add(self._rank)
        self._parting.network.post(self._rank, dest, bytes(what[0]), goodbye=True)
        return Request(lambda: True)

    def Irecv(self, into: list[Any], source: int, tag: int) -> Request:
        assert tag == TAG

        def come() -> bool:
            said = self._parting.network.goodbye(source, self._rank)
            if said is None:
                self._must_live(source)
                return False
            into[0][:] = said
            return True

        return Request(come)

    def _must_live(self, rank: int) -> None:
        if rank in self._parting.network.told():
            raise self.Exception(f"rank {rank} has died")
