"""`scheduling.link.Endpoint` over MPI: envelopes as bytes, non-blocking both ways.

A message is matched by a probe, so that its size is known before there is a buffer, and then received without waiting:
a peer that stops in the middle of a large one holds nobody up. Where MPI survives the death of ranks, an error that
says so is acknowledged and the endpoint goes on with the others.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from scheduling.errors import ProtocolError, RankLostError
from scheduling.link import ENVELOPE_BYTES_MAX

TAG = 7


class MpiEndpoint:
    """Over the communicator `comm` of the module `MPI`."""

    def __init__(self, MPI: Any, comm: Any) -> None:
        self._MPI = MPI
        self._comm = comm
        self._sending: dict[int, deque[tuple[Any, bytes]]] = {}
        self._arriving: dict[int, deque[tuple[Any, bytearray]]] = {}
        self._status = MPI.Status()
        self._lost: set[int] = set()
        self.messages = 0
        """Sent and received."""

    def post(self, address: int, payload: bytes) -> None:
        if address in self._lost:
            return
        try:
            request = self._comm.Isend([payload, len(payload), self._MPI.BYTE], dest=address, tag=TAG)
        except self._MPI.Exception as error:
            self._bear(error, f"cannot send to rank {address}", address)
            return
        self.messages += 1
        # The buffer must live until the send is through.
        self._sending.setdefault(address, deque()).append((request, payload))

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self) -> list[tuple[int, bytes | bytearray]]:
        self._send_on()
        self._match()
        arrived: list[tuple[int, bytes | bytearray]] = []
        for source, messages in list(self._arriving.items()):
            # A small message may be here before a large one that was sent earlier: order is kept.
            while messages and self._done(messages[0][0], source, f"receiving from rank {source} failed"):
                arrived.append((source, messages.popleft()[1]))
                self.messages += 1
            if not messages or source in self._lost:
                del self._arriving[source]
        return arrived

    def unsent_bytes(self) -> int:
        self._send_on()
        return sum(len(payload) for sends in self._sending.values() for _, payload in sends)

    def lost(self) -> frozenset[int]:
        return frozenset(self._lost)

    def _match(self) -> None:
        """Begin to receive all that has come."""
        MPI = self._MPI
        while True:
            try:
                message = self._comm.Improbe(source=MPI.ANY_SOURCE, tag=TAG, status=self._status)
                if message is None:
                    return
                source, size = self._status.Get_source(), self._status.Get_elements(MPI.BYTE)
                if not 0 <= size <= ENVELOPE_BYTES_MAX:  # negative where it is beyond what this MPI can count
                    told = f"{size} bytes" if size >= 0 else "more bytes than this MPI can count"
                    raise ProtocolError(f"rank {source} sent an envelope of {told}: the limit is {ENVELOPE_BYTES_MAX}")
                payload = bytearray(size)
                request = message.Irecv([payload, size, MPI.BYTE])
            except MPI.Exception as error:
                self._bear(error, "receiving failed")
            else:
                self._arriving.setdefault(source, deque()).append((request, payload))

    def _send_on(self) -> None:
        """Free what has left. Each rank's sends leave in order; one that is stopped keeps its own alone."""
        for address, sends in list(self._sending.items()):
            while sends and self._done(sends[0][0], address, f"sending to rank {address} failed"):
                sends.popleft()
            if not sends or address in self._lost:
                del self._sending[address]

    def _done(self, request: Any, rank: int, what: str) -> bool:
        try:
            return bool(request.Test())
        except self._MPI.Exception as error:
            self._bear(error, what, rank)
            return False

    def _bear(self, error: Any, what: str, rank: int | None = None) -> None:
        """Take note of the ranks whose death the error tells of, `rank` or others.

        Raises RankLostError if it is about something else.
        """
        MPI = self._MPI
        if error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING):
            failed = self._comm.Get_failed()
            count = failed.Get_size()
            if count:
                self._comm.Ack_failed(count)  # until then a receive from any rank fails
                known = len(self._lost)
                self._lost.update(MPI.Group.Translate_ranks(failed, list(range(count)), self._comm.Get_group()))
                if len(self._lost) > known or rank in self._lost:
                    return
        raise RankLostError(f"{what}: {error}") from error
