"""The world of MPI: how it is opened, divided, and left in order or not.

Of the product only this module imports mpi4py (the peer of `llmpi bench dispatch` aside), and only when a world is
opened, so that `llmpi --help` starts no MPI; others are handed the module. Messages, which are bytes in buffers and
never pickled, are `coordinator.mpi_endpoint`'s, reductions and gathers `coordinator.mpi_collectives`'.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from coordinator.collect import COLLECTIVE_PATIENCE_S
from coordinator.config import FANOUT
from coordinator.farewell import LEAVE_S, Farewell
from coordinator.launcher_end import GRACE_S, dismiss_guard, guard_launcher, is_sibling
from coordinator.mpi_collectives import Collectives
from coordinator.mpi_endpoint import MpiEndpoint
from coordinator.relays import leaders_of
from coordinator.watch import alarm_after
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, RankLostError

END_S = 60.0
"""For MPI's own end at most, which all ranks enter at about the same time. It takes a tenth of a second."""
TOGETHER_S = 120.0
"""How long the members of a part of the world may take to come together."""
GOODBYE_S = 70.0
"""How long a rank may take to leave once rank 0 does, unless somebody says otherwise."""
RANK0_S = 600.0
"""How long rank 0 may take to leave once another rank does, unless rank 0 has said otherwise."""
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
        self.rank0_silence_max_s = RANK0_S
        """How long another rank waits, when it leaves, for rank 0 to leave too."""
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

    def collectives(self, patience_s: float = COLLECTIVE_PATIENCE_S, in_all_s: float = math.inf) -> Collectives:
        return Collectives(self, patience_s=patience_s, in_all_s=in_all_s)

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
        farewell, end_s = Farewell(self.MPI, self.messages_comm), END_S
        if self.rank == 0:
            patience_s, began = self.goodbye_s(), time.monotonic()
            silent = farewell.hear(patience_s, () if self._endpoint is None else self._endpoint.lost())
            if silent:
                print(f"llmpi: no answer from rank {', '.join(map(str, silent))}: ending the job", file=sys.stderr)
                self.abort(code)
            in_order = farewell.dismiss()
            end_s = end_in(patience_s - (time.monotonic() - began))
        elif (told := farewell.say(self.rank0_silence_max_s)) is None:
            print(f"llmpi: rank {self.rank}: rank 0 does not leave: ending the job", file=sys.stderr)
            self.abort(EXIT_INFRASTRUCTURE)
        else:
            in_order = told
        if not in_order:
            time.sleep(LEAVE_S)
            os._exit(code)
        with self._watched(end_s):
            self.MPI.Finalize()
        return code

    @contextlib.contextmanager
    def _watched(self, end_s: float) -> Iterator[None]:
        """MPI's own end does not come where a rank stops or dies in it: after `end_s` an alarm ends this process, and
        the launcher does not outlive rank 0 by much."""
        guard = guard_launcher(end_s + GRACE_S) if self.rank == 0 else None
        with alarm_after(end_s):
            yield
        dismiss_guard(guard)

    def die(self, code: int) -> NoReturn:
        """Leave after an error of this rank's own. Where others survive that they are told of it, at once."""
        if not self.fault_tolerant:
            self.abort(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)  # of an exit without MPI's end the others would not hear
        raise SystemExit(code)


def end_in(left_s: float) -> float:
    """How long MPI's own end may take rank 0, of whose patience so much is left."""
    return min(END_S, max(LEAVE_S, left_s))


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
