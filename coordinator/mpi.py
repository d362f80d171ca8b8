"""Everything that touches MPI: the world, and the metrics collectives. The endpoint is in `coordinator.mpi_endpoint`.

This is the only module of the product that imports mpi4py, and it imports it only when a world is opened, so that
`llmpi --help` starts no MPI. Messages travel as bytes in buffers, with non-blocking sends and matched probes; nothing
is pickled. Collectives run on a communicator of their own and are non-blocking too: a rank that waits sleeps.

With fault tolerance (ULFM: `mpirun --with-ft ulfm`) that communicator can be revoked and shrunk: see `Collectives`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from coordinator.collect import COLLECTIVE_PATIENCE_S, Blocks
from coordinator.config import FANOUT
from coordinator.farewell import LEAVE_S, Farewell
from coordinator.launcher_end import GRACE_S, guard_launcher, is_sibling
from coordinator.mpi_endpoint import MpiEndpoint
from coordinator.relays import leaders_of
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, RankFailedError, RankLostError

GATHER_CHUNK_BYTES = 64 << 20
END_S = 60.0
"""For MPI's own end, which all ranks enter at about the same time. It takes a tenth of a second."""
TOGETHER_S = 120.0
"""How long the members of a part of the world may take to come together."""
GOODBYE_S = 70.0
"""How long a rank may take to leave once rank 0 does, unless somebody says otherwise."""
OPENMPI_FT_KEYVAL = 12
"""MPI_FT of Open MPI's mpi.h, which mpi4py does not name: whether ranks may die without ending the job."""


class World:
    """`coordinator.world.Ranks` over MPI, on communicators of our own.

    `messages_comm` carries envelopes, `collectives_comm` the metrics. Errors come back as exceptions instead of ending
    the job, so that a rank can say what happened before it leaves. `leaders` is empty where no more ranks than rank 0's
    `fanout` were started (see `coordinator.relays`).
    """

    def __init__(self, thread_level: str = "funneled", fanout: int = FANOUT) -> None:
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
        self._fanout = fanout
        self.leaders = self._agree_on_leaders(fanout)
        self.fault_tolerant = _fault_tolerant(MPI)
        self.reduced = False
        """Whether the collectives go on without some ranks."""
        self.goodbye_s: Callable[[], float] = lambda: GOODBYE_S
        """How long rank 0 waits, when it leaves, for the others to leave too."""
        self._endpoint: MpiEndpoint | None = None
        self._left = False
        self.unfinished: list[Any] = []
        """Collectives that failed: MPI may still write to their buffers."""

    def _agree_on_leaders(self, fanout: int) -> dict[int, int]:
        """Who carries for whom: all ranks are told the same, whatever options each was started with."""
        comm = self.messages_comm
        most = np.array([fanout], np.int64)
        comm.Bcast(most, root=0)
        if self.size <= most[0]:
            return {}
        node = comm.Split_type(self.MPI.COMM_TYPE_SHARED)
        first, firsts = np.array([self.rank], np.int64), np.empty(self.size, np.int64)
        node.Bcast(first, root=0)  # the lowest rank of a host names it
        node.Free()
        comm.Allgather(first, firsts)
        workers = np.arange(1, self.size)
        return leaders_of([workers[firsts[1:] == host].tolist() for host in np.unique(firsts[1:])], int(most[0]))

    def library(self) -> str:
        """The MPI library's own one-line description."""
        return str(self.MPI.Get_library_version()).strip("\x00 \n").splitlines()[0]

    def endpoint(self) -> MpiEndpoint:
        self._endpoint = MpiEndpoint(self.MPI, self.messages_comm)
        return self._endpoint

    @property
    def messages(self) -> int:
        """Sent and received by this rank."""
        return 0 if self._endpoint is None else self._endpoint.messages

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S) -> Collectives:
        return Collectives(self, patience_s=patience_s)

    def among(self, members: Sequence[int], tag: int = 0) -> World:
        """These ranks alone, as a world of its own in which they are numbered in this order: other messages, other
        collectives. To be called by all of them, and by no other; `tag` tells calls apart that overlap. Only the whole
        world can be left.
        """
        part = copy.copy(self)
        part._endpoint, part.unfinished, part.reduced = None, [], False
        group = self.MPI.COMM_WORLD.Get_group().Incl(list(members))
        # It blocks, for milliseconds unless a member does not come.
        watch = threading.Timer(TOGETHER_S, self._not_together)
        watch.daemon = True
        watch.start()
        try:
            part.messages_comm = self.messages_comm.Create_group(group, tag)
            part.collectives_comm = part.messages_comm.Dup()
            part.rank, part.size = part.messages_comm.Get_rank(), part.messages_comm.Get_size()
            part.leaders = part._agree_on_leaders(self._fanout)
        except self.MPI.Exception as error:
            raise RankLostError(f"ranks {', '.join(map(str, members))} could not come together: {error}") from error
        finally:
            watch.cancel()
        for comm in (part.messages_comm, part.collectives_comm):
            comm.Set_errhandler(self.MPI.ERRORS_RETURN)
        return part

    def _not_together(self) -> None:
        print(
            f"llmpi: rank {self.rank}: other ranks did not come within {TOGETHER_S:.0f} s: it leaves", file=sys.stderr
        )
        guard_launcher()
        os._exit(EXIT_INFRASTRUCTURE)

    def fence(self, pids: Sequence[int]) -> bool:
        """Kill ranks of this host, so that MPI knows them to be gone. False where that would end the job, or for
        processes that are no ranks of this job."""
        if not self.fault_tolerant:
            return False
        killed = False
        for pid in filter(is_sibling, pids):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed = True
        return killed

    def abort(self, code: int) -> NoReturn:
        """End all ranks now. Only for when some cannot be reached any more and everyone would wait for ever.

        The launcher is given GRACE_S seconds to end by itself. With fault tolerance it takes a rank that aborts with
        0 for one that is done, and waits for the others: then the status is 4.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        guard_launcher()
        if self.fault_tolerant and code == EXIT_OK:
            code = EXIT_INFRASTRUCTURE
        leave = threading.Timer(GRACE_S, os._exit, [code])  # an abort waits for a launcher that may be unreachable
        leave.daemon = True
        leave.start()
        self.MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def leave(self, code: int) -> int:
        """The last call of every rank that ends by itself: MPI is ended, in order or not (`coordinator.farewell`).

        Gives `code` back, or ends the process with it where MPI's own end cannot be had.
        """
        if self._left or self.size == 1:
            return code
        self._left = True
        sys.stdout.flush()
        sys.stderr.flush()
        farewell = Farewell(self.MPI, self.messages_comm)
        if self.rank == 0:
            silent = farewell.hear(self.goodbye_s(), () if self._endpoint is None else self._endpoint.lost())
            if silent:
                print(f"llmpi: no answer from rank {', '.join(map(str, silent))}: ending the job", file=sys.stderr)
                self.abort(code)
            in_order = farewell.dismiss()
        else:
            in_order = farewell.say()
        if not in_order:
            time.sleep(LEAVE_S)
            os._exit(code)
        watch = threading.Timer(END_S, self._end_without, [code])
        watch.daemon = True
        watch.start()
        self.MPI.Finalize()
        watch.cancel()
        return code

    def _end_without(self, code: int) -> None:
        """MPI's own end does not come: a rank must have died in it."""
        guard_launcher()
        os._exit(code)

    def die(self, code: int) -> NoReturn:
        """Leave after an error of this rank's own. Where others survive that they are told of it, at once."""
        if not self.fault_tolerant:
            self.abort(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)  # of an exit without MPI's end the others would not hear
        raise SystemExit(code)


