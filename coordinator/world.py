"""The ranks that were started together, as rank 0 and its workers see them. `coordinator.mpi.World` is the real one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn, Protocol

from coordinator.collect import COLLECTIVE_PATIENCE_S, Collecting
from scheduling.link import Endpoint


class Ranks(Protocol):
    """This process is number `rank` of `size`."""

    rank: int
    size: int
    leaders: dict[int, int]
    """The rank that carries for each worker (`coordinator.relays`); empty: all speak to rank 0 themselves."""
    fault_tolerant: bool
    """Whether the death of a rank is told to the others, which go on, instead of ending the job."""

    def library(self) -> str:
        """One line that names what carries the messages."""

    def endpoint(self) -> Endpoint:
        """Carries envelopes between any two ranks."""

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S, in_all_s: float = math.inf) -> Collecting:
        """What all ranks do together, in the same order on each. A rank that takes longer in one is taken for lost, and
        so are those that are missing when all of them have taken `in_all_s` from now."""

    def fence(self, pids: Sequence[int]) -> bool:
        """Kill those of these processes that are ranks on this host, where the others survive it; whether any was."""

    def abort(self, code: int) -> NoReturn:
        """End all ranks now."""

    def die(self, code: int) -> NoReturn:
        """End this rank because of an error of its own, and all others if they cannot go on without it."""
