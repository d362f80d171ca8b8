"""Reductions and gathers of all ranks to rank 0: `coordinator.collect.Collecting` over MPI, and for one process alone.

They run on a communicator of their own and are non-blocking: a rank that waits sleeps, and gives up on others that do
not come. With fault tolerance (ULFM: `mpirun --with-ft ulfm`) that communicator can be revoked and shrunk.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coordinator.collect import COLLECTIVE_PATIENCE_S, Blocks
from coordinator.launcher_end import guard_launcher
from scheduling.errors import EXIT_INFRASTRUCTURE, RankFailedError, RankLostError

if TYPE_CHECKING:
    from coordinator.mpi import World

GATHER_CHUNK_BYTES = 64 << 20
"""Most that arrives at rank 0 at once."""
SHRINK_LEAST_S = 1.0
"""For the ranks that are left to come together, however late it is: what waits in vain there ends its process."""


class Collectives:
    """Reductions and gathers to rank 0. Every rank must call the same ones in the same order.

    `idle` is called while waiting (rank 0 has nothing else to do; a worker keeps its engine's pipe empty).

    A rank whose collective fails because another has died revokes the communicator, so that all others fail too,
    wherever they are. Then all agree whether everyone got through; if not, those left shrink the communicator and may
    try again among themselves. `ranks` says who they are.
    """

    def __init__(
        self, world: World, patience_s: float = COLLECTIVE_PATIENCE_S,
        idle: Callable[[], None] = lambda: time.sleep(5e-4), in_all_s: float = math.inf,
    ) -> None:  # fmt: skip
        self._world = world
        self._MPI = world.MPI
        self._idle = idle
        self._patience_s = patience_s
        self._until = time.monotonic() + in_all_s
        self._use(world.collectives_comm)

    def _use(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        everyone = self._world.messages_comm.Get_group()
        places = list(range(self.size))
        self.ranks = tuple(self._MPI.Group.Translate_ranks(comm.Get_group(), places, everyone))

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.SUM)

    def minimum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.MIN)

    def maximum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._reduce(values, self._MPI.MAX)

    def _reduce(self, values: npt.NDArray[Any], operation: Any) -> npt.NDArray[Any]:
        """Element by element over all ranks. The result is meaningful on rank 0 only."""
        result: npt.NDArray[Any] = np.zeros_like(values)
        self._finish(lambda: self._comm.Ireduce(values, result, op=operation, root=0))
        return result

    def barrier(self) -> None:
        """Wait until every rank has come to this."""
        self._finish(self._comm.Ibarrier)

    def sum_everywhere(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """As `sum`, meaningful on every rank."""
        result: npt.NDArray[Any] = np.zeros_like(values)
        self._finish(lambda: self._comm.Iallreduce(values, result, op=self._MPI.SUM))
        return result

    def gather_rows(self, rows: npt.NDArray[Any] | Blocks, take: Callable[[npt.NDArray[Any]], None]) -> None:
        """Send all ranks' `rows` (1-D, one record type everywhere) to rank 0, which is given them in chunks.

        At most 64 MiB arrive at rank 0 at once, whatever the number of ranks and rows.
        """
        comm, byte = self._comm, self._MPI.BYTE
        width = rows.dtype.itemsize
        share = max(1, GATHER_CHUNK_BYTES // self.size // width)
        turns = np.array([-(-len(rows) // share)], np.int64)
        most = np.zeros_like(turns)
        self._finish(lambda: comm.Iallreduce(turns, most, op=self._MPI.MAX))
        for turn in range(int(most[0])):
            part = np.ascontiguousarray(rows[turn * share : (turn + 1) * share])
            size, counts = np.array([part.nbytes], np.int64), np.zeros(self.size, np.int64)
            self._finish(lambda: comm.Igather(size, counts, root=0))  # noqa: B023 - called at once
            buffer = np.empty(int(counts.sum()), np.uint8)
            source = [part.view(np.uint8), part.nbytes, byte]
            target = [buffer, counts.tolist(), byte] if self.rank == 0 else None
            self._finish(lambda: comm.Igatherv(source, target, root=0))  # noqa: B023 - called at once
            if self.rank == 0:
                take(buffer.view(rows.dtype))

    def agree(self, well: bool) -> bool:
        """Whether all ranks got through; True only if nobody has died. To be called by all, after success or failure.

        Raises:
            RankLostError: a rank says nothing.
        """
        if not self._world.fault_tolerant:
            return well
        if not well:
            with contextlib.suppress(self._MPI.Exception):  # another may have done it
                self._comm.Revoke()
        flag = np.array([int(well)], np.int32)
        try:
            self._finish(lambda: self._comm.Iagree(flag))
        except RankFailedError:
            return False  # told to all alike
        return bool(flag[0])

    def shrink(self) -> None:
        """Go on among the ranks that live. To be called by all of these.

        Raises:
            RankLostError: rank 0 is not among them, or a rank says nothing.
        """
        if not self._world.fault_tolerant:
            raise RankLostError("ranks were lost, and this MPI was not started so that others can go on")
        # The only call here that blocks: Open MPI's way to wait for it without does not work. All have just agreed,
        # so it takes milliseconds unless a rank stops here.
        watch = threading.Timer(max(SHRINK_LEAST_S, self._left_s()), self._give_up)
        watch.daemon = True
        watch.start()
        try:
            comm = self._comm.Shrink()
        except self._MPI.Exception as error:
            raise RankLostError(f"the ranks left could not come together: {error}") from error
        finally:
            watch.cancel()
        comm.Set_errhandler(self._MPI.ERRORS_RETURN)
        self._world.collectives_comm, self._world.reduced = comm, True
        self._use(comm)
        if 0 not in self.ranks:
            raise RankLostError("rank 0 is gone")

    def _left_s(self) -> float:
        """For the next collective."""
        return max(0.0, min(self._patience_s, self._until - time.monotonic()))

    def _give_up(self) -> None:
        print("llmpi: the ranks left did not come together in time", file=sys.stderr)
        guard_launcher()
        os._exit(EXIT_INFRASTRUCTURE)

    def _finish(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait for its end.

        Raises:
            RankFailedError: a rank has died. RankLostError: a rank says nothing, or MPI fails otherwise.
        """
        MPI = self._MPI
        left_s, request = self._left_s(), None
        deadline = time.monotonic() + left_s
        try:
            request = start()
            while not request.Test():
                if time.monotonic() > deadline:
                    raise RankLostError(f"a collective did not end within {left_s:.3g} s")
                self._idle()
        except (MPI.Exception, RankLostError) as error:
            self._world.unfinished.append((start, request))
            if isinstance(error, RankLostError):
                raise
            told = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
            kind = RankFailedError if error.Get_error_class() in told else RankLostError
            raise kind(f"a collective failed: {error}") from error


class SoloCollectives:
    """The same for a process that is alone and needs no MPI."""

    rank = 0
    size = 1
    ranks: tuple[int, ...] = (0,)

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.array(values)

    minimum = sum
    maximum = sum

    def gather_rows(self, rows: npt.NDArray[Any] | Blocks, take: Callable[[npt.NDArray[Any]], None]) -> None:
        share = max(1, GATHER_CHUNK_BYTES // rows.dtype.itemsize)
        for start in range(0, len(rows), share):
            take(rows[start : start + share])

    def agree(self, well: bool) -> bool:
        return well

    def shrink(self) -> None:
        raise RankLostError("one rank alone has nobody to lose")
