"""The last exchange of a job: all ranks say goodbye to rank 0, and it tells them how to leave.

MPI's own end is a barrier: it waits for ever for a rank that is stopped, and in Open MPI for one that has died. So it
is entered only when every rank has said that it is about to. If one has died the others leave without it; if one says
nothing rank 0 ends the job.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection
from typing import Any

from coordinator.transport import Backoff

TAG = 13
LEAVE_S = 1.0
"""For what was sent to others to leave."""
TOGETHER, ALONE = 1, 0
"""What rank 0 answers: through MPI's own end, or without it."""


class Farewell:
    """Over the communicator `comm` of the module `MPI`, on which nothing else has this tag."""

    def __init__(
        self, MPI: Any, comm: Any, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._MPI = MPI
        self._comm = comm
        self._clock = clock
        self._sleep = sleep
        self.dead: set[int] = set()
        """Ranks that were found to have died."""
        self._answer = bytearray([ALONE])
        self._waiting: list[Any] = []

    def say(self, patience_s: float = math.inf) -> bool | None:
        """A worker's part. Whether to leave through MPI's own end; not if rank 0 is gone. None: it says nothing."""
        self.begin()
        deadline, backoff = self._clock() + patience_s, Backoff()
        while (answer := self.answered()) is None and self._clock() < deadline:
            self._sleep(backoff.next_s(in_flight=False))
        return answer

    def begin(self) -> None:
        """The first half of `say`: rank 0 is told. `answered` is the other one."""
        try:
            self._waiting = [self._send(0, b"\0")]
            self._waiting.append(self._comm.Irecv([self._answer, 1, self._MPI.BYTE], source=0, tag=TAG))
        except self._MPI.Exception:
            self.dead.add(0)

    def answered(self) -> bool | None:
        """Whether to leave through MPI's own end; None while rank 0 has not said."""
        try:
            if not self.dead and not all(request.Test() for request in self._waiting):
                return None
        except self._MPI.Exception:
            return False
        return not self.dead and self._answer[0] == TOGETHER

    def hear(self, patience_s: float, lost: Collection[int] = ()) -> list[int]:
        """Rank 0's first part: the ranks that say nothing within the time, which are neither `lost` nor `dead`."""
        self.dead.update(lost)
        waiting = {}
        for rank in range(1, self._comm.Get_size()):
            if rank not in self.dead:
                waiting[rank] = self._comm.Irecv([bytearray(1), 1, self._MPI.BYTE], source=rank, tag=TAG)
        deadline, backoff = self._clock() + patience_s, Backoff()
        while True:
            for rank, request in list(waiting.items()):
                try:
                    if request.Test():
                        del waiting[rank]
                except self._MPI.Exception:
                    self.dead.add(rank)
                    del waiting[rank]
            if not waiting or self._clock() > deadline:
                return sorted(waiting)
            self._sleep(backoff.next_s(in_flight=True))

    def dismiss(self) -> bool:
        """Rank 0's second part: all others are told. Whether all leave through MPI's own end."""
        together = not self.dead
        answers = []
        for rank in range(1, self._comm.Get_size()):
            if rank not in self.dead:
                with contextlib.suppress(self._MPI.Exception):  # it has died since: whoever waits for it is watched
                    answers.append(self._send(rank, bytes([TOGETHER if together else ALONE])))
        deadline = self._clock() + LEAVE_S
        while answers and self._clock() < deadline:
            try:
                if answers[-1].Test():
                    answers.pop()
                    continue
            except self._MPI.Exception:
                answers.pop()
            self._sleep(Backoff.FIRST_S)
        return together

    def _send(self, rank: int, said: bytes) -> Any:
        return self._comm.Isend([said, 1, self._MPI.BYTE], dest=rank, tag=TAG)
