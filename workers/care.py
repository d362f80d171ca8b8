"""How a worker looks after its engine: how long it waits for a word, how often it starts another, and when it does not.

What is known of an engine from outside is what it says: whenever something starts or ends, and its counters about once
a second while it makes steps, with how long one of its contexts has made none. One that has work and says nothing for a
*lease*, or has a context that makes no step for so long, is taken to hang. It may be stopped, or wait for a GPU that
never answers: nobody can tell from outside, so it is killed. No word comes out of one long pass either, so a lease has
to be longer than the longest pass; loading is granted more.

An engine that dies is started again, but not for ever. A worker may lose `RESTARTS_MAX` of them; work done earns
restarts back. So a run of days survives a death now and then, and an engine that dies all the time comes to its end.
Nothing is tried again that cannot help: where memory does not suffice, or where the GPU is gone.

Times come in as arguments: seconds of any monotonic clock.
"""

from __future__ import annotations

import re

LEASE_S = 600.0
LOADING_LEASES = 6
"""Loading is granted so many leases: hundreds of gigabytes may come over a network."""
OVERSLEPT_S = 5.0
"""A worker looks at its engine far more often. If it has not, it stood still itself, and perhaps its engine with it."""

RESTARTS_MAX = 5
RESTART_BACKOFF_S = 0.5
LOADING_PRICE = 2
"""A death while loading counts for so many: it has less to do with chance."""
ANSWERS_A_RESTART = 10
SECONDS_A_RESTART = 3600.0
"""So many answers earn a restart; so does so much time with an engine that has answered anything."""

_OUT_OF_MEMORY = re.compile(r"out of (device )?memory|ErrorOutOfDeviceMemory", re.IGNORECASE)
_GPU_GONE = re.compile(
    r"uncorrectable (ECC|NVLink) error|no CUDA-capable device is detected|driver version is insufficient|"
    r"GPU is lost|fallen off the bus",
    re.IGNORECASE,
)


class Lease:
    """Since when an engine that should say something has said nothing."""

    def __init__(self, lease_s: float, now: float) -> None:
        self.lease_s = lease_s
        self._since = self._turned_at = now

    def start(self, now: float) -> None:
        """Another engine begins to load."""
        self._since = now

    def turn(self, now: float, *, heard: bool, loading: bool, working: bool) -> bool:
        """A turn of the worker; `heard`: the engine said something in it. True if its lease is over."""
        overslept_s, self._turned_at = now - self._turned_at - OVERSLEPT_S, now
        if heard or not (loading or working):
            self._since = now
        elif overslept_s > 0:
            self._since = min(now, self._since + overslept_s)
        return now - self._since > self.lease_s * (LOADING_LEASES if loading else 1)

    def story(self, loading: bool) -> str:
        """Why an engine was killed whose lease was over."""
        if loading:
            times = f"{LOADING_LEASES} times --engine-lease"
            return f"it did not load within {self.lease_s * LOADING_LEASES:g} s ({times}), and was killed"
        return f"it had work and made no step for {self.lease_s:g} s (--engine-lease), and was killed"


class Restarts:
    """How many more engines a worker may lose."""

    def __init__(self) -> None:
        self.deaths = 0
        self._left = float(RESTARTS_MAX)
        self._loaded_at: float | None = None
        self._answered = False

    def loaded(self, now: float) -> None:
        self._loaded_at = now
        self._answered = False

    def answered(self) -> None:
        """A request has ended in the engine, well or not."""
        self._answered = True
        self._earn(1 / ANSWERS_A_RESTART)

    def died(self, now: float) -> float | None:
        """An engine has died: seconds until another may be started, or None if none is left."""
        if self._answered and self._loaded_at is not None:
            self._earn((now - self._loaded_at) / SECONDS_A_RESTART)
        price = 1 if self._loaded_at is not None else LOADING_PRICE
        self._loaded_at, self._answered = None, False
        self.deaths += 1
        if self._left < price:
            return None
        self._left -= price
        spent = RESTARTS_MAX - int(self._left)
        return float(RESTART_BACKOFF_S * 2.0 ** (spent - 1))

    def _earn(self, share: float) -> None:
        self._left = min(float(RESTARTS_MAX), self._left + share)


def out_of_memory(reason: str) -> bool:
    """Whether what an engine ended with says that its device has too little memory."""
    return _OUT_OF_MEMORY.search(reason) is not None


def gpu_is_gone(reason: str) -> bool:
    """Whether it says that its device cannot be used any more."""
    return _GPU_GONE.search(reason) is not None
