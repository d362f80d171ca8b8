"""What can befall a request that runs twice: every event, and the books that are kept of it."""

from __future__ import annotations

import pytest

from scheduling import copies
from scheduling.control import ControlPlane, Limits
from scheduling.copies import Copied
from scheduling.errors import BugError
from scheduling.events import (
    Assign,
    Cancel,
    DrainRequested,
    Drop,
    EngineLost,
    Event,
    Exhausted,
    Fail,
    InputEnded,
    Instruction,
    NewRequest,
    Recall,
    Record,
    Reported,
    RequestsArrived,
    Stream,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduling.ledger import Phase
from scheduling.messages import Delta
from tests.scheduling.fakes import answer
from tests.scheduling.straggler import COPY, FAST, IT, LIMIT, SLOW, Play, copied, desk, report

ENDED, NONE = "ended", "nobody"
ORIGINAL, COPIED, BOTH = "original", "copy", "both"
STRAGGLER = answer(IT, 1)
WINNER = answer(IT, 2)
EVENTS: dict[str, tuple[Event, list[Instruction], str]] = {
    # name: (event, what is instructed but for what waits to be dealt again, who has it afterwards)
    "the original answers": (
        Reported(SLOW, [], [STRAGGLER], []), [Cancel(FAST, [(IT, 2)]), Record(SLOW, [STRAGGLER])], ENDED
    ),
    "the copy answers": (
        Reported(FAST, [], [WINNER], []), [Cancel(SLOW, [(IT, 1)]), Record(FAST, [WINNER])], ENDED
    ),
    "the copy starts": (Reported(FAST, [(IT, 2)], [], []), [], BOTH),
    "the original starts again": (Reported(SLOW, [(IT, 1)], [], []), [], BOTH),
    "the copy answers for the original": (Reported(FAST, [], [answer(IT, 1)], []), [Drop(FAST, [(IT, 1)])], BOTH),
    "the original answers for the copy": (Reported(SLOW, [], [answer(IT, 2)], []), [Drop(SLOW, [(IT, 2)])], BOTH),
    "the original's engine dies": (EngineLost(SLOW, "x", [(IT, 1)], [], True), [], COPIED),
    "the copy's engine dies": (EngineLost(FAST, "x", [(IT, 2)], [], True), [], ORIGINAL),
    "the copy's engine dies before it started": (EngineLost(FAST, "x", [], [(IT, 2)], True), [], ORIGINAL),
    "the original's rank is lost": (WorkerLost(SLOW, "x"), [], COPIED),
    "the copy's rank is lost": (WorkerLost(FAST, "x"), [], ORIGINAL),
    "the run drains": (DrainRequested("asked to"), [Exhausted(True)], BOTH),
}  # fmt: skip


def holders(play: Play) -> str:
    request = play.plane._ledger.live.get(IT)
    if request is None:
        return ENDED
    if request.twin is not None:
        return BOTH
    return {None: NONE, SLOW: ORIGINAL, FAST: COPIED}[request.owner]


@pytest.mark.parametrize("runs", [False, True], ids=["queued copy", "running copy"])
@pytest.mark.parametrize("name", EVENTS)
def test_what_becomes_of_a_request_that_runs_twice(name: str, runs: bool) -> None:
    play = copied(runs=runs)
    event, expected, after = EVENTS[name]
    assert play.at(3.0, event) == expected
    assert holders(play) == after
    assert play.plane.totals.retried == 0
    attempts = {ORIGINAL: {1}, COPIED: {2}, BOTH: {1, 2}, ENDED: set()}[after]
    owned = [request for worker in play.plane._ledger.workers.values() for request in worker.holdings()]
    assert {request.attempt for request in owned} == attempts


@pytest.mark.parametrize("first", [FAST, SLOW])
def test_of_two_answers_the_first_is_recorded_and_the_other_is_late(first: int) -> None:
    play = copied(runs=True)
    answers = {FAST: Reported(FAST, [], [WINNER], []), SLOW: Reported(SLOW, [], [STRAGGLER], [])}
    [_, record] = play.at(3.0, answers.pop(first))
    assert record == Record(first, [WINNER if first == FAST else STRAGGLER])
    [(worker, late)] = answers.items()
    assert play.at(3.0, late) == [Drop(worker, [(IT, 2 if worker == FAST else 1)])]
    totals = play.plane.totals
    assert (totals.copies_won, totals.late) == (first == FAST, 1)
    assert play.plane.copies == [Copied(IT, 2, FAST, SLOW, 2.5, 3.0, first == FAST)]


def test_a_copy_whose_rank_is_lost_is_told_of_and_nobody_was_first() -> None:
    play = copied(runs=True)
    play.at(3.0, WorkerLost(FAST, "x"))
    play.at(4.0, Reported(SLOW, [], [STRAGGLER], []))
    assert play.plane.copies == [Copied(IT, 2, FAST, SLOW, 2.5)]


def test_only_so_many_copies_are_told_of_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "TOLD_MAX", 1)
    ledger, copier = desk(slots=(2, 3), paces=(0.01, 0.1), started_at=(0.0, 3.0, 1.0))
    copier.dispatch(4.0, [])
    assert ledger.totals.copies == 2
    assert [one.index for one in copier.told] == [1]
    copier.answered(ledger.live[2], 5.0, [])
    assert copier.told[0].won is None


