"""Files go down a chain of nodes in pieces: each node passes a piece on while it hashes and writes it itself.

The first of the chain reads the files, each once. Every link of the network carries every piece once, so a chain is as
fast as its slowest link, however long it is; only the first piece takes longer. A node has `SLOTS` pieces at most: it
receives the next ones while others are sent on, hashed and written, each in a thread of its own.

Whoever fails says so to the one before it, from where it goes on to the first, which then sends an empty piece: the
end for all. Until then the one that failed passes pieces on, so that nobody waits. Each answers the one before it
exactly once, after all that come after it have answered.

What carries the pieces comes as an argument: nothing here knows MPI.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from scheduling.errors import ProtocolError, RankLostError
from storage.digest import Digest

CHUNK_BYTES = 4 << 20
SLOTS = 8
PATIENCE_S = 120.0
"""How long nothing may move before somebody is taken for lost."""


class Transfer(Protocol):
    """A piece on its way."""

    def poll(self) -> int | None:
        """Its bytes once it is through, None before. Raises RankLostError."""

    def cancel(self) -> None:
        """It will not come."""


class Channel(Protocol):
    """This node's place in the chain, 0 first, and what leads to its neighbours. Pieces arrive in their order."""

    place: int
    size: int

    def receive(self, buffer: memoryview) -> Transfer:
        """From the one before."""

    def send(self, data: memoryview) -> Transfer:
        """To the next one."""

    def answer(self, well: bool) -> None:
        """To the one before."""

    def answered(self) -> bool | None:
        """What the next one has answered; None before it has."""

    def idle(self) -> None:
        """Nothing moved: sleep a little."""


class Source(Protocol):
    """Files to read."""

    def read(self, file: int, place: int, into: memoryview) -> None:
        """Fill `into` with what stands at byte `place` of the file. Raises an LlmpiError or OSError."""


class Sink(Protocol):
    """Files to write."""

    def write(self, file: int, place: int, data: memoryview) -> None:
        """Raises an LlmpiError or OSError."""


@dataclass(frozen=True)
class Relayed:
    """What came of it here. `problem`: of this node. `whole`: every piece came. `read_s`: seconds spent reading."""

    digests: tuple[Digest, ...]
    whole: bool
    bytes_passed: int
    read_s: float
    problem: Exception | None


@dataclass
class _Slot:
    """A buffer, and what is being done with the piece in it."""

    buffer: memoryview
    file: int = 0
    place: int = 0
    length: int = 0
    coming: Transfer | None = None
    going: Transfer | None = None
    jobs: list[Future[None]] = field(default_factory=list)


