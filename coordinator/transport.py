"""Endpoints without MPI: the loopback between rank 0 and workers it hosts, and several endpoints as one.

The endpoint over MPI is in `coordinator.mpi_endpoint`. `Backoff` is how all loops sleep: no rank spins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from scheduling.link import Endpoint


class Loopback:
    """Two endpoints in one process, connected: `near` for the coordinator, `far` for the worker."""

    def __init__(self, near_address: int, far_address: int) -> None:
        there: deque[tuple[int, bytes]] = deque()
        back: deque[tuple[int, bytes]] = deque()
        self.near = _LoopbackEnd(near_address, inbox=back, outbox=there)
        self.far = _LoopbackEnd(far_address, inbox=there, outbox=back)


class _LoopbackEnd:
    def __init__(self, address: int, inbox: deque[tuple[int, bytes]], outbox: deque[tuple[int, bytes]]) -> None:
        self.address = address
        self._inbox = inbox
        self._outbox = outbox

    def post(self, address: int, payload: bytes) -> None:
        self._outbox.append((self.address, payload))

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self) -> list[tuple[int, bytes]]:
        arrived = list(self._inbox)
        self._inbox.clear()
        return arrived

    def unsent_bytes(self) -> int:
        """Nothing: what was posted is with the other end already."""
        return 0

    def lost(self) -> tuple[int, ...]:
        """Nobody: both ends are one process."""
        return ()


class Routed:
    """Several endpoints as one: `routes` says which endpoint leads to an address, `default` takes the rest."""

    def __init__(self, routes: dict[int, Endpoint], default: Endpoint | None = None) -> None:
        self._routes = routes
        self._default = default
        self._all = [*routes.values(), *([default] if default is not None else [])]

    def add(self, endpoint: Endpoint) -> None:
        """Receive from this one too (its route is in `routes`)."""
        self._all.append(endpoint)

    def post(self, address: int, payload: bytes) -> None:
        endpoint = self._routes.get(address, self._default)
        if endpoint is None:
            raise ValueError(f"no endpoint leads to rank {address}")
        endpoint.post(address, payload)

    def flush(self) -> None:
        for endpoint in self._all:
            endpoint.flush()

    def receive(self) -> list[tuple[int, bytes | bytearray]]:
        return [arrived for endpoint in self._all for arrived in endpoint.receive()]

    def unsent_bytes(self) -> int:
        return sum(endpoint.unsent_bytes() for endpoint in self._all)

    def lost(self) -> Collection[int]:
        return () if self._default is None else self._default.lost()


class Backoff:
    """How long a loop with nothing to do sleeps: doubling from 50 microseconds, then a twentieth of the time that
    nothing has happened.

    The doubling ends at 1 ms while work is in flight and at 20 ms otherwise, and a twentieth at 20 ms and at 500 ms.
    So what comes after a pause is seen late by a twentieth of the pause at most, and many idle ranks cost little: one
    that has been idle for ten seconds looks about twice a second.
    """

    FIRST_S = 5e-5
    BUSY_S = 1e-3
    IDLE_S = 2e-2
    BUSY_MAX_S = 2e-2
    IDLE_MAX_S = 0.5
    SHARE = 1 / 20

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._next_s = self.FIRST_S
        self._idle_s = 0.0

    def next_s(self, in_flight: bool) -> float:
        """Seconds to sleep now; call after a turn in which nothing happened."""
        soon, ceiling = (self.BUSY_S, self.BUSY_MAX_S) if in_flight else (self.IDLE_S, self.IDLE_MAX_S)
        delay = max(min(self._next_s, soon), min(self._idle_s * self.SHARE, ceiling))
        self._next_s = min(self._next_s * 2, soon)
        self._idle_s += delay
        return delay