def test_what_was_made_twice_is_guessed_and_then_known() -> None:
    play = copied(runs=True)
    play.at(3.0, Reported(FAST, [], [WINNER], []))
    assert play.plane.totals.wasted_tokens == 30  # three seconds at ten tokens a second
    play.at(3.0, Reported(SLOW, [], [answer(IT, 1, output_tokens=33)], []))
    assert play.plane.totals.wasted_tokens == 33
    play.at(3.1, Reported(SLOW, [], [answer(IT, 1, output_tokens=33)], []))  # again
    assert play.plane.totals.wasted_tokens == 33


@pytest.mark.parametrize("runs", [False, True], ids=["queued copy", "running copy"])
def test_when_both_are_lost_the_next_attempt_is_later_than_all_that_ran(runs: bool) -> None:
    for lost in [(FAST, SLOW), (SLOW, FAST)]:
        play = copied(runs=runs)
        attempt = {SLOW: 1, FAST: 2}
        for worker in lost:
            started = [(IT, attempt[worker])] if worker == SLOW or runs else []
            play.at(3.0, EngineLost(worker, "x", started, [], True))
        # A copy that was queued and never ran may keep its attempt.
        attempts = {True: 3, False: 3 if lost == (FAST, SLOW) else 2}
        assert Assign(SLOW, [(IT, attempts[runs])]) in play.at(4.0, WorkerReady(SLOW, 1))


def test_a_copy_that_was_lost_is_not_made_again_in_its_attempt() -> None:
    play = copied(runs=True)
    play.at(3.0, WorkerLost(FAST, "x"), WorkerReady(FAST, 1))
    assert play.at(3.5, Tick()) == [Assign(FAST, [(IT, 3)])]
    assert play.tell(Reported(FAST, [], [answer(IT, 2)], [])) == [Drop(FAST, [(IT, 2)])]


def test_the_death_of_one_of_two_counts_for_neither_but_is_told_and_there_is_no_other_copy() -> None:
    play = copied(runs=True, deaths=2)
    assert play.at(3.0, EngineLost(FAST, "boom", [(IT, 2)], [], True)) == []
    request = play.plane._ledger.live[IT]
    assert (request.deaths, request.history) == (0, ("attempt 2 on rank 1: boom",))
    play.at(3.1, WorkerReady(FAST, 1))
    assert play.at(5.0, Tick()) == []
    play.tell(EngineLost(SLOW, "bang", [(IT, 1)], [], True))
    assert (request.deaths, request.attempt) == (1, 3)
    [failure] = [
        each for each in play.at(6.0, EngineLost(FAST, "crash", [(IT, 3)], [], True)) if isinstance(each, Fail)
    ]
    assert failure.attempt == 3
    assert "attempt 2 on rank 1: boom; attempt 1 on rank 2: bang; attempt 3 on rank 1, alone: crash" in failure.reason


