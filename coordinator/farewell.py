"""The last exchange of a job: all ranks say goodbye to rank 0, and it tells them how to leave.

MPI's own end is a barrier: it waits for ever for a rank that is stopped, and in Open MPI for one that has died. So it
is entered only when every rank has said that it is about to. If one has died the others leave without it; if one says
nothing rank 0 ends the job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

from coordinator.transport import Backoff

TAG = 13
LEAVE_S = 1.0
"""For what was sent to others to leave."""
TOGETHER, ALONE = 1, 0
"""What rank 0 answers: through MPI's own end, or without it."""


class Farewell:
    """Over the communicator `comm` of the module `MPI`, on which nothing else has this tag."""

    def __init__(self, MPI: Any, comm: Any) -> None:
        self._MPI = MPI
        self._comm = comm
        self.dead: set[int] = set()
        """Ranks that were found to have died."""

    def say(self) -> bool:
        """A worker's part. Whether to leave through MPI's own end; not if rank 0 is gone."""
        answer = bytearray([ALONE])
        try:
            said = self._send(0, b"\0")
            heard = self._comm.Irecv([answer, 1, self._MPI.BYTE], source=0, tag=TAG)
            backoff = Backoff()
            while not (said.Test() and heard.Test()):
                time.sleep(backoff.next_s(in_flight=False))
        except self._MPI.Exception:
            return False
        return answer[0] == TOGETHER

    def hear(self, patience_s: float, lost: Collection[int] = ()) -> list[int]:
        """Rank 0's first part: the ranks that say nothing within the time, which are neither `lost` nor `dead`."""
        self.dead.update(lost)
        waiting = {}
        for rank in range(1, self._comm.Get_size()):
            if rank not in self.dead:
                waiting[rank] = self._comm.Irecv([bytearray(1), 1, self._MPI.BYTE], source=rank, tag=TAG)
        deadline, backoff = time.monotonic() + patience_s, Backoff()
        while True:
            for rank, request in list(waiting.items()):
                try:
                    if request.Test():
                        del waiting[rank]
                except self._MPI.Exception:
                    self.dead.add(rank)
                    del waiting[rank]
            if not waiting or time.monotonic() > deadline:
                return sorted(waiting)
            time.sleep(backoff.next_s(in_flight=True))

    def dismiss(self) -> bool:
        """Rank 0's second part: all others are told. Whether all leave through MPI's own end."""
        together = not self.dead
        answers = []
        for rank in range(1, self._comm.Get_size()):
            if rank not in self.dead:
                with contextlib.suppress(self._MPI.Exception):  # it has died since: whoever waits for it is watched
                    answers.append(self._send(rank, bytes([TOGETHER if together else ALONE])))
        deadline = time.monotonic() + LEAVE_S
        while answers and time.monotonic() < deadline:
            try:
                if answers[-1].Test():
                    answers.pop()
                    continue
            except self._MPI.Exception:
                answers.pop()
            time.sleep(Backoff.FIRST_S)
        return together

    def _send(self, rank: int, said: bytes) -> Any:
        return self._comm.Isend([said, 1, self._MPI.BYTE], dest=rank, tag=TAG)
