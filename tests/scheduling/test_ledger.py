"""The books: every change of hands keeps owners, loads and counts together, and `check` sees when it did not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduling.errors import BugError, ProtocolError
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerState, must


def ledger_with(count: int) -> tuple[Ledger, list[RequestEntry]]:
    """Two ready workers (1 and 2, two slots each) and `count` waiting requests of 10 tokens."""
    ledger = Ledger([1, 2], 0.0)
    for worker in ledger.workers.values():
        worker.state, worker.slots = WorkerState.READY, 2
    requests = [RequestEntry(index, 10.0, None) for index in range(count)]
    for request in requests:
        ledger.add(request)
    ledger.highest = count - 1
    return ledger, requests


def test_a_request_goes_through_its_life() -> None:
    ledger, [request] = ledger_with(1)
    one, two = ledger.workers.values()
    steps = [(one, Phase.QUEUED), (one, Phase.RECALLED), (None, Phase.WAITING), (two, Phase.QUEUED)]
    for owner, phase in steps:
        ledger.move(request, owner, phase)
        ledger.check()
        assert request.owner == (owner.id if owner else None)
        assert (one.load_tokens, two.load_tokens) == (10.0 * (owner is one), 10.0 * (owner is two))
        assert ledger.unstarted == 1
    ledger.move(request, two, Phase.RUNNING)
    assert ledger.unstarted == 0
    ledger.end(request, two)
    ledger.check()
    assert not ledger.live
    assert two.load_tokens == two.owned == 0


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.RECALLED, Phase.RUNNING])
def test_a_request_may_end_in_any_owned_phase(phase: Phase) -> None:
    ledger, [request, _] = ledger_with(2)
    ledger.move(request, ledger.workers[1], phase)
    ledger.end(request, ledger.workers[1])
    ledger.check()
    assert ledger.unstarted == len(ledger.live) == 1


def test_a_running_request_that_is_lost_is_unstarted_again() -> None:
    ledger, [request] = ledger_with(1)
    ledger.move(request, ledger.workers[1], Phase.RUNNING)
    ledger.move(request, None, Phase.WAITING)
    assert ledger.unstarted == 1
    ledger.forget(request)
    assert ledger.unstarted == 0
    ledger.check()


def test_only_the_owner_in_the_current_attempt_owns() -> None:
    ledger, [request] = ledger_with(1)
    one, two = ledger.workers.values()
    assert ledger.owned(one, 0, 1) is None
    ledger.move(request, one, Phase.QUEUED)
    assert ledger.owned(one, 0, 1) is request
    assert ledger.owned(two, 0, 1) is None
    assert ledger.owned(one, 0, 2) is None
    assert ledger.owned(one, 7, 1) is None


@pytest.mark.parametrize(("queued", "running", "stealable"), [(2, 0, 0), (3, 0, 1), (1, 1, 0), (3, 2, 3)])
def test_what_a_free_slot_is_about_to_take_is_not_stealable(queued: int, running: int, stealable: int) -> None:
    ledger, requests = ledger_with(queued + running)
    for place, request in enumerate(requests):
        ledger.move(request, ledger.workers[1], Phase.QUEUED if place < queued else Phase.RUNNING)
    assert ledger.workers[1].stealable == stealable


def test_unknown_ranks_and_requests_are_named() -> None:
    ledger, _ = ledger_with(2)
    with pytest.raises(ProtocolError, match=r"rank 5 is no worker of this job: its workers are \[1, 2\]"):
        ledger.worker(5)
    for index in (-1, 2):
        with pytest.raises(ProtocolError, match=f"rank 1 reports request {index}, which never arrived"):
            ledger.refuse_unseen(index, ledger.workers[1])
    ledger.refuse_unseen(1, ledger.workers[1])


def test_a_broken_invariant_is_a_bug_with_its_story() -> None:
    must(True, "fine")
    with pytest.raises(BugError, match="the story"):
        must(False, "the story")


def _owned_twice(ledger: Ledger, request: RequestEntry) -> None:
    ledger.workers[2].queued[request.index] = request


def _load(ledger: Ledger, request: RequestEntry) -> None:
    ledger.workers[1].load_tokens += 1


def _count(ledger: Ledger, request: RequestEntry) -> None:
    ledger.unstarted += 1


def _dead(ledger: Ledger, request: RequestEntry) -> None:
    del ledger.live[request.index]


def _phase(ledger: Ledger, request: RequestEntry) -> None:
    request.phase = Phase.RUNNING


def _gone(ledger: Ledger, request: RequestEntry) -> None:
    ledger.workers[1].state = WorkerState.GONE


def _longest(ledger: Ledger, request: RequestEntry) -> None:
    request.steps += 1


@pytest.mark.parametrize("breakage", [_owned_twice, _load, _count, _dead, _phase, _gone, _longest])
def test_the_check_sees_broken_books(breakage: Callable[[Ledger, RequestEntry], None]) -> None:
    ledger, [request, _] = ledger_with(2)
    ledger.move(request, ledger.workers[1], Phase.QUEUED)
    ledger.check()
    breakage(ledger, request)
    with pytest.raises(BugError):
        ledger.check()
