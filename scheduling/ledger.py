"""The books of the control plane: which requests live, in which phase, and who owns them.

Every change of hands goes through `move`, `copy`, `part`, `end` or `forget`, which keep the owners' books, the load of
each worker and the count of unstarted requests together. The ledger decides nothing: what events mean is
`scheduling.control`'s, who gets what next is `scheduling.dispatch`'s, what runs twice is `scheduling.copies`'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from scheduling.errors import BugError, ProtocolError


class Phase(Enum):
    """Of a request that lives."""

    WAITING = "waiting"
    QUEUED = "queued"
    RECALLED = "recalled"
    RUNNING = "running"


class WorkerState(Enum):
    """JOINING: expected, engine not loaded (or loading again). GONE: takes no work; may come back as READY."""

    JOINING = "joining"
    READY = "ready"
    GONE = "gone"


class RequestEntry:
    """One live request. `cost` is its estimated tokens; `stolen_from` the victim it was last taken from.

    `steps`: how long it is estimated to run (`scheduling.horizon`). `started_at`: when its owner said that it runs;
    None while it does not, or where that was never said.

    A request that runs twice has two entries, each with an owner and an attempt of its own, which know each other as
    `twin`: the one that `Ledger.live` has, which runs, and its copy, which is queued or runs. `attempts` is the highest
    attempt that was given out.
    """

    __slots__ = (
        "index", "attempt", "attempts", "cost", "steps", "limit", "phase", "owner", "deaths", "stolen_from", "history",
        "twin", "started_at",
    )  # fmt: skip

    def __init__(self, index: int, cost: float, limit: int | None, steps: float = 0.0) -> None:
        self.index = index
        self.attempt = self.attempts = 1
        self.cost = cost
        self.steps = steps
        self.limit = limit
        self.phase = Phase.WAITING
        self.owner: int | None = None
        self.deaths = 0
        self.stolen_from: int | None = None
        self.history: tuple[str, ...] = ()
        self.twin: RequestEntry | None = None
        self.started_at: float | None = None

    def renew(self) -> None:
        """What is said of earlier attempts is late from now on."""
        self.attempts += 1
        self.attempt = self.attempts

    def __repr__(self) -> str:
        return f"request {self.index} (attempt {self.attempt}, {self.phase.value}, owner {self.owner})"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What others may know of a worker."""

    id: int
    state: WorkerState
    slots: int
    queued: int
    running: int
    load_tokens: float
    requests: int
    failed: int
    stolen_in: int
    stolen_out: int
    engine_losses: int
    reason: str
    silent: bool
    """GONE without a word: its lease ran out. Nothing can be asked of it."""
    heard: float
    """When it last said something."""


TARGET_UNKNOWN = 16
"""What a worker counts for that has not said how many slots it has."""


class WorkerEntry:
    """One worker as rank 0 sees it. The three dicts hold what it owns, by index, oldest assignment first."""

    __slots__ = (
        "id", "state", "slots", "queued", "running", "recalled", "load_tokens", "heard", "rate",
        "rate_since", "rate_count", "target", "longest_queued", "stolen_in", "stolen_out", "requests", "failed",
        "engine_losses", "reason", "silent", "apart",
    )  # fmt: skip

    def __init__(self, worker: int, now: float) -> None:
        self.id = worker
        self.state = WorkerState.JOINING
        self.slots = 0
        self.queued: dict[int, RequestEntry] = {}
        self.running: dict[int, RequestEntry] = {}
        self.recalled: dict[int, RequestEntry] = {}
        self.load_tokens = 0.0
        self.longest_queued = 0.0
        """No queued request has more steps. That all have fewer `scheduling.deadline` finds out."""
        self.heard = now
        self.rate = 0.0
        self.rate_since = now
        self.rate_count = 0
        self.target = TARGET_UNKNOWN
        self.stolen_in = 0
        self.stolen_out = 0
        self.requests = 0
        self.failed = 0
        self.engine_losses = 0
        self.reason = ""
        self.silent = False
        self.apart = False
        """It runs one suspect, alone, and is given nothing beside it."""

    @property
    def owned(self) -> int:
        return len(self.queued) + len(self.running) + len(self.recalled)

    @property
    def stealable(self) -> int:
        """Queued requests that no slot is free for."""
        free = self.slots - len(self.running) - len(self.recalled)
        return len(self.queued) - max(0, free)

    def unstarted(self) -> list[int]:
        """What is queued, in its order, but for copies of what runs elsewhere: those stay where they are."""
        return [index for index, request in self.queued.items() if request.twin is None]

    def view(self) -> WorkerView:
        return WorkerView(
            self.id, self.state, self.slots, len(self.queued), len(self.running), self.load_tokens, self.requests,
            self.failed, self.stolen_in, self.stolen_out, self.engine_losses, self.reason, self.silent,
            self.heard,
        )  # fmt: skip

    def holdings(self) -> list[RequestEntry]:
        """All that it owns: queued, recalled, running."""
        return [*self.queued.values(), *self.recalled.values(), *self.running.values()]

    def holder(self, phase: Phase) -> dict[int, RequestEntry]:
        if phase is Phase.QUEUED:
            return self.queued
        return self.running if phase is Phase.RUNNING else self.recalled


