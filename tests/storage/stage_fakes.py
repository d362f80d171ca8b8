"""Ranks as threads of one process: exchanges by a barrier, chains by queues. What is sent is copied, as MPI does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduling.errors import RankLostError

PATIENCE_S = 20.0


@dataclass
class Ranks:
    """What the ranks of one job share. `corrupt` may change a piece on its way: (to rank, piece) -> piece."""

    size: int
    corrupt: Callable[[int, bytes], bytes] = lambda _, piece: piece
    barrier: threading.Barrier = field(init=False)
    said: list[bytes] = field(init=False)
    lines: dict[tuple[int, int], queue.Queue[bytes]] = field(default_factory=dict)
    sent: dict[tuple[int, int], int] = field(default_factory=dict)
    """Bytes by (from rank, to rank)."""

    patience_s: dict[int, float] = field(default_factory=dict)
    """The longest time that each rank was ready to wait for the others."""

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)
        self.said = [b""] * self.size
        self.lines = {(a, b): queue.Queue() for a in range(self.size) for b in range(self.size)}

    def run(self, body: Callable[[FakeGroup], Any]) -> list[Any]:
        """`body` on every rank; what each returned, or raised. Fails if a rank does not end."""
        came: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                came[rank] = body(FakeGroup(self, rank))
            except BaseException as error:
                came[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for rank, thread in enumerate(threads):
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"rank {rank} hangs"
        assert all(line.empty() for line in self.lines.values()), "messages are left that nobody has received"
        return came


class FakeGroup:
    """`storage.staging.Group`."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self.rank, self.size = ranks, rank, ranks.size

    def exchange(self, said: bytes, patience_s: float) -> list[bytes]:
        self._ranks.patience_s[self.rank] = max(patience_s, self._ranks.patience_s.get(self.rank, 0.0))
        try:
            self._ranks.said[self.rank] = said
            self._ranks.barrier.wait(PATIENCE_S / 2)
            heard = list(self._ranks.said)
            self._ranks.barrier.wait(PATIENCE_S / 2)
        except threading.BrokenBarrierError:
            raise RankLostError("a rank did not come") from None
        return heard

    def chain(self, ranks: Sequence[int]) -> FakeChannel:
        return FakeChannel(self._ranks, list(ranks), self.rank)


class FakeChannel:
    """`storage.relay.Channel`."""

    def __init__(self, ranks: Ranks, chain: list[int], rank: int) -> None:
        self._ranks, self._chain, self._rank = ranks, chain, rank
        self.place, self.size = chain.index(rank), len(chain)
        self._answer: bool | None = None
        self._pulse = threading.Event()

    def receive(self, buffer: memoryview) -> FakeTransfer:
        return FakeTransfer(self._ranks.lines[self._chain[self.place - 1], self._rank], buffer)

    def send(self, data: memoryview) -> FakeTransfer:
        target = self._chain[self.place + 1]
        link = (self._rank, target)
        self._ranks.sent[link] = self._ranks.sent.get(link, 0) + len(data)
        self._ranks.lines[link].put(self._ranks.corrupt(target, bytes(data)))
        return FakeTransfer(None, data)

    def answer(self, well: bool) -> None:
        self._ranks.lines[self._rank, self._chain[self.place - 1]].put(b"1" if well else b"0")

    def answered(self) -> bool | None:
        if self._answer is None:
            try:
                self._answer = self._ranks.lines[self._chain[self.place + 1], self._rank].get_nowait() == b"1"
            except queue.Empty:
                return None
        return self._answer

    def idle(self) -> None:
        self._pulse.wait(1e-4)


class FakeTransfer:
    """A receive takes the next piece of its line; receives are polled in their order."""

    def __init__(self, line: queue.Queue[bytes] | None, buffer: memoryview) -> None:
        self._line, self._buffer = line, buffer
        self._count = len(buffer) if line is None else None

    def poll(self) -> int | None:
        if self._count is None and self._line is not None:
            try:
                piece = self._line.get_nowait()
            except queue.Empty:
                return None
            self._buffer[: len(piece)] = piece
            self._count = len(piece)
        return self._count

    def cancel(self) -> None:
        self._line = None