def test_only_the_first_of_two_streams() -> None:
    play = copied(runs=True)
    first, second = Delta(IT, 1, 0, "one", 1), Delta(IT, 2, 0, "two", 1)
    assert play.at(3.0, Reported(FAST, [], [], [second])) == []
    assert play.tell(Reported(SLOW, [], [], [first])) == [Stream([first])]
    play.tell(WorkerLost(SLOW, "x"))
    assert play.tell(Reported(FAST, [], [], [second])) == [Stream([second])]


def test_a_drain_leaves_a_copy_where_it_is_and_makes_no_new_one() -> None:
    play = copied(runs=False)
    assert play.at(3.0, DrainRequested("asked to")) == [Exhausted(True)]  # nothing is recalled
    assert play.tell(WorkerLost(SLOW, "x")) == []
    assert holders(play) == COPIED
    assert play.tell(Reported(FAST, [], [WINNER], [])) == [Record(FAST, [WINNER])]

    play = Play()
    play.tell(DrainRequested("asked to"))
    assert COPY not in play.end_of_others()


def test_work_that_comes_back_is_stolen_from_behind_an_unstarted_copy() -> None:
    """A third rank is lost, its work goes to the backlog of the one that has been sent a copy, and moves from there."""
    plane = ControlPlane([FAST, SLOW, 3], "work-stealing", 0.0, limits=Limits(prefetch=4))
    for event in (WorkerReady(SLOW, 1), WorkerReady(3, 1), WorkerReady(FAST, 1)):
        plane.handle(event, 0.0)
    plane.handle(RequestsArrived([NewRequest(k, 10, LIMIT) for k in range(3)]), 0.0)
    plane.handle(InputEnded(), 0.0)
    where = {index: view for view in plane._ledger.workers.values() for index in view.queued}
    for index, worker in where.items():
        plane.handle(report(worker.id, (index,)), 0.0)
    for worker_id, made in [(FAST, 100), (SLOW, 10), (3, 100)]:
        plane.handle(report(worker_id, made=made), 1.0)
    plane.handle(report(SLOW, made=10), 2.0)
    mine = {worker.id: index for index, worker in where.items()}
    out = plane.handle(report(FAST, (), (mine[FAST], 1)), 2.5)
    assert Assign(FAST, [(mine[SLOW], 2)]) in out
    out = plane.handle(WorkerLost(3, "x"), 2.6)
    assert Assign(FAST, [(mine[3], 2)]) in out or Assign(SLOW, [(mine[3], 2)]) in out
    plane.check()
    recalled = [each for each in plane.handle(WorkerReady(3, 1), 2.7) if isinstance(each, Recall)]
    assert [each.indexes for each in recalled] == [[mine[3]]]
    plane.check()


# ---------------------------------------------------------------- the books


def test_a_request_without_a_twin_has_none_to_part_from() -> None:
    ledger, copier = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,))
    with pytest.raises(BugError, match="no twin"):
        ledger.part(ledger.live[0])
    with pytest.raises(BugError, match="no twin"):
        copier.answered(ledger.live[0], 4.0, [])


@pytest.mark.parametrize("breakage", ["attempt", "owner", "phase", "one-sided", "unowned"])
def test_the_check_sees_broken_books_of_two(breakage: str) -> None:
    ledger, _ = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,))
    request = ledger.live[0]
    copy = ledger.copy(request, ledger.workers[1])
    ledger.check()
    assert (request.attempt, copy.attempt, ledger.unstarted) == (1, 2, 0)
    if breakage == "attempt":
        copy.attempt = 3
    elif breakage == "owner":
        copy.owner = 2
    elif breakage == "phase":
        ledger.move(copy, ledger.workers[1], Phase.RECALLED)
    elif breakage == "one-sided":
        copy.twin = None
    else:
        del ledger.workers[1].queued[0]
        ledger.workers[1].load_tokens -= copy.cost
    with pytest.raises(BugError):
        ledger.check()
