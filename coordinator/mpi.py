"""Everything that touches MPI: the world, the endpoint that carries envelopes, and the metrics collectives.

This is the only module of the product that imports mpi4py, and it imports it only when a world is opened, so that
`llmpi --help` starts no MPI. Messages travel as bytes in buffers, with non-blocking sends and matched probes; nothing
is pickled. Collectives run on a communicator of their own and are non-blocking too: a rank that waits sleeps.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from coordinator.collect import COLLECTIVE_PATIENCE_S, Blocks
from scheduling.errors import RankLostError

TAG = 7
GATHER_CHUNK_BYTES = 64 << 20


class World:
    """`coordinator.world.Ranks` over MPI, on communicators of our own.

    `messages` carries envelopes, `collectives` the metrics. Errors come back as exceptions instead of ending the
    job, so that a rank can say what happened before it leaves.
    """

    def __init__(self, thread_level: str = "funneled") -> None:
        import mpi4py

        mpi4py.rc.thread_level = thread_level
        from mpi4py import MPI

        self.MPI: Any = MPI
        world = MPI.COMM_WORLD
        world.Set_errhandler(MPI.ERRORS_RETURN)
        self.messages_comm = world.Dup()
        self.collectives_comm = world.Dup()
        for comm in (self.messages_comm, self.collectives_comm):
            comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = world.Get_rank()
        self.size: int = world.Get_size()

    def library(self) -> str:
        """The MPI library's own one-line description."""
        return str(self.MPI.Get_library_version()).strip("\x00 \n").splitlines()[0]

    def endpoint(self) -> MpiEndpoint:
        return MpiEndpoint(self)

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S) -> Collectives:
        return Collectives(self, patience_s=patience_s)

    def abort(self, code: int) -> NoReturn:
        """End all ranks now. Only for when some cannot be reached any more and everyone would wait for ever."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.MPI.COMM_WORLD.Abort(code)
        raise SystemExit(code)


class MpiEndpoint:
    """`scheduling.link.Endpoint` over MPI."""

    def __init__(self, world: World) -> None:
        self._MPI = world.MPI
        self._comm = world.messages_comm
        self._sends: deque[tuple[Any, bytes]] = deque()
        self._status = world.MPI.Status()

    def post(self, address: int, payload: bytes) -> None:
        try:
            request = self._comm.Isend([payload, len(payload), self._MPI.BYTE], dest=address, tag=TAG)
        except self._MPI.Exception as error:
            raise RankLostError(f"cannot send to rank {address}: {error}") from error
        self._sends.append((request, payload))  # the buffer must live until the send is through

    def receive(self) -> list[tuple[int, bytes | bytearray]]:
        self._progress()
        arrived: list[tuple[int, bytes | bytearray]] = []
        try:
            while (message := self._comm.Improbe(tag=TAG, status=self._status)) is not None:
                payload = bytearray(self._status.Get_count(self._MPI.BYTE))
                source = self._status.Get_source()
                message.Recv([payload, len(payload), self._MPI.BYTE])
                arrived.append((source, payload))
        except self._MPI.Exception as error:
            raise RankLostError(f"receiving failed: {error}") from error
        return arrived

    def unsent_bytes(self) -> int:
        self._progress()
        return sum(len(payload) for _, payload in self._sends)

    def _progress(self) -> None:
        # Sends to different ranks may complete out of order; one that lags only delays freeing those behind it.
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()


class Collectives:
    """Reductions and gathers to rank 0 over all ranks. Every rank must call the same ones in the same order.

    `idle` is called while waiting (rank 0 has nothing else to do; a worker keeps its engine's pipe empty).
    """

    def __init__(
        self,
        world: World,
        idle: Callable[[], None] = lambda: time.sleep(5e-4),
        patience_s: float = COLLECTIVE_PATIENCE_S,
    ) -> None:
        self._MPI = world.MPI
        self._comm = world.collectives_comm
        self._idle = idle
        self._patience_s = patience_s
        self.rank = world.rank
        self.size = world.size

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.SUM)

    def minimum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.MIN)

    def maximum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.MAX)

    def _reduce(self, values: npt.NDArray[Any], operation: Any) -> npt.NDArray[Any]:
        """Element by element over all ranks. The result is meaningful on rank 0 only."""
        result: npt.NDArray[Any] = np.zeros_like(values)
        self._finish(self._comm.Ireduce(values, result, op=operation, root=0))
        return result

    def gather_rows(self, rows: npt.NDArray[Any] | Blocks, take: Callable[[npt.NDArray[Any]], None]) -> None:
        """Send all ranks' `rows` (1-D, one record type everywhere) to rank 0, which is given them in chunks.

        At most 64 MiB arrive at rank 0 at once, whatever the number of ranks and rows.
        """
        width = rows.dtype.itemsize
        share = max(1, GATHER_CHUNK_BYTES // self.size // width)
        turns = np.array([-(-len(rows) // share)], np.int64)
        most = np.zeros_like(turns)
        self._finish(self._comm.Iallreduce(turns, most, op=self._MPI.MAX))
        for turn in range(int(most[0])):
            part = np.ascontiguousarray(rows[turn * share : (turn + 1) * share])
            counts = np.zeros(self.size, np.int64)
            self._finish(self._comm.Igather(np.array([part.nbytes], np.int64), counts, root=0))
            buffer = np.empty(int(counts.sum()), np.uint8)
            target = [buffer, counts.tolist(), self._MPI.BYTE] if self.rank == 0 else None
            self._finish(self._comm.Igatherv([part.view(np.uint8), part.nbytes, self._MPI.BYTE], target, root=0))
            if self.rank == 0:
                take(buffer.view(rows.dtype))

    def _finish(self, request: Any) -> None:
        deadline = time.monotonic() + self._patience_s
        try:
            while not request.Test():
                if time.monotonic() > deadline:
                    raise RankLostError(f"a collective did not end within {self._patience_s:.0f} s")
                self._idle()
        except self._MPI.Exception as error:
            raise RankLostError(f"a collective failed: {error}") from error


class SoloCollectives:
    """The same for a process that is alone and needs no MPI."""

    rank = 0
    size = 1

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.array(values)

    minimum = sum
    maximum = sum

    def gather_rows(self, rows: npt.NDArray[Any] | Blocks, take: Callable[[npt.NDArray[Any]], None]) -> None:
        share = max(1, GATHER_CHUNK_BYTES // rows.dtype.itemsize)
        for start in range(0, len(rows), share):
            take(rows[start : start + share])
