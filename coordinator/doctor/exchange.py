"""Rank 0 asks the others, over llmpi's own endpoint: facts, round trips, and what all do together.

Rank 0 leads, the others serve. Nothing waits without an end: a rank that does not answer within its time is left out
of what follows, and of collectives nobody takes part if one does not answer, for they would wait for it.

    a rank   -> Facts once, then Pong for each Ping
    rank 0   -> Ping, Together (enter the collectives, in the order that `measure_together` has), Leave
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.doctor.about_network import LinkFacts, Together
from coordinator.doctor.facts import Facts
from scheduling.errors import RankLostError
from scheduling.link import Endpoint

ROUND_TRIPS = 200
LATENCY_S = 1.0
"""Round trips end with this, if they have not been so many."""
PEER_S = 10.0
"""For all round trips with one rank; who answers later does not answer."""
NETWORK_S = 60.0
"""For all links together."""
TRIAL_BYTES, PAYLOAD_BYTES = 64 << 10, 4 << 20
PAYLOAD_S = 2.0
"""A payload that is expected to take longer is made smaller."""
PAYLOADS = 3
REPEATS = 10
LARGE_BYTES = 1 << 20
TOGETHER_S = 20.0
ORPHANED_S = 300.0
"""A rank that has not heard of rank 0 for so long leaves."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int
    payload: bytes


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """What came, its SHA-256 where it was computed, and the time by the clock on the wall."""

    number: int
    payload: bytes
    digest: str
    wall_s: float


class Enter(msgspec.Struct, frozen=True, tag="enter"):
    large_bytes: int


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    pass


