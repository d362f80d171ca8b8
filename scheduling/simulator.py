"""A simulated cluster around the real control plane: what a schedule costs, without a GPU, a rank or a clock.

`simulate` plays discrete events: workers with slots and speeds, messages that take `latency_s` each way, a reader
that has every line at hand, a record that is durable at once. The control plane is the very one of a real run and
knows as little as there: all requests look alike to it, their lengths come out when they end. Once a second a worker
says how many tokens it has made. `list_schedule` and `lower_bound` say what is possible.

Everything is deterministic: randomness is in the lengths that the caller gives. This module must not know how a
policy decides, nor reach into the plane.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduling import events as ev
from scheduling.control import ControlPlane, Limits
from scheduling.messages import Finished

PROMPT_TOKENS = 64
"""The size that every request has in the control plane's eyes."""
TOKENS_PER_S = 100
"""What a slot of speed 1 makes of a request."""
BEAT_S = 1.0
"""How often a worker says how many tokens it has made, and that it lives."""
TICK_S = 0.25

_TO_PLANE, _TO_WORKER, _END, _BEAT, _TICK = range(5)

_What = ev.Event | ev.Instruction | tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came out. Times in seconds.

    makespan_s: until rank 0 has the last answer. busy_s: per worker, summed over its slots. requests: per worker, those
    it was the first to answer. free_slot_s: slot-seconds that were free while an unstarted request existed anywhere;
    slot_s: all slot-seconds until the last request ended. messages: but for those that are sent once a second.
    wasted_s: slot-seconds of what ran twice and did not answer first.
    """

    makespan_s: float
    busy_s: tuple[float, ...]
    requests: tuple[int, ...]
    stolen: int
    recalls: int
    free_slot_s: float
    slot_s: float
    messages: int
    copies: int
    copies_won: int
    wasted_s: float


def simulate(
    service_s: Sequence[float] | Callable[[int], float],
    speeds: Sequence[float],
    schedule: str,
    *,
    requests: int | None = None,
    slots: int = 1,
    latency_s: float = 0.001,
    ready_s: Sequence[float] | None = None,
    limits: Limits | None = None,
) -> Simulated:
    """Run requests through the control plane on simulated workers.

    Args:
        service_s: seconds that request k takes in a slot of speed 1; if callable, `requests` says how many there are.
        speeds: one per worker; a slot of speed 2 takes half as long.
        schedule: a policy's name.
        slots: of each worker.
        latency_s: of a message, either way.
        ready_s: when each worker's engine has loaded; at once by default.

    Raises:
        ConfigError: no schedule has this name.
        ValueError: a callable without `requests`.
    """
    if callable(service_s):
        if requests is None:
            raise ValueError("service times given as a function need the number of requests")
        service_s = [service_s(k) for k in range(requests)]
    cluster = _Cluster(service_s, speeds, schedule, slots, latency_s, limits or Limits(lease_s=None))
    return cluster.run(ready_s or [0.0] * len(speeds))


class _Worker:
    """A simulated rank: a backlog in order of arrival, a number of free slots, and since when each request runs."""

    __slots__ = ("speed", "free", "backlog", "busy_s", "requests", "running", "tokens", "counted_at")

    def __init__(self, speed: float, slots: int) -> None:
        self.speed = speed
        self.free = slots
        self.backlog: deque[tuple[int, int]] = deque()
        self.busy_s = 0.0
        self.requests = 0
        self.running: dict[tuple[int, int], float] = {}
        self.tokens = 0.0
        self.counted_at = 0.0

    def count(self, now: float) -> None:
        """Tokens made until now. To be called before what runs changes."""
        self.tokens += len(self.running) * (now - self.counted_at) * self.speed * TOKENS_PER_S
        self.counted_at = now


class _Cluster:
    def __init__(
        self,
        service_s: Sequence[float],
        speeds: Sequence[float],
        schedule: str,
        slots: int,
        latency_s: float,
        limits: Limits,
    ) -> None:
        self._service_s = service_s
        self._slots = slots
        self._latency_s = latency_s
        self._workers = [_Worker(speed, slots) for speed in speeds]
        tokens = [math.ceil(length_s * TOKENS_PER_S) for length_s in service_s]
        self._plane = ControlPlane(
            range(len(speeds)), schedule, 0.0, limits=limits, output_limit_default=max([512, *tokens])
        )
        self._heap: list[tuple[float, int, int, int, _What]] = []
        self._sequence = 0
        self._messages = 0
        self._underway = 0
        self._useful_s = 0.0
        self._started: set[int] = set()
        self._read = 0
        self._unstarted = len(service_s)
        self._free = 0
        self._free_slot_s = 0.0
        self._looked_at = 0.0
        self._ended_at = 0.0

    def run(self, ready_s: Sequence[float]) -> Simulated:
        for worker, at in enumerate(ready_s):
            self._push(at + self._latency_s, _TO_PLANE, worker, ev.WorkerReady(worker, self._slots))
            self._push(at + BEAT_S, _BEAT, worker, None)
        self._push(TICK_S, _TICK, 0, None)
        now = 0.0
        self._tell(None, now)
        while self._underway and not self._plane.finished:
            now, _, kind, worker, what = heapq.heappop(self._heap)
            self._underway -= kind not in (_BEAT, _TICK)
            if kind == _TICK:
                self._push(now + TICK_S, _TICK, 0, None)
                self._tell(ev.Tick(), now)
            elif kind == _BEAT:
                self._beat(worker, now)
            elif kind == _END:
                self._end(worker, what, now)  # type: ignore[arg-type]
            elif kind == _TO_PLANE:
                if isinstance(what, ev.WorkerReady):
                    self._pass_time(now)
                    self._free += self._slots
                self._tell(what, now)  # type: ignore[arg-type]
            elif isinstance(what, ev.Assign):
                self._workers[worker].backlog.extend(what.items)
                self._start(worker, [], now)
            elif isinstance(what, ev.Recall):
                self._give_back(worker, what, now)
            elif isinstance(what, ev.Cancel):
                self._cancel(worker, what.items, now)
        for worker_left in self._workers:  # what was cancelled and has not heard of it yet ends with the run
            worker_left.busy_s += sum(now - since for since in worker_left.running.values())
        totals = self._plane.totals
        return Simulated(
            makespan_s=now,
            busy_s=tuple(worker.busy_s for worker in self._workers),
            requests=tuple(worker.requests for worker in self._workers),
            stolen=totals.stolen,
            recalls=totals.recalls,
            free_slot_s=self._free_slot_s,
            slot_s=self._ended_at * self._slots * len(self._workers),
            messages=self._messages,
            copies=totals.copies,
            copies_won=totals.copies_won,
            wasted_s=max(0.0, sum(worker.busy_s for worker in self._workers) - self._useful_s),
        )

    def _push(self, at: float, kind: int, worker: int, what: _What) -> None:
        self._sequence += 1
        self._messages += kind in (_TO_PLANE, _TO_WORKER)
        self._underway += kind not in (_BEAT, _TICK)
        heapq.heappush(self._heap, (at, self._sequence, kind, worker, what))

    def _pass_time(self, now: float) -> None:
        if self._unstarted:
            self._free_slot_s += self._free * (now - self._looked_at)
        self._looked_at = now

    # ------------------------------------------------------------ rank 0

    def _tell(self, event: ev.Event | None, now: float) -> None:
        """One event for the plane, then as many lines as it wants, then what it instructs, on its way."""
        out = [] if event is None else self._plane.handle(event, now)
        total = len(self._service_s)
        if self._read < total and (wanted := self._plane.wanted()):
            last = min(total, self._read + wanted)
            new = [ev.NewRequest(index, PROMPT_TOKENS) for index in range(self._read, last)]
            self._read = last
            out += self._plane.handle(ev.RequestsArrived(new), now)
        if self._read == total and not self._plane.input_ended:
            out += self._plane.handle(ev.InputEnded(), now)
        for instruction in out:
            if isinstance(instruction, (ev.Assign, ev.Recall, ev.Cancel)):
                self._push(now + self._latency_s, _TO_WORKER, instruction.worker, instruction)
            elif isinstance(instruction, ev.Record):
                worker = self._workers[instruction.worker]
                worker.requests += len(instruction.finished)
                self._useful_s += sum(self._service_s[answer.index] for answer in instruction.finished) / worker.speed
                self._plane.handle(ev.Committed(len(instruction.finished)), now)

    # ------------------------------------------------------------ a worker

    def _beat(self, number: int, now: float) -> None:
        worker = self._workers[number]
        worker.count(now)
        made = int(worker.tokens)
        worker.tokens -= made
        self._tell(ev.Reported(number, [], [], [], made), now)
        self._push(now + BEAT_S, _BEAT, number, None)

    def _end(self, number: int, request: tuple[int, int], now: float) -> None:
        """A request has ended: the slot takes the next, and one report says both."""
        if request in self._workers[number].running:  # else it was cancelled
            self._ended_at = now
            self._start(number, [self._stop(number, request, now)], now)

    def _stop(self, number: int, request: tuple[int, int], now: float) -> Finished:
        """Free the slot of what runs. Returns what was made of it."""
        self._pass_time(now)
        worker = self._workers[number]
        worker.count(now)
        ran_s = now - worker.running.pop(request)
        worker.free += 1
        self._free += 1
        worker.busy_s += ran_s
        tokens = max(1, round(ran_s * worker.speed * TOKENS_PER_S))
        return Finished(request[0], request[1], True, PROMPT_TOKENS, tokens, b"")

    def _start(self, number: int, finished: list[Finished], now: float) -> None:
        self._pass_time(now)
        worker = self._workers[number]
        worker.count(now)
        started = []
        while worker.free and worker.backlog:
            request = worker.backlog.popleft()
            worker.free -= 1
            self._free -= 1
            self._unstarted -= request[0] not in self._started
            self._started.add(request[0])
            worker.running[request] = now
            started.append(request)
            self._push(now + self._service_s[request[0]] / worker.speed, _END, number, request)
        if started or finished:
            self._push(now + self._latency_s, _TO_PLANE, number, ev.Reported(number, started, finished, []))

    def _cancel(self, number: int, items: list[tuple[int, int]], now: float) -> None:
        worker = self._workers[number]
        finished = []
        for request in items:
            if request in worker.running:
                finished.append(self._stop(number, request, now))
        worker.backlog = deque(request for request in worker.backlog if request not in items)
        self._start(number, finished, now)

    def _give_back(self, number: int, recall: ev.Recall, now: float) -> None:
        worker = self._workers[number]
        asked = set(recall.indexes)
        returned = [index for index, _ in worker.backlog if index in asked]
        worker.backlog = deque(item for item in worker.backlog if item[0] not in asked)
        self._push(now + self._latency_s, _TO_PLANE, number, ev.RecallConfirmed(number, recall.recall, returned))


# ---------------------------------------------------------------- what is possible


def list_schedule(service_s: Sequence[float], speeds: Sequence[float], slots: int = 1) -> float:
    """Makespan of zero-latency list scheduling: whenever a slot is free it takes the next request of the list.

    Of several free slots the fastest takes it. Graham, "Bounds on multiprocessing timing anomalies" (1969).
    """
    free = [(0.0, -speed) for speed in sorted(speeds, reverse=True) for _ in range(slots)]
    makespan_s = 0.0
    for length_s in service_s:
        at, minus_speed = free[0]
        at -= length_s / minus_speed
        heapq.heapreplace(free, (at, minus_speed))
        makespan_s = max(makespan_s, at)
    return makespan_s


def lower_bound(service_s: Sequence[float], speeds: Sequence[float], slots: int = 1) -> float:
    """No schedule without preemption is faster, in seconds.

    All work over all speed; and for each k the k longest requests over the k fastest slots, as no more than k slots
    can work on them at a time. Liu and Liu, "Bounds on scheduling algorithms for heterogeneous systems" (1974).
    """
    fastest = sorted((speed for speed in speeds for _ in range(slots)), reverse=True)
    bound_s = sum(service_s) / sum(fastest)
    work_s = speed = 0.0
    for length_s, slot_speed in zip(heapq.nlargest(len(fastest), service_s), fastest, strict=False):
        work_s += length_s
        speed += slot_speed
        bound_s = max(bound_s, work_s / speed)
    return bound_s