class Relay:
    """One node's part in sending files of `sizes` bytes down a chain. `source` is the first node's; `sink` None: what
    comes is hashed only.

    `stopped` is asked by the first node, and raises to end it all. `progress` is given the bytes of each piece.
    """

    def __init__(
        self,
        channel: Channel,
        sizes: Sequence[int],
        *,
        source: Source | None = None,
        sink: Sink | None = None,
        problem: Exception | None = None,
        stopped: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._channel = channel
        self._source, self._sink = source, sink
        self._stopped, self._progress, self._clock = stopped, progress, clock
        self._hashes = [hashlib.sha256() for _ in sizes]
        self._pieces = _pieces(sizes, chunk_bytes)
        self._left = sum(-(-size // chunk_bytes) for size in sizes)
        """Pieces that have not come yet."""
        self._asked = 0
        """Pieces of those that are on their way."""
        size = min(chunk_bytes, max([1, *sizes]))
        self._free = deque(_Slot(memoryview(bytearray(size))) for _ in range(SLOTS))
        self._filling: deque[_Slot] = deque()
        self._draining: list[_Slot] = []
        self._ended = False
        """By the empty piece, before all have come."""
        self._end: Transfer | None = None
        self._has_next = channel.place + 1 < channel.size
        self._heard: bool | None = None if self._has_next else True
        self._has_answered = channel.place == 0
        self._problem = problem
        self._bytes, self._read_s = 0, 0.0

    def run(self) -> Relayed:
        """Until everybody from here on has ended. Raises RankLostError: a neighbour is gone."""
        with contextlib.ExitStack() as stack:
            self._reading, self._hashing, self._writing = (
                stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))
                for name in ("stage-read", "stage-hash", "stage-write")
            )
            moved_s = self._clock()
            while not self._over():
                if self._turn():
                    moved_s = self._clock()
                elif self._clock() - moved_s > PATIENCE_S:
                    raise RankLostError(
                        f"staging stood still for {PATIENCE_S:.0f} s: look at the network and the hosts"
                    )
                else:
                    self._channel.idle()
            self._answer(self._problem is None and self._heard is True)
        whole = not self._ended and self._left == 0
        digests = tuple(Digest.of(one) for one in self._hashes) if whole else ()
        return Relayed(digests, whole, self._bytes, self._read_s, self._problem)

    def _over(self) -> bool:
        busy = self._filling or self._draining or self._end is not None or self._heard is None
        return not busy and (self._ended or self._left == 0)

    def _turn(self) -> bool:
        """All that can be done without waiting. True if anything moved."""
        self._look_for_ends()
        moved = self._fill()
        moved = self._arrive() or moved
        return self._drain() or moved

    # ------------------------------------------------ ends

    def _look_for_ends(self) -> None:
        if self._source is not None and self._problem is None:
            try:
                self._stopped()
            except Exception as error:
                self._fail(error)
        if self._heard is None:
            self._heard = self._channel.answered()
        if self._problem is not None or self._heard is False:
            if self._source is not None:
                self._finish_early()
            else:
                self._answer(False)
        if self._end is not None and self._end.poll() is not None:
            self._end = None

    def _fail(self, error: Exception) -> None:
        if self._problem is None:
            self._problem = error

    def _answer(self, well: bool) -> None:
        if not self._has_answered:
            self._has_answered = True
            self._channel.answer(well)

    def _finish_early(self) -> None:
        """Nothing comes any more, or is read any more; all that follow are told, if they still wait for something."""
        if self._ended or self._left == 0:
            return
        self._ended = True
        for slot in self._filling:
            if slot.coming is not None:
                slot.coming.cancel()
        self._free.extend(self._filling)
        self._filling.clear()
        if self._has_next:
            self._end = self._channel.send(memoryview(b""))

    # ------------------------------------------------ pieces

    def _fill(self) -> bool:
        moved = False
        while self._free and not self._ended and self._asked < self._left:
            slot = self._free.popleft()
            slot.file, slot.place, slot.length = next(self._pieces)
            piece = slot.buffer[: slot.length]
            if self._source is not None:
                slot.coming = _Read(self._reading.submit(self._read, slot.file, slot.place, piece), slot.length)
            else:
                slot.coming = self._channel.receive(piece)
            self._filling.append(slot)
            self._asked += 1
            moved = True
        return moved

    def _read(self, file: int, place: int, piece: memoryview) -> None:
        assert self._source is not None
        began_s = time.perf_counter()
        self._source.read(file, place, piece)
        self._read_s += time.perf_counter() - began_s

    def _arrive(self) -> bool:
        moved = False
        while self._filling and self._filling[0].coming is not None:
            slot = self._filling[0]
            assert slot.coming is not None
            try:
                count = slot.coming.poll()
            except RankLostError:
                raise
            except Exception as error:  # of reading
                self._fail(error)
                self._finish_early()
                return True
            if count is None:
                return moved
            moved = True
            if count == 0:
                self._finish_early()
                return True
            if count != slot.length:
                raise ProtocolError(f"a piece of {count} bytes came while staging, instead of {slot.length}")
            self._filling.popleft()
            self._left -= 1
            self._asked -= 1
            self._pass_on(slot)
        return moved

    def _pass_on(self, slot: _Slot) -> None:
        piece = slot.buffer[: slot.length]
        slot.coming = None
        slot.going = self._channel.send(piece) if self._has_next else None
        if self._problem is None:
            slot.jobs = [self._hashing.submit(self._hashes[slot.file].update, piece)]
            if self._sink is not None:
                slot.jobs.append(self._writing.submit(self._sink.write, slot.file, slot.place, piece))
        self._bytes += slot.length
        self._progress(slot.length)
        self._draining.append(slot)

    def _drain(self) -> bool:
        busy = []
        for slot in self._draining:
            if slot.going is not None and slot.going.poll() is not None:
                slot.going = None
            if slot.going is None and all(job.done() for job in slot.jobs):
                for job in slot.jobs:
                    error = job.exception()
                    if isinstance(error, Exception):
                        self._fail(error)
                slot.jobs = []
                self._free.append(slot)
            else:
                busy.append(slot)
        moved = len(busy) != len(self._draining)
        self._draining = busy
        return moved


@dataclass
class _Read:
    """A piece that is being read, as a `Transfer`."""

    future: Future[Any]
    length: int

    def poll(self) -> int | None:
        if not self.future.done():
            return None
        self.future.result()
        return self.length

    def cancel(self) -> None:
        self.future.cancel()


def _pieces(sizes: Sequence[int], chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(file, first byte, bytes) of each piece."""
    for file, size in enumerate(sizes):
        for place in range(0, size, chunk_bytes):
            yield file, place, min(chunk_bytes, size - place)
