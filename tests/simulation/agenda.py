"""Simulated time, what is to happen when, and the trace of what did."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter, deque
from collections.abc import Callable

STORY_EVENTS = 80


class ViolationError(BaseException):
    """Something that must hold does not. Not an Exception: nothing in the product may handle it."""


class Agenda:
    """`now_s` and actions by the time that they are due; those due together happen in the order they were put down."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._count, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def next_s(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def step(self) -> None:
        """Do the next action, at its time."""
        self.now_s, _, action = heapq.heappop(self._heap)
        action()


class Trace:
    """Everything that happens, as a digest; the last events as a story; faults counted by kind."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.events = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._story: deque[tuple[object, ...]] = deque(maxlen=STORY_EVENTS)

    def note(self, now_s: float, *what: object) -> None:
        """`what`: texts and numbers, nothing whose text differs from process to process."""
        entry = (now_s, *what)
        self.events += 1
        self._story.append(entry)
        self._digest.update(repr(entry).encode())

    def fault(self, now_s: float, kind: str, *what: object) -> None:
        self.faults[kind] += 1
        self.note(now_s, "FAULT", kind, *what)

    def digest(self) -> str:
        return self._digest.hexdigest()

    def story(self) -> list[str]:
        return [f"{now_s:12.6f}  " + " ".join(map(str, what)) for now_s, *what in self._story]