@dataclass(slots=True)
class Totals:
    """Counts of requests since the start. `done` and `failed` are durable; `late` answers were dropped.

    `copies` were made of requests that ran, `copies_won` of them answered first. `wasted_tokens`: output of those that
    did not, or of the requests they were copies of; estimated where it never came. Left for the next session:
    `unfinished`, given up while a worker had them, and `set_aside`, which were not started because they would not have
    ended in time.
    """

    accepted: int = 0
    rejected: int = 0
    done: int = 0
    failed: int = 0
    late: int = 0
    retried: int = 0
    recalls: int = 0
    stolen: int = 0
    copies: int = 0
    copies_won: int = 0
    wasted_tokens: int = 0
    unfinished: int = 0
    set_aside: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Ledger:
    """All requests that live and all workers. `unstarted` counts those of which no entry runs.

    `highest` is the highest index that has arrived; `totals` counts what has become of requests.
    """

    __slots__ = ("live", "workers", "unstarted", "highest", "totals")

    def __init__(self, workers: Iterable[int], now: float, first_index: int = 0) -> None:
        self.live: dict[int, RequestEntry] = {}
        self.workers: dict[int, WorkerEntry] = {worker: WorkerEntry(worker, now) for worker in workers}
        self.unstarted = 0
        self.highest = first_index - 1
        self.totals = Totals()

    def worker(self, worker: int) -> WorkerEntry:
        known = self.workers.get(worker)
        if known is None:
            raise ProtocolError(f"rank {worker} is no worker of this job: its workers are {sorted(self.workers)}")
        return known

    def add(self, request: RequestEntry) -> None:
        self.live[request.index] = request
        self.unstarted += 1

    def owned(self, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        """The entry of the live request that this worker owns in this attempt, if there is one."""
        request = self.live.get(index)
        if request is not None and request.twin is not None and request.owner != worker.id:
            request = request.twin
        if request is None or request.owner != worker.id or request.attempt != attempt:
            return None
        return request

    def streams(self, worker: WorkerEntry, index: int, attempt: int) -> bool:
        """Whether new text of this attempt is passed on: of two that run only that of the first is."""
        request = self.live.get(index)
        return request is not None and request.owner == worker.id and request.attempt == attempt

    def refuse_unseen(self, index: int, worker: WorkerEntry) -> None:
        if not 0 <= index <= self.highest:
            raise ProtocolError(f"rank {worker.id} reports request {index}, which never arrived")

    def move(self, request: RequestEntry, worker: WorkerEntry | None, phase: Phase) -> None:
        """Change phase and owner together with the owners' books."""
        if request.owner is not None:
            old = self.workers[request.owner]
            del old.holder(request.phase)[request.index]
            old.load_tokens -= request.cost
        if request.twin is not None:
            pass  # its twin runs, whatever becomes of this one
        elif phase is Phase.RUNNING:
            self.unstarted -= request.phase is not Phase.RUNNING
        else:
            self.unstarted += request.phase is Phase.RUNNING
        request.phase = phase
        request.started_at = None
        request.owner = None if worker is None else worker.id
        if worker is not None:
            worker.holder(phase)[request.index] = request
            worker.load_tokens += request.cost
            if phase is Phase.QUEUED and request.steps > worker.longest_queued:
                worker.longest_queued = request.steps

    def copy(self, request: RequestEntry, worker: WorkerEntry) -> RequestEntry:
        """Give a request that runs a second entry, queued at another worker, in an attempt of its own."""
        request.attempts += 1
        twin = RequestEntry(request.index, request.cost, request.limit, request.steps)
        twin.attempt = twin.attempts = request.attempts
        twin.twin, request.twin = request, twin
        self.move(twin, worker, Phase.QUEUED)
        return twin

    def part(self, request: RequestEntry) -> RequestEntry:
        """One of two entries leaves the books; the other, which is returned, is the request from now on."""
        other = request.twin
        if other is None or request.owner is None:
            raise BugError(f"{request} has no twin")
        owner = self.workers[request.owner]
        del owner.holder(request.phase)[request.index]
        owner.load_tokens -= request.cost
        request.twin = other.twin = None
        self.live[other.index] = other
        self.unstarted += other.phase is not Phase.RUNNING
        other.attempts = max(other.attempts, request.attempts)
        return other

    def end(self, request: RequestEntry, worker: WorkerEntry) -> None:
        """An owned request, which runs once, has ended."""
        del worker.holder(request.phase)[request.index]
        worker.load_tokens -= request.cost
        self.unstarted -= request.phase is not Phase.RUNNING
        del self.live[request.index]

    def forget(self, request: RequestEntry) -> None:
        """A waiting request leaves the books."""
        del self.live[request.index]
        self.unstarted -= 1

    def abandon(self, request: RequestEntry) -> None:
        """A waiting request leaves without an end: the next start of the run takes it up."""
        self.forget(request)
        self.totals.accepted -= 1

    def check(self) -> None:
        """Verify the books, linear in what lives.

        Raises:
            BugError: something does not add up.
        """
        seen: set[tuple[int, int]] = set()
        unstarted = sum(request.phase is Phase.WAITING for request in self.live.values())
        for worker in self.workers.values():
            load = 0.0
            for phase in (Phase.QUEUED, Phase.RECALLED, Phase.RUNNING):
                for index, request in worker.holder(phase).items():
                    # Called after every event of a simulation: the stories are told only when they are needed.
                    first = self.live.get(index)
                    if first is not request and (first is None or first.twin is not request):
                        raise BugError(f"{request} does not live")
                    if request.phase is not phase or request.owner != worker.id:
                        raise BugError(f"{request} is misfiled")
                    if (index, request.attempt) in seen:
                        raise BugError(f"{request} is owned twice")
                    seen.add((index, request.attempt))
                    load += request.cost
                    unstarted += request.twin is None and phase is not Phase.RUNNING
            longest = max((request.steps for request in worker.queued.values()), default=0.0)
            must(longest <= worker.longest_queued, f"rank {worker.id} has a longer request queued than it is said to")
            must(abs(load - worker.load_tokens) < 1e-6 * max(1.0, load), f"load of rank {worker.id} is off")
            must(worker.state is WorkerState.READY or not worker.owned, f"rank {worker.id} owns but is not ready")
        for request in self.live.values():
            self._check_attempts(request, seen)
        must(unstarted == self.unstarted, "the count of unstarted requests is off")

    @staticmethod
    def _check_attempts(request: RequestEntry, seen: set[tuple[int, int]]) -> None:
        must(request.attempt <= request.attempts, f"{request} has an attempt that was not given out")
        if (twin := request.twin) is None:
            return
        must(twin.twin is request, f"{request} has a twin that does not know it")
        must(
            request.phase is Phase.RUNNING and twin.phase is not Phase.RECALLED, f"{request} is copied without running"
        )
        must(request.owner != twin.owner, f"{request} runs twice at one worker")
        must(request.attempt < twin.attempt <= request.attempts, f"{request} has a copy of an older attempt")
        must({(one.index, one.attempt) for one in (request, twin)} <= seen, f"{request} has a twin that nobody owns")


def must(holds: bool, story: str) -> None:
    """An invariant: raises BugError with the story unless it holds."""
    if not holds:
        raise BugError(story)