class All(Protocol):
    """Collectives, as `coordinator.mpi_collectives.Collectives` has them."""

    size: int

    def barrier(self) -> None: ...
    def sum_everywhere(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...


_encode = msgspec.msgpack.Encoder().encode
_to_rank = msgspec.msgpack.Decoder(Ping | Enter | Leave)
_to_rank0 = msgspec.msgpack.Decoder(Facts | Pong)


@dataclass
class Clocks:
    """`monotonic` measures, `wall` tells the time, `pause` sleeps for so many seconds (0: lets others run)."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    pause: Callable[[float], None] = time.sleep


@dataclass
class Rank0:
    endpoint: Endpoint
    clocks: Clocks = field(default_factory=Clocks)
    _number: int = 0

    def hear(self, ranks: Collection[int], patience_s: float) -> dict[int, Facts]:
        """The facts of those of `ranks` that tell them in time."""
        deadline, heard = self.clocks.monotonic() + patience_s, dict[int, Facts]()
        while set(ranks) - set(heard) - set(self.endpoint.lost()) and self.clocks.monotonic() < deadline:
            arrived = self.endpoint.receive()
            for rank, payload in arrived:
                message = _to_rank0.decode(payload)
                if isinstance(message, Facts):
                    heard[rank] = message
            if not arrived:
                self.clocks.pause(0.002)
        return heard

    def measure_links(self, peers: Sequence[tuple[int, str, bool]], *, quick: bool) -> list[LinkFacts]:
        """`peers`: (rank, host, whether it is rank 0's own)."""
        until, found = self.clocks.monotonic() + NETWORK_S, []
        for rank, host, same in peers:
            if self.clocks.monotonic() > until:
                found.append(LinkFacts(rank=rank, host=host, problem=f"not measured: others took {NETWORK_S:.0f} s"))
            else:
                found.append(self._link(rank, host, same, quick=quick))
        return found

    def _link(self, rank: int, host: str, same: bool, *, quick: bool) -> LinkFacts:
        clocks, deadline = self.clocks, self.clocks.monotonic() + PEER_S
        trips: list[tuple[float, float]] = []  # (round trip, offset of its clock)
        began = clocks.monotonic()
        while len(trips) < (ROUND_TRIPS // 10 if quick else ROUND_TRIPS) and clocks.monotonic() - began < LATENCY_S:
            sent_s, wall_s = clocks.monotonic(), clocks.wall()
            pong = self._round_trip(rank, b"\0" * 8, deadline)
            if pong is None:
                return _silent(rank, host, same)
            took_s = clocks.monotonic() - sent_s
            trips.append((took_s, pong.wall_s - (wall_s + took_s / 2)))
        fastest = min(trips)
        about = LinkFacts(
            rank=rank, host=host, same_host=same, round_trips=len(trips),
            latency_s=statistics.median(took for took, _ in trips) / 2, clock_offset_s=fastest[1],
            clock_error_s=fastest[0] / 2,
        )  # fmt: skip
        return self._payloads(about, deadline, quick=quick)

    def _payloads(self, about: LinkFacts, deadline: float, *, quick: bool) -> LinkFacts:
        """A small one first, which tells how large the others may be."""
        size, rates, most = TRIAL_BYTES, list[float](), 0
        for turn in range(1 if quick else 1 + PAYLOADS):
            payload = os.urandom(size)
            sent_s = self.clocks.monotonic()
            pong = self._round_trip(about.rank, payload, deadline)
            if pong is None:
                return _silent(about.rank, about.host, about.same_host)
            took_s = max(1e-9, self.clocks.monotonic() - sent_s)
            most = max(most, size)
            if pong.payload != payload or pong.digest != _digest(payload):
                return msgspec.structs.replace(about, damaged=True, payload_bytes=size)
            rates.append(2 * size / took_s)
            if turn == 0:
                # As large as fits into its time at half the speed of the trial, up to what is wanted.
                fits = int(rates[0] / 2 * PAYLOAD_S / (1 + PAYLOADS))
                size = min(PAYLOAD_BYTES, max(TRIAL_BYTES, fits))
        return msgspec.structs.replace(about, bytes_per_s=max(rates), payload_bytes=most)

    def _round_trip(self, rank: int, payload: bytes, deadline: float) -> Pong | None:
        """None: no answer by then."""
        self._number += 1
        self.endpoint.post(rank, _encode(Ping(self._number, payload)))
        self.endpoint.flush()
        while self.clocks.monotonic() < deadline and rank not in self.endpoint.lost():
            for source, arrived in self.endpoint.receive():
                message = _to_rank0.decode(arrived)
                if source == rank and isinstance(message, Pong) and message.number == self._number:
                    return message
            self.clocks.pause(0.0)
        return None

    def together(self, ranks: Collection[int], collectives: All, *, quick: bool) -> Together:
        """All `ranks` must have answered so far."""
        large = 0 if quick else LARGE_BYTES
        for rank in ranks:
            self.endpoint.post(rank, _encode(Enter(large)))
        self._send_on()
        try:
            return measure_together(collectives, large, self.clocks)
        except RankLostError as error:
            return Together(problem=str(error))

    def dismiss(self, ranks: Collection[int]) -> None:
        for rank in ranks:
            self.endpoint.post(rank, _encode(Leave()))
        self._send_on()

    def _send_on(self, patience_s: float = 2.0) -> None:
        self.endpoint.flush()
        deadline = self.clocks.monotonic() + patience_s
        while self.endpoint.unsent_bytes() and self.clocks.monotonic() < deadline:
            self.clocks.pause(0.001)


def _silent(rank: int, host: str, same: bool) -> LinkFacts:
    return LinkFacts(rank=rank, host=host, same_host=same, problem=f"rank {rank} did not answer within {PEER_S:.0f} s")


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def measure_together(collectives: All, large_bytes: int, clocks: Clocks) -> Together:
    """The same calls on every rank, in this order; the figures are rank 0's.

    Raises RankLostError: a rank is gone, or takes too long.
    """
    size, wrong = collectives.size, False

    def add(values: int) -> None:
        nonlocal wrong
        wrong |= not bool(np.all(collectives.sum_everywhere(np.ones(values)) == size))

    barrier_s = _median(collectives.barrier, clocks)
    small_s = _median(lambda: add(1), clocks)
    large_s = _median(lambda: add(large_bytes // 8), clocks, repeats=3) if large_bytes else None
    return Together(barrier_s=barrier_s, small_s=small_s, large_s=large_s, large_bytes=large_bytes, wrong=wrong)


def _median(do: Callable[[], object], clocks: Clocks, repeats: int = REPEATS) -> float:
    do()
    took = []
    for _ in range(repeats):
        began = clocks.monotonic()
        do()
        took.append(clocks.monotonic() - began)
    return statistics.median(took)


def answer(endpoint: Endpoint, facts: Facts, collectives: Callable[[], All], clocks: Clocks | None = None) -> None:
    """Be asked by rank 0 until it has no more questions.

    Raises RankLostError: nothing is heard of rank 0 any more, or a collective fails.
    """
    clocks = clocks or Clocks()
    endpoint.post(0, _encode(facts))
    endpoint.flush()
    heard, idle_s = clocks.monotonic(), 0.0
    while clocks.monotonic() - heard < ORPHANED_S and 0 not in endpoint.lost():
        arrived = endpoint.receive()
        for _, payload in arrived:
            message = _to_rank.decode(payload)
            heard, idle_s = clocks.monotonic(), 0.0
            if isinstance(message, Leave):
                return
            if isinstance(message, Ping):
                digest = _digest(message.payload) if len(message.payload) > 8 else ""
                endpoint.post(0, _encode(Pong(message.number, message.payload, digest, clocks.wall())))
                endpoint.flush()
            else:
                measure_together(collectives(), message.large_bytes, clocks)
        if not arrived:
            # Fast while it is being measured, and idle while others are.
            clocks.pause(idle_s)
            idle_s = 0.0 if clocks.monotonic() - heard < 0.05 else 0.002
    raise RankLostError(f"rank 0 has said nothing for {ORPHANED_S:.0f} s")
