"""Which waiting request goes to which worker: small objects behind one protocol, chosen by name.

A policy holds the requests that wait at rank 0 and hands them out when the control plane asks on behalf of a
worker with room. It knows nothing of messages, time or ownership: those are the control plane's. Whether unstarted
requests may be taken back from a worker (stealing) is one attribute; the transaction is the control plane's too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from scheduling.errors import ConfigError


class HasIndex(Protocol):
    @property
    def index(self) -> int: ...


R = TypeVar("R", bound=HasIndex)


class Policy(Protocol[R]):
    """Order and placement of waiting requests."""

    name: str
    steals: bool

    def worker_joined(self, worker: int) -> None: ...

    def worker_left(self, worker: int) -> None: ...

    def arrive(self, request: R) -> None:
        """A new request waits."""

    def put_back(self, requests: Iterable[R]) -> None:
        """Requests that waited before wait again: they go first, oldest first."""

    def available(self, worker: int) -> int:
        """How many waiting requests this worker could be given now."""

    def peek(self, worker: int) -> R:
        """What `take` would give. Only when `available(worker)`."""

    def take(self, worker: int) -> R:
        """The next request for this worker. Only when `available(worker)`."""

    def waiting(self) -> int:
        """All waiting requests."""

    def starving(self, worker: int) -> bool:
        """True if this worker can be given nothing although more input might help it."""

    def clear(self) -> list[R]:
        """Forget and return all waiting requests."""


class WorkStealing(Policy[R]):
    """One queue for all; whoever has room takes the oldest. Unstarted work may move again."""

    name = "work-stealing"
    steals = True

    def __init__(self) -> None:
        self._queue: deque[R] = deque()

    def worker_joined(self, worker: int) -> None:
        """All workers draw from one queue: nothing to note."""

    def worker_left(self, worker: int) -> None:
        """All workers draw from one queue: nothing to undo."""

    def arrive(self, request: R) -> None:
        self._queue.append(request)

    def put_back(self, requests: Iterable[R]) -> None:
        self._queue.extendleft(sorted(requests, key=lambda request: -request.index))

    def available(self, worker: int) -> int:
        return len(self._queue)

    def peek(self, worker: int) -> R:
        return self._queue[0]

    def take(self, worker: int) -> R:
        return self._queue.popleft()

    def waiting(self) -> int:
        return len(self._queue)

    def starving(self, worker: int) -> bool:
        return not self._queue

    def clear(self) -> list[R]:
        left = list(self._queue)
        self._queue.clear()
        return left


class RoundRobin(Policy[R]):
    """The k-th request goes to the k-th worker in turn, whatever the workers' speeds; nothing moves again.

    Requests dealt to a worker that is slower than the rest wait here. A lost worker's are dealt anew.
    """

    name = "round-robin"
    steals = False

    def __init__(self) -> None:
        self._queues: dict[int, deque[R]] = {}
        self._ring: list[int] = []
        self._next = 0
        self._undealt: deque[R] = deque()
        self._count = 0

    def worker_joined(self, worker: int) -> None:
        self._queues[worker] = deque()
        self._ring = sorted(self._queues)
        undealt, self._undealt = self._undealt, deque()
        self._count -= len(undealt)
        for request in undealt:
            self.arrive(request)

    def worker_left(self, worker: int) -> None:
        orphans = self._queues.pop(worker, deque())
        self._ring = sorted(self._queues)
        self._next = self._next % len(self._ring) if self._ring else 0
        self._count -= len(orphans)
        for request in orphans:
            self.arrive(request)

    def arrive(self, request: R) -> None:
        self._count += 1
        if not self._ring:
            self._undealt.append(request)
            return
        self._queues[self._ring[self._next]].append(request)
        self._next = (self._next + 1) % len(self._ring)

    def put_back(self, requests: Iterable[R]) -> None:
        for request in sorted(requests, key=lambda request: request.index):
            self.arrive(request)

    def available(self, worker: int) -> int:
        return len(self._queues.get(worker, ()))

    def peek(self, worker: int) -> R:
        return self._queues[worker][0]

    def take(self, worker: int) -> R:
        self._count -= 1
        return self._queues[worker].popleft()

    def waiting(self) -> int:
        return self._count

    def starving(self, worker: int) -> bool:
        return not self._queues.get(worker)

    def clear(self) -> list[R]:
        left = [request for queue in self._queues.values() for request in queue] + list(self._undealt)
        for queue in self._queues.values():
            queue.clear()
        self._undealt.clear()
        self._count = 0
        return left


POLICIES: dict[str, Callable[[], Policy[HasIndex]]] = {
    RoundRobin.name: RoundRobin,
    WorkStealing.name: WorkStealing,
}


def policy_named(name: str) -> Policy[HasIndex]:
    """A fresh policy by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(f"no schedule is named {name!r}: choose one of {', '.join(sorted(POLICIES))}") from None
