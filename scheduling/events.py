"""What happens to the control plane (events) and what it wants done (instructions): one frozen type each.

`ControlPlane.handle(event, now)` takes an event and returns instructions; nothing else changes its state. Items
inside an event or an instruction come in lists because everything here is done in batches: one event per
message received, not one per request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from scheduling.messages import Delta, Finished

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker's engine has loaded; it can run `slots` sequences at once."""

    worker: int
    slots: int


class NewRequest(msgspec.Struct, frozen=True, gc=False):
    """A request as the control plane knows it: a number and a size, no text.

    `output_limit` None means the run's default limit applies.
    """

    index: int
    prompt_tokens: int
    output_limit: int | None = None


@dataclass(frozen=True, slots=True)
class RequestsArrived:
    requests: list[NewRequest]


@dataclass(frozen=True, slots=True)
class RequestRejected:
    """A line of the input that is no request. It ends at once, as failed, with `reason`."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class InputEnded:
    """No more requests will arrive."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker's progress. `started` holds (index, attempt) pairs. `made_tokens` are of requests that run, too."""

    worker: int
    started: list[tuple[int, int]]
    finished: list[Finished]
    deltas: list[Delta]
    made_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RecallConfirmed:
    """A victim's answer: `indexes` had not been started, and it has forgotten them."""

    worker: int
    recall: int
    indexes: list[int]


@dataclass(frozen=True, slots=True)
class EngineLost:
    """A worker's engine died; the worker lives. It holds none of its requests any more."""

    worker: int
    reason: str
    started: list[tuple[int, int]]
    unstarted: list[tuple[int, int]]
    restarting: bool


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone: its process died, its lease ran out, or it gave up."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Committed:
    """The next `count` records, in the order in which they were instructed, are durable."""

    count: int


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Start nothing new, let what runs finish, then stop. What still runs at `give_up_at` is given up; None: never.

    Of several that come, the earliest time counts.
    """

    reason: str
    give_up_at: float | None = None


@dataclass(frozen=True, slots=True)
class TimeLimited:
    """Start nothing that is not expected to end by `end_at`. What still runs then is given up. It may come again."""

    end_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker said something that changes nothing but proves that it lives."""

    worker: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: leases and limits are looked at."""


Event = (
    WorkerReady
    | RequestsArrived
    | RequestRejected
    | InputEnded
    | Reported
    | RecallConfirmed
    | EngineLost
    | WorkerLost
    | Committed
    | DrainRequested
    | TimeLimited
    | Heard
    | Tick
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Assign:
    """Send these (index, attempt) pairs to a worker. `stolen`: from index to victim, of those that were stolen.

    It may be the second attempt of a request that another worker runs.
    """

    worker: int
    items: list[tuple[int, int]]
    stolen: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recall:
    worker: int
    recall: int
    indexes: list[int]


@dataclass(frozen=True, slots=True)
class Cancel:
    """A worker is to stop these (index, attempt) pairs: what it says of them is late from now on."""

    worker: int
    items: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Record:
    """Write these answers to the record, in this order; `Committed` is expected for each."""

    worker: int
    finished: list[Finished]


@dataclass(frozen=True, slots=True)
class Drop:
    """These (index, attempt) answers of a worker came late and go nowhere; its own books still count them."""

    worker: int
    answers: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Fail:
    """Write a failure of our own making to the record; `Committed` is expected for it."""

    index: int
    attempt: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """These (index, attempt) pairs stay unanswered in this session, and are forgotten: the next one answers them.

    `worker` still runs them, or holds them: what it says of them is late. None: nobody has them.
    """

    worker: int | None
    items: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Stream:
    """Pass new text on to whoever listens."""

    deltas: list[Delta]


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Tell all workers whether unstarted work is left anywhere."""

    empty: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing is left to do: `outcome` is "done", "drained" or "no workers"."""

    outcome: str
    reason: str


Instruction = Assign | Recall | Cancel | Record | Drop | Fail | GiveUp | Stream | Exhausted | Stop
