"""The ranks that were started together, as rank 0 and its workers see them. `coordinator.mpi.World` is the real one."""

from __future__ import annotations

from typing import NoReturn, Protocol

from coordinator.collect import COLLECTIVE_PATIENCE_S, Collecting
from scheduling.link import Endpoint


class Ranks(Protocol):
    """This process is number `rank` of `size`."""

    rank: int
    size: int

    def library(self) -> str:
        """One line that names what carries the messages."""

    def endpoint(self) -> Endpoint:
        """Carries envelopes between any two ranks."""

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S) -> Collecting:
        """What all ranks do together, in the same order on each. A rank that takes longer is taken for lost."""

    def abort(self, code: int) -> NoReturn:
        """End all ranks now."""
