"""`storage.staging.Group` and `storage.relay.Channel` over MPI: small exchanges among all ranks, pieces along a chain.

Pieces travel from neighbour to neighbour by non-blocking sends and receives with several in flight, not by
`MPI_Ibcast`: with few nodes Open MPI's sends from the root to each of them, so that the root's link carries a file as
often as there are nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from coordinator.mpi import World
from coordinator.transport import Backoff
from scheduling.errors import RankLostError

PIECE_TAG = 11
ANSWER_TAG = 12
IDLE_S = 1e-4


class MpiGroup:
    """All ranks of a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank = world.rank
        self.size = world.size

    def exchange(self, said: bytes, patience_s: float) -> list[bytes]:
        comm, MPI = self._world.collectives_comm, self._world.MPI
        sizes = np.zeros(self.size, np.int64)
        self._finish(comm.Iallgather(np.array([len(said)], np.int64), sizes), patience_s)
        everything = np.empty(int(sizes.sum()), np.uint8)
        counts = sizes.tolist()
        self._finish(comm.Iallgatherv([said, len(said), MPI.BYTE], [everything, counts, MPI.BYTE]), patience_s)
        ends = np.cumsum(sizes).tolist()
        return [everything[end - count : end].tobytes() for end, count in zip(ends, counts, strict=True)]

    def chain(self, ranks: Sequence[int]) -> MpiChannel:
        return MpiChannel(self._world, ranks)

    def _finish(self, request: Any, patience_s: float) -> None:
        deadline, backoff = time.monotonic() + patience_s, Backoff()
        try:
            while not request.Test():
                if time.monotonic() > deadline:
                    raise RankLostError(
                        f"not all ranks came to stage the model within {patience_s:.0f} s: look at their hosts, and at "
                        "what the launcher printed"
                    )
                time.sleep(backoff.next_s(in_flight=True))
        except self._world.MPI.Exception as error:
            raise RankLostError(f"staging the model failed: {error}") from error


class MpiChannel:
    """This rank's place among `ranks`, and its neighbours."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        self._MPI, self._comm = world.MPI, world.collectives_comm
        self.place, self.size = list(ranks).index(world.rank), len(ranks)
        self._before = ranks[self.place - 1] if self.place else -1
        self._next = ranks[self.place + 1] if self.place + 1 < self.size else -1
        self._heard = bytearray(1)
        self._hearing = self._receive(memoryview(self._heard), self._next, ANSWER_TAG) if self._next >= 0 else None

    def receive(self, buffer: memoryview) -> MpiTransfer:
        return self._receive(buffer, self._before, PIECE_TAG)

    def _receive(self, buffer: memoryview, source: int, tag: int) -> MpiTransfer:
        try:
            request = self._comm.Irecv([buffer, len(buffer), self._MPI.BYTE], source=source, tag=tag)
        except self._MPI.Exception as error:
            raise RankLostError(f"cannot receive from rank {source}: {error}") from error
        return MpiTransfer(self._MPI, request, source)

    def send(self, data: memoryview) -> MpiTransfer:
        return MpiTransfer(self._MPI, self._send(data, self._next, PIECE_TAG), self._next)

    def _send(self, data: memoryview, target: int, tag: int) -> Any:
        try:
            return self._comm.Isend([data, len(data), self._MPI.BYTE], dest=target, tag=tag)
        except self._MPI.Exception as error:
            raise RankLostError(f"cannot send to rank {target}: {error}") from error

    def answer(self, well: bool) -> None:
        # One byte is on its way at once: waiting for it is no waiting for the other one.
        try:
            self._send(memoryview(bytes([well])), self._before, ANSWER_TAG).Wait()
        except self._MPI.Exception as error:
            raise RankLostError(f"cannot send to rank {self._before}: {error}") from error

    def answered(self) -> bool | None:
        if self._hearing is None or self._hearing.poll() is None:
            return None
        return bool(self._heard[0])

    def idle(self) -> None:
        time.sleep(IDLE_S)


class MpiTransfer:
    """A message on its way. Its buffer lives as long as it does: mpi4py's request holds it."""

    def __init__(self, MPI: Any, request: Any, other: int) -> None:
        self._MPI, self._request, self._other = MPI, request, other
        self._status = MPI.Status()
        self._count: int | None = None

    def poll(self) -> int | None:
        if self._count is None:
            try:
                if self._request.Test(self._status):
                    self._count = int(self._status.Get_count(self._MPI.BYTE))
            except self._MPI.Exception as error:
                raise RankLostError(f"rank {self._other} cannot be reached: {error}") from error
        return self._count

    def cancel(self) -> None:
        if self._count is None:
            self._request.Cancel()
            self._request.Wait()
