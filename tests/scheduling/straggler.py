"""A request that runs on a slow rank while another rank is idle: what tests of copies begin with."""

from __future__ import annotations

from scheduling.control import ControlPlane, Limits
from scheduling.copies import Copier
from scheduling.estimates import LengthEstimator
from scheduling.events import (
    Assign,
    Event,
    InputEnded,
    Instruction,
    NewRequest,
    Reported,
    RequestsArrived,
    WorkerReady,
)
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerState
from tests.scheduling.fakes import answer

FAST, SLOW, IT = 1, 2, 1
LIMIT = 100


def report(worker: int, started: tuple[int, ...] = (), *finished: tuple[int, int], made: int = 0) -> Reported:
    answers = [answer(index, attempt, output_tokens=LIMIT) for index, attempt in finished]
    return Reported(worker, [(index, 1) for index in started], answers, [], made)


class Play:
    """A run of two ranks whose input has two requests of the same length; request 1 runs on the slow rank."""

    def __init__(
        self, *, slower: float = 10.0, schedule: str = "work-stealing", slots: int = 1, **limits: float
    ) -> None:
        self.now = 0.0
        self.plane = ControlPlane([FAST, SLOW], schedule, 0.0, limits=Limits(prefetch=0, **limits))  # type: ignore[arg-type]
        self.tell(WorkerReady(FAST, slots), WorkerReady(SLOW, 1))
        self.tell(RequestsArrived([NewRequest(index, 10, LIMIT) for index in range(2)]), InputEnded())
        self.tell(report(FAST, (0,)), report(SLOW, (IT,)))
        self.at(1.0, report(FAST, made=LIMIT), report(SLOW, made=int(LIMIT / slower)))
        self.at(2.0, report(SLOW, made=int(LIMIT / slower)))

    def tell(self, *events: Event) -> list[Instruction]:
        out = []
        for event in events:
            out += self.plane.handle(event, self.now)
            self.plane.check()
        return out

    def at(self, now: float, *events: Event) -> list[Instruction]:
        self.now = now
        return self.tell(*events)

    def end_of_others(self) -> list[Instruction]:
        """Request 0 ends at the fast rank, which is idle then."""
        return self.at(2.5, report(FAST, (), (0, 1)))


COPY = Assign(FAST, [(IT, 2)])


def copied(*, runs: bool, deaths: int = 3) -> Play:
    """The original is attempt 1 on the slow rank, the copy attempt 2 on the fast one."""
    play = Play(deaths=deaths)
    assert COPY in play.end_of_others()
    if runs:
        play.at(2.6, Reported(FAST, [(IT, 2)], [], []))
    return play


def desk(
    *,
    slots: tuple[int, int],
    paces: tuple[float | None, float | None],
    started_at: tuple[float, ...],
    limit: int = LIMIT,
    outputs: tuple[int, ...] = (LIMIT,),
    at: float = 4.0,
    limits: Limits | None = None,
) -> tuple[Ledger, Copier]:
    """Rank 1 is idle, rank 2 runs a request since each of `started_at`; both were heard and measured at `at`."""
    ledger = Ledger([1, 2], 0.0)
    lengths = LengthEstimator()
    for output in outputs:
        lengths.observe(limit, output)
    copier = Copier(ledger, lengths, limits or Limits(copy_interval_s=0.0), Horizon(), lambda worker: None)
    for worker, count, pace in zip(ledger.workers.values(), slots, paces, strict=True):
        worker.state, worker.slots, worker.heard = WorkerState.READY, count, at
        if pace is not None:
            running = RequestEntry(-1, 1.0, None)
            copier.note_report(worker, 0, at - 1000 * pace)
            worker.running[-1] = running
            copier.note_report(worker, 1000, at)
            del worker.running[-1]
    for index, since in enumerate(started_at):
        request = RequestEntry(index, 10.0, limit)
        ledger.add(request)
        ledger.move(request, ledger.workers[2], Phase.RUNNING)
        request.started_at = since
    ledger.highest = len(started_at) - 1
    return ledger, copier