def library_facts() -> tuple[str, str, str]:
    """(MPI library in its own words, MPI standard, vendor), without starting MPI, where no world is to be opened.

    Raises ImportError, OSError or RuntimeError where there is none.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    library = str(MPI.Get_library_version()).strip("\x00 \n").splitlines()[0]
    return library, ".".join(map(str, MPI.Get_version())), str(MPI.get_vendor()[0])


def _fault_tolerant(MPI: Any) -> bool:
    if MPI.get_vendor()[0] != "Open MPI":
        return False
    try:
        address = MPI.COMM_WORLD.Get_attr(OPENMPI_FT_KEYVAL)
    except MPI.Exception:  # built without
        return False
    return bool(address) and bool(ctypes.c_int.from_address(address).value)


class Collectives:
    """Reductions and gathers to rank 0. Every rank must call the same ones in the same order.

    `idle` is called while waiting (rank 0 has nothing else to do; a worker keeps its engine's pipe empty).

    A rank whose collective fails because another has died revokes the communicator, so that all others fail too,
    wherever they are. Then all agree whether everyone got through; if not, those left shrink the communicator and may
    try again among themselves. `ranks` says who they are.
    """

    def __init__(
        self, world: World, patience_s: float = COLLECTIVE_PATIENCE_S,
        idle: Callable[[], None] = lambda: time.sleep(5e-4),
    ) -> None:  # fmt: skip
        self._world = world
        self._MPI = world.MPI
        self._idle = idle
        self._patience_s = patience_s
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
        watch = threading.Timer(self._patience_s, self._give_up)
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

    def _give_up(self) -> None:
        print(f"llmpi: the ranks left did not come together within {self._patience_s:.0f} s", file=sys.stderr)
        guard_launcher()
        os._exit(EXIT_INFRASTRUCTURE)

    def _finish(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait for its end.

        Raises:
            RankFailedError: a rank has died. RankLostError: a rank says nothing, or MPI fails otherwise.
        """
        MPI = self._MPI
        deadline = time.monotonic() + self._patience_s
        request = None
        try:
            request = start()
            while not request.Test():
                if time.monotonic() > deadline:
                    raise RankLostError(f"a collective did not end within {self._patience_s:.0f} s")
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
