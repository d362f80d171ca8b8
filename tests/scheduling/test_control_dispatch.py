"""Who gets what next, decided over books alone: targets, feeding, stealing, and what it costs with many workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from scheduling.dispatch import TURNS_AHEAD, Dispatcher
from scheduling.errors import BugError, ProtocolError
from scheduling.events import Assign, Exhausted, Instruction, Recall
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerState
from scheduling.limits import Limits
from scheduling.policies import Policy, RoundRobin, WorkStealing


class Desk:
    """A dispatcher with its ledger and policy. Workers 1, 2, … are ready with the given slots; 0 still loads."""

    def __init__(self, *slots: int, policy: Policy[RequestEntry] | None = None, limits: Limits | None = None) -> None:
        self.ledger = Ledger(range(1, len(slots) + 1), 0.0)
        self.policy: Policy[RequestEntry] = policy or WorkStealing()
        self.dispatcher = Dispatcher(self.ledger, self.policy, limits or Limits(prefetch=2))
        self.next_index = 0
        for worker, count in zip(self.ledger.workers.values(), slots, strict=True):
            if count:
                worker.state, worker.slots = WorkerState.READY, count
                self.dispatcher.worker_ready(worker)

    def arrive(self, count: int) -> None:
        for _ in range(count):
            request = RequestEntry(self.next_index, 10.0, None)
            self.next_index += 1
            self.ledger.add(request)
            self.policy.arrive(request)

    def dispatch(self, now: float = 0.0, input_ended: bool = False) -> list[Instruction]:
        out: list[Instruction] = []
        self.dispatcher.dispatch(now, input_ended, out)
        self.dispatcher.check()
        return out

    def start(self, worker: int) -> None:
        """The worker starts what it has queued, as far as its slots go."""
        entry = self.ledger.workers[worker]
        for request in list(entry.queued.values())[: entry.slots - len(entry.running)]:
            self.ledger.move(request, entry, Phase.RUNNING)
        self.dispatcher.note_room(entry)

    def end(self, worker: int, count: int = 1) -> None:
        entry = self.ledger.workers[worker]
        for request in list(entry.running.values())[:count]:
            self.ledger.end(request, entry)
        self.dispatcher.note_room(entry)


class Uncounted(dict[Any, Any]):
    """A dict that nobody may walk through."""

    def values(self) -> Any:
        raise AssertionError("all workers were looked at")

    def items(self) -> Any:
        raise AssertionError("all workers were looked at")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all workers were looked at")


def test_the_emptiest_is_fed_first_and_all_up_to_their_targets() -> None:
    desk = Desk(2, 4)
    desk.arrive(3)
    assert desk.dispatch() == [Assign(1, [(0, 1)]), Assign(2, [(1, 1), (2, 1)])]
    desk.arrive(20)
    desk.dispatch()
    assert [worker.owned for worker in desk.ledger.workers.values()] == [2 + 2, 4 + 2]


def test_what_is_wanted_covers_the_targets_of_all_but_those_gone() -> None:
    desk = Desk(2, 4)
    one, two = desk.ledger.workers.values()
    assert desk.dispatcher.wanted() == 4 + 6
    desk.arrive(3)
    assert desk.dispatcher.wanted() == 7
    two.state = WorkerState.JOINING
    desk.dispatcher.worker_loading(two)
    assert desk.dispatcher.wanted() == 7
    one.state = WorkerState.GONE
    desk.dispatcher.worker_left(one)
    desk.dispatcher.check()
    assert desk.dispatcher.wanted() == 3
    desk.dispatcher.worker_joined(one)
    assert desk.dispatcher.wanted() == 7


def test_a_faster_worker_holds_more_ahead() -> None:
    desk = Desk(2, 2)
    one, two = desk.ledger.workers.values()
    desk.dispatcher.note_finished(one, 50, 0.01)
    assert one.target == two.target  # too short a time to measure
    desk.dispatcher.note_finished(one, 50, 0.1)
    assert (one.rate, one.target, two.target) == (500.0, 2 + 50, 2 + 2)
    desk.dispatcher.check()


def test_behind_a_slow_worker_more_turns_are_read_for_the_others() -> None:
    desk = Desk(1, 1, policy=RoundRobin())
    desk.arrive(20)
    desk.dispatch()
    assert desk.dispatcher.wanted() == 0  # both have more to come
    desk.start(1)
    for _ in range(8):
        desk.end(1)
        desk.dispatch()
        desk.start(1)
    assert desk.dispatcher.wanted() == TURNS_AHEAD * 2


def test_while_others_load_nobody_takes_more_than_a_fair_share_of_the_rest() -> None:
    desk = Desk(8, 0)
    desk.arrive(4)
    assert desk.dispatch(input_ended=True) == [Assign(1, [(0, 1), (1, 1)])]
    two = desk.ledger.workers[2]
    two.state = WorkerState.GONE
    desk.dispatcher.worker_left(two)
    assert desk.dispatch(input_ended=True) == [Assign(1, [(2, 1), (3, 1)]), Exhausted(True)]


def test_a_steal_moves_what_the_victim_confirms_and_counts_it() -> None:
    desk = Desk(1, 0, limits=Limits(prefetch=4))
    desk.arrive(5)
    desk.dispatch()
    desk.start(1)
    one, two = desk.ledger.workers.values()
    two.state, two.slots = WorkerState.READY, 2
    desk.dispatcher.worker_ready(two)
    assert desk.dispatch() == [Recall(1, 0, [1, 2])]
    assert desk.dispatch() == []  # it is on its way
    back = desk.dispatcher.settle(one, 0, [2])
    assert [request.index for request in back] == [2]
    assert list(one.running) == [0, 1]  # what it keeps has started
    desk.policy.put_back(back)
    desk.dispatcher.note_room(one)
    out = desk.dispatch()
    assert out[0] == Assign(2, [(2, 1)], stolen={2: 1})
    assert (one.stolen_out, two.stolen_in, desk.ledger.totals.stolen) == (1, 1, 1)
    assert desk.dispatcher.settle(one, 0, [2]) == []  # it came twice


def test_a_confirmation_that_no_correct_victim_sends_is_refused_and_changes_nothing() -> None:
    desk = Desk(1, 1, limits=Limits(prefetch=4))
    one, two = desk.ledger.workers.values()
    desk.arrive(2)
    desk.dispatch()
    desk.dispatcher.recall(one, [0], 0.0, [])
    for worker, number, confirmed in [(one, 1, [0]), (one, -1, [0]), (two, 0, [0]), (one, 0, [0, 1])]:
        with pytest.raises(ProtocolError, match=f"rank {worker.id}"):
            desk.dispatcher.settle(worker, number, confirmed)
        desk.dispatcher.check()
        assert list(one.recalled) == [0]


def test_a_busy_cluster_is_served_without_looking_at_every_worker() -> None:
    desk = Desk(*[4] * 256)
    desk.arrive(2 * desk.dispatcher.wanted())
    desk.dispatch()
    for worker in desk.ledger.workers:
        desk.start(worker)
    desk.ledger.workers = Uncounted(desk.ledger.workers)
    out: list[Instruction] = []
    for worker in (7, 8, 200):
        desk.end(worker)
        desk.dispatcher.dispatch(0.1, False, out)
        desk.start(worker)
        desk.dispatcher.dispatch(0.1, True, out)  # nor after the input's end, while requests wait
        desk.dispatcher.wanted()
    assert [each.worker for each in out if isinstance(each, Assign)] == [7, 8, 200]


def test_the_check_sees_what_is_off() -> None:
    for name, wrong in [("target", 0), ("_hungry", {}), ("_loading", {1})]:
        desk = Desk(1)
        desk.dispatcher.check()
        setattr(desk.dispatcher, name, wrong)
        with pytest.raises(BugError):
            desk.dispatcher.check()


def test_a_confirmation_of_an_earlier_inputs_recall_settles_nothing() -> None:
    desk = Desk(1, 1)
    later = Dispatcher(desk.ledger, desk.policy, Limits(), first_recall=3)
    worker = desk.ledger.worker(1)
    assert later.settle(worker, 0, []) == []
    assert later.settle(worker, 2, [7]) == []
    with pytest.raises(ProtocolError, match="never sent"):
        later.settle(worker, 3, [])
