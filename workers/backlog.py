"""The engine's waiting line: every request from its arrival to its end, shared by all threads of the engine.

A request goes raw -> ready -> started -> gone. The reader thread adds raw ones; the preparing threads turn their text
into tokens, in order, so that they become ready in order (all but long texts and grammars: those have a thread each);
the stepping threads take ready ones, the longest first, choice by choice, as their slots become free. Recall, cancel
and admission are atomic with each other: one lock.

There is a line for each `Lane`, the kind of context that a request needs. With several contexts in a lane each takes
no more than its even share of what runs and waits there, so that a short line is spread over all of them instead of
filling the first.

This module knows neither tokens' meaning nor llama.cpp, and it does no I/O: its callers send what it returns.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from scheduling.errors import ProtocolError
from workers.protocol import Choice
from workers.task import Lane, State, Task

CANCELLED = "cancelled"
OVERTAKEN_MAX = 1024
"""So many choices that came later may start before one."""
EXHAUSTED_MAX = 64
"""Tasks that have nothing left to start and are still in line, beside as many as there are choices."""


class _Line:
    """What is ready in one lane, and how much of it each of its contexts runs.

    Requests that may run longest start first: one of those at the end would run alone, with all other slots idle.
    Requests of about the same limit start in order of arrival, and none is overtaken by more than OVERTAKEN_MAX.
    """

    __slots__ = ("_arrived", "_arrivals", "_by_limit", "_started", "choices", "running")

    def __init__(self) -> None:
        self.choices = 0
        self.running: dict[int, int] = {}
        self._by_limit: list[tuple[int, int, Task]] = []
        """A heap. Tasks that have gone, or have all their choices running, stay in it for a time."""
        self._arrived: deque[tuple[int, Task]] = deque()
        """The same tasks in order of arrival, each with how many choices had come before: what starts beyond that has
        overtaken it. (If some of those are taken back, it may be overtaken by as many more.)"""
        self._arrivals = self._started = 0

    def push(self, task: Task) -> None:
        if max(len(self._by_limit), len(self._arrived)) > 2 * self.choices + EXHAUSTED_MAX:
            self._by_limit = [entry for entry in self._by_limit if not _exhausted(entry[2])]
            heapify(self._by_limit)
            self._arrived = deque(entry for entry in self._arrived if not _exhausted(entry[1]))
        self._arrived.append((self._started + self.choices, task))
        self.choices += len(task.choices)
        self._arrivals += 1
        heappush(self._by_limit, (-_limit_class(task.limit), self._arrivals, task))

    def first(self) -> Task | None:
        """The request that has the next choice to start."""
        while self._arrived and _exhausted(self._arrived[0][1]):
            self._arrived.popleft()
        while self._by_limit and _exhausted(self._by_limit[0][2]):
            heappop(self._by_limit)
        if not self._by_limit:
            return None
        ahead, oldest = self._arrived[0]
        return oldest if self._started - ahead >= OVERTAKEN_MAX else self._by_limit[0][2]

    def start(self, task: Task) -> int:
        """Start its next choice. Returns which one that is."""
        self._started += 1
        self.choices -= 1
        task.next_choice += 1
        return task.next_choice - 1

    def share(self, context: int) -> int:
        """How many more choices `context` may start, for all contexts of the lane to have as many."""
        total = sum(self.running.values()) + self.choices
        return -(-total // len(self.running)) - self.running[context]


def _exhausted(task: Task) -> bool:
    return task.state is State.GONE or task.next_choice >= len(task.choices)


def _limit_class(limit: int) -> int:
    """Limits within a factor of the square root of 2 are about the same."""
    return int(2 * math.log2(max(1, limit)))


class Backlog:
    """All requests that the engine has and not yet answered. Contexts are known by the numbers `open` gave them."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self._raw_came = threading.Condition(lock)
        self._ready_came = threading.Condition(lock)
        self._lock = lock
        self._raw: deque[Task] = deque()
        self._lines = {lane: _Line() for lane in Lane}
        self._line_of: list[_Line] = []
        self._tasks: dict[int, Task] = {}
        self.closed = False
        self.cancels = 0
        """Raised whenever a started task was cancelled: a context that sees it change looks at its slots."""

    def open(self, lane: Lane) -> int:
        """One more context of `lane`. Returns its number."""
        with self._lock:
            line = self._lines[lane]
            self._line_of.append(line)
            context = len(self._line_of) - 1
            line.running[context] = 0
            return context

    # ------------------------------------------------ the reader's side

    def add(self, tasks: Iterable[Task]) -> None:
        """Append in order of arrival. Raises `ProtocolError` for a key that is still here."""
        with self._lock:
            for task in tasks:
                if task.key in self._tasks:
                    raise ProtocolError(f"request {task.key} was submitted again before it had been answered")
                self._tasks[task.key] = task
                self._raw.append(task)
            self._raw_came.notify()

    def recall(self, keys: Iterable[int]) -> list[int]:
        """Take back those of `keys` that have not started. They are forgotten here."""
        returned = []
        with self._lock:
            for key in keys:
                task = self._tasks.get(key)
                if task is not None and task.state in (State.RAW, State.READY):
                    self._forget(task)
                    returned.append(key)
        return returned

    def cancel(self, keys: Iterable[int]) -> list[Task]:
        """Stop `keys`. Returns those that ended by it (they had not started); others end in their slots."""
        ended = []
        with self._lock:
            for key in keys:
                task = self._tasks.get(key)
                if task is None or task.cancelled:
                    continue
                task.cancelled = True
                if task.state is State.STARTED:
                    self.cancels += 1
                    if self._withdraw(task):
                        ended.append(task)
                    continue
                task.choices = [Choice("", CANCELLED, 0) for _ in task.choices]
                self._forget(task)
                ended.append(task)
        return ended

    def close(self) -> None:
        """No more work: wakes every thread that waits here."""
        with self._lock:
            self.closed = True
            self._raw_came.notify_all()
            self._ready_came.notify_all()

    # ------------------------------------------------ the preparing thread's side

    def next_raw(self) -> Task | None:
        """The oldest request that has no tokens yet; waits for one. None once closed."""
        with self._lock:
            while True:
                while self._raw and self._raw[0].state is not State.RAW:
                    self._raw.popleft()
                if self.closed:
                    return None
                if self._raw:
                    return self._raw.popleft()
                self._raw_came.wait()

    def ready(self, task: Task) -> None:
        """`task` has its tokens and may start, unless it was recalled or cancelled meanwhile."""
        with self._lock:
            if task.state is State.RAW:
                task.state = State.READY
                self._lines[task.lane].push(task)
                self._ready_came.notify_all()

    def end_unstarted(self, task: Task) -> bool:
        """End a request that cannot or need not run. False if it was recalled or cancelled meanwhile."""
        with self._lock:
            if task.state is State.GONE:
                return False
            self._forget(task)
            return True

    # ------------------------------------------------ the stepping threads' side

    def available(self, context: int) -> int:
        """How many choices `context` would be given now, had it slots for all of them."""
        line = self._line_of[context]
        if not line.choices:  # Unlocked: at worst a step later.
            return 0
        with self._lock:
            return max(0, min(line.share(context), line.choices))

    def take(self, context: int, free: int, now_s: float) -> list[tuple[Task, int]]:
        """Up to `free` choices for the free slots of `context`."""
        line = self._line_of[context]
        taken: list[tuple[Task, int]] = []
        if not line.choices:  # Unlocked: at worst a step later.
            return taken
        with self._lock:
            wanted = min(free, line.share(context))
            while wanted > len(taken) and (task := line.first()) is not None:
                if task.state is State.READY:
                    task.state = State.STARTED
                    task.admitted_s = now_s
                taken.append((task, line.start(task)))
            line.running[context] += len(taken)
        return taken

    def wait(self, context: int) -> bool:
        """Wait until something is ready for `context`. False once closed."""
        line = self._line_of[context]
        with self._lock:
            while not self.closed and line.choices == 0:
                self._ready_came.wait()
            return not self.closed

    def finish(
        self,
        context: int,
        task: Task,
        choice: int,
        result: Choice,
        error: str | None = None,
        cached_tokens: int = 0,
    ) -> bool:
        """A slot of `context` is free again. True if this was the request's last choice: it can be answered.

        `cached_tokens`: so many tokens of the prompt were in cells already when it began.
        """
        with self._lock:
            fewest = task.cached_tokens
            task.cached_tokens = cached_tokens if fewest is None else min(fewest, cached_tokens)
            self._line_of[context].running[context] -= 1
            task.choices[choice] = result
            task.unfinished -= 1
            if error is not None:
                task.error = error
                task.cancelled = True
                self.cancels += 1
                self._withdraw(task)
            if task.unfinished:
                return False
            self._tasks.pop(task.key, None)
            task.state = State.GONE
            return True

    @property
    def running(self) -> int:
        """Slots in use over all contexts."""
        return sum(line.running[context] for context, line in enumerate(self._line_of))

    # ------------------------------------------------ under the lock

    def _withdraw(self, task: Task) -> bool:
        """Choices that have not started never will. True if the task ends with that."""
        waiting = len(task.choices) - task.next_choice
        for choice in range(task.next_choice, len(task.choices)):
            task.choices[choice] = Choice("", CANCELLED, 0)
        task.next_choice = len(task.choices)
        task.unfinished -= waiting
        self._lines[task.lane].choices -= waiting
        if waiting and task.unfinished == 0:
            self._tasks.pop(task.key, None)
            task.state = State.GONE
            return True
        return False

    def _forget(self, task: Task) -> None:
        if task.state is State.READY:
            self._lines[task.lane].choices -= len(task.choices)
        task.state = State.GONE
        del self._tasks[task.key]
