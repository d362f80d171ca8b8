"""A steal and what may come between its steps: whatever does, each request has one owner and is recorded once."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduling.control import ControlPlane, Limits
from scheduling.events import (
    Committed,
    EngineLost,
    Event,
    InputEnded,
    Instruction,
    NewRequest,
    Recall,
    RecallConfirmed,
    Record,
    Reported,
    RequestsArrived,
    Stop,
    WorkerLost,
    WorkerReady,
)
from scheduling.ledger import Phase
from tests.scheduling.fakes import answer

VICTIM, THIEF = 1, 2
REQUESTS = 6
RECALLED = [1, 2, 3]


class Steal:
    """The victim runs request 0 and has the rest queued; the idle thief has had requests 1 to 3 recalled."""

    def __init__(self) -> None:
        self.plane = ControlPlane([VICTIM, THIEF], "work-stealing", 0.0, limits=Limits(prefetch=6, lease_s=None))
        self.recorded: Counter[int] = Counter()
        self.stopped: list[Stop] = []
        self.tell(WorkerReady(VICTIM, 1))
        self.tell(RequestsArrived([NewRequest(index, 10) for index in range(REQUESTS)]))
        self.tell(InputEnded())
        self.tell(Reported(VICTIM, [(0, 1)], [], []))
        (recall,) = [one for one in self.tell(WorkerReady(THIEF, 2)) if isinstance(one, Recall)]
        assert (recall.worker, recall.recall) == (VICTIM, 0)
        self.recalled = recall.indexes

    def tell(self, event: Event) -> list[Instruction]:
        out = self.plane.handle(event, 1.0)
        self.plane.check()  # nobody is owned twice, or by somebody who is gone
        for one in out:
            if isinstance(one, Record):
                self.recorded.update(each.index for each in one.finished)
            elif isinstance(one, Stop):
                self.stopped.append(one)
        if unacknowledged := self.plane.unacknowledged:
            self.tell(Committed(unacknowledged))
        return out

    def owner(self, index: int) -> int | None:
        entry = self.plane._ledger.live.get(index)
        return None if entry is None else entry.owner

    def attempt(self, index: int) -> int:
        return self.plane._ledger.live[index].attempt

    def finish(self, worker: int, index: int, attempt: int = 1) -> list[Instruction]:
        return self.tell(Reported(worker, [(index, attempt)], [answer(index, attempt)], []))

    def finish_all(self) -> None:
        """Everybody confirms what is asked of them and answers what they own; then every request is recorded once."""
        for number in range(self.plane.next_recall):
            for worker in (VICTIM, THIEF):
                if (recall := self.plane._dispatcher._recalls.get(number)) is not None and recall.victim == worker:
                    self.tell(RecallConfirmed(worker, number, []))
        while live := list(self.plane._ledger.live.values()):
            for entry in live:
                assert entry.owner is not None, f"{entry} is nobody's, and {self.plane.workers()} could have it"
                self.finish(entry.owner, entry.index, entry.attempt)
        assert self.recorded == Counter(range(REQUESTS))
        assert [stop.outcome for stop in self.stopped] == ["done"]


@pytest.fixture
def steal() -> Steal:
    return Steal()


def test_what_the_victim_finishes_before_it_confirms_is_its_own(steal: Steal) -> None:
    first, *rest = steal.recalled
    steal.finish(VICTIM, first)
    steal.tell(RecallConfirmed(VICTIM, 0, rest))
    assert steal.recorded[first] == 1
    assert {steal.owner(index) for index in rest} == {THIEF}
    steal.finish_all()


def test_what_the_victim_finishes_after_it_has_given_it_back_is_dropped(steal: Steal) -> None:
    first, *_ = steal.recalled
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))
    steal.finish(VICTIM, first)
    assert (steal.recorded[first], steal.owner(first), steal.plane.totals.late) == (0, THIEF, 1)
    steal.finish_all()


def test_when_the_victim_dies_before_it_confirms_the_thief_has_all_in_another_attempt(steal: Steal) -> None:
    steal.tell(WorkerLost(VICTIM, "killed"))
    assert {steal.owner(index) for index in range(REQUESTS)} == {THIEF}
    assert {steal.attempt(index) for index in range(REQUESTS)} == {2}
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))  # what it said before it died
    steal.finish(VICTIM, steal.recalled[0])
    assert not steal.recorded, "its answers are of an older attempt"
    steal.finish_all()


def test_when_the_victims_engine_dies_the_confirmation_of_before_settles_nothing(steal: Steal) -> None:
    steal.tell(EngineLost(VICTIM, "killed", [(0, 1)], [(index, 1) for index in range(1, REQUESTS)], True))
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))
    steal.tell(WorkerReady(VICTIM, 1))
    assert steal.attempt(0) == 2
    assert {steal.attempt(index) for index in range(1, REQUESTS)} == {1}, "what had not started needs no other attempt"
    steal.finish_all()


def test_when_the_thief_dies_before_the_confirmation_the_victim_has_its_own_back(steal: Steal) -> None:
    steal.tell(WorkerLost(THIEF, "killed"))
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))
    assert {steal.owner(index) for index in range(REQUESTS)} == {VICTIM}
    assert {steal.attempt(index) for index in range(REQUESTS)} == {1}
    assert steal.plane.totals.stolen == 0
    steal.finish_all()


def test_when_the_thief_dies_with_what_it_took_the_victim_has_it_in_another_attempt(steal: Steal) -> None:
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))
    steal.tell(WorkerLost(THIEF, "killed"))
    assert {steal.owner(index) for index in range(REQUESTS)} == {VICTIM}
    assert {steal.attempt(index) for index in steal.recalled} == {2}
    steal.finish(THIEF, steal.recalled[0])
    assert not steal.recorded
    steal.finish_all()


def test_when_both_die_nothing_is_owned_until_somebody_is_there_again(steal: Steal) -> None:
    steal.tell(EngineLost(VICTIM, "killed", [(0, 1)], [(index, 1) for index in range(1, REQUESTS)], True))
    steal.tell(EngineLost(THIEF, "killed", [], [], True))
    assert {steal.owner(index) for index in range(REQUESTS)} == {None}
    steal.tell(WorkerReady(THIEF, 2))
    steal.tell(WorkerReady(VICTIM, 1))
    steal.finish_all()


@pytest.mark.parametrize("again", [[], RECALLED])
def test_a_stale_confirmation_changes_nothing(steal: Steal, again: list[int]) -> None:
    steal.tell(RecallConfirmed(VICTIM, 0, steal.recalled))
    before = {index: steal.owner(index) for index in range(REQUESTS)}
    steal.tell(RecallConfirmed(VICTIM, 0, again))
    assert {index: steal.owner(index) for index in range(REQUESTS)} == before
    assert all(entry.phase is not Phase.WAITING for entry in steal.plane._ledger.live.values())
    steal.finish_all()
