"""Copies of stragglers: when one is made."""

from __future__ import annotations

import pytest

from scheduling.control import ControlPlane, Limits
from scheduling.copies import REQUESTS_A_LOOK, SILENT_S, STALL_S, WINDOW_TOKENS
from scheduling.events import (
    Assign,
    Heard,
    InputEnded,
    Instruction,
    NewRequest,
    Recall,
    RequestsArrived,
    Tick,
    TimeLimited,
    WorkerReady,
)
from tests.scheduling.straggler import COPY, FAST, LIMIT, SLOW, Play, desk, report


def test_what_runs_on_a_slow_rank_is_started_again_on_an_idle_one() -> None:
    play = Play()
    assert play.end_of_others()[-1] == COPY
    assert play.plane.totals.copies == 1
    assert (play.plane.running, play.plane.waiting) == (1, 0)
    assert [view.running + view.queued for view in play.plane.workers()] == [1, 1]
    assert play.at(5.0, Tick()) == []  # one copy is enough


@pytest.mark.parametrize(
    "why",
    [
        {"slower": 1.1},  # what it has made already outweighs the little that is gained
        {"copies": False},
        {"schedule": "round-robin"},
        {"copy_gain_s": 7.0},  # 6.5 s are expected
        {"copy_gain_share": 0.87},  # of the 7.5 s that are left
    ],
    ids=str,
)
def test_no_copy_is_made(why: dict[str, float]) -> None:
    play = Play(**why)  # type: ignore[arg-type]
    assert not any(isinstance(each, Assign) for each in [*play.end_of_others(), *play.at(3.0, Tick())])


def test_ranks_of_the_same_speed_never_copy_from_each_other() -> None:
    play = Play(slower=1.0)
    out = play.end_of_others()
    for quarter in range(11, 40):
        out += play.at(quarter / 4, report(SLOW, made=25), report(FAST))
    assert not any(isinstance(each, Assign) for each in out)


def test_no_copy_is_made_while_input_may_come_or_work_waits() -> None:
    plane = ControlPlane([FAST, SLOW], "work-stealing", 0.0, limits=Limits(prefetch=4))
    plane.handle(WorkerReady(SLOW, 1), 0.0)
    plane.handle(RequestsArrived([NewRequest(k, 10, LIMIT) for k in range(3)]), 0.0)
    plane.handle(report(SLOW, (0,)), 0.0)
    for event in (report(SLOW, made=20), report(SLOW, made=20)):
        plane.handle(event, 5.0)
    assert plane.handle(WorkerReady(FAST, 3), 5.0) == [Recall(SLOW, 0, [1, 2])]
    plane.handle(report(FAST, made=20), 5.1)
    assert plane.handle(Tick(), 6.0) == []
    assert plane.handle(InputEnded(), 6.1) == []  # the recall is open


def test_a_full_rank_is_given_no_copy() -> None:
    play = Play()
    assert not any(isinstance(each, Assign) for each in play.at(3.0, Tick()))


def test_what_would_win_by_most_is_copied_first() -> None:
    ledger, copier = desk(slots=(1, 3), paces=(0.01, 0.1), started_at=(0.0, 3.0, 1.0))
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == [Assign(1, [(1, 2)])]  # it has the longest way to go
    ledger.check()


def test_a_rank_without_a_measured_pace_is_left_alone() -> None:
    for paces in [(None, 0.1), (0.01, None)]:
        _, copier = desk(slots=(1, 1), paces=paces, started_at=(0.0,))
        out: list[Instruction] = []
        copier.dispatch(4.0, out)
        assert out == []


def test_what_asks_for_no_tokens_is_not_copied() -> None:
    _, copier = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,), limit=0)
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == []


def test_a_request_that_an_engine_has_died_of_is_not_copied() -> None:
    ledger, copier = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,))
    ledger.live[0].history = ("attempt 1 on rank 2: x",)
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == []


def test_what_would_end_after_the_time_limit_is_not_copied() -> None:
    """The fast rank has taken 2.5 s for a request that looked the same."""
    for end_at, out in [(4.9, []), (5.1, [COPY])]:
        play = Play()
        play.tell(TimeLimited(end_at, "time is up"))
        assert [each for each in play.end_of_others() if isinstance(each, Assign)] == out


def test_nothing_is_copied_to_its_own_rank_even_where_no_gain_is_asked_for() -> None:
    careless = Limits(copy_interval_s=0.0, copy_gain_s=-1.0, copy_gain_share=-9.0)
    ledger, copier = desk(slots=(1, 2), paces=(0.01, 0.01), started_at=(0.0,), limits=careless)
    ledger.workers[FAST].slots = 0
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == []
    ledger.workers[FAST].slots = 1
    copier.dispatch(4.0, out)
    assert out == [Assign(FAST, [(0, 2)])]


def test_a_pace_is_of_all_that_runs_and_the_last_two_windows_weigh_the_same() -> None:
    ledger, copier = desk(slots=(1, 2), paces=(None, None), started_at=(0.0, 0.0))
    worker = ledger.workers[SLOW]
    for now, made, pace in [
        (1.0, 0, None),
        (2.0, WINDOW_TOKENS - 1, None),  # too few to tell
        (3.0, 25, (4 * 1.0) / (WINDOW_TOKENS - 1 + 25)),  # two requests for two seconds, since the first report
        (4.0, 100, 0.5 * (4 * 1.0) / (WINDOW_TOKENS - 1 + 25) + 0.5 * 0.02),
    ]:
        copier.note_report(worker, made, now)
        found = copier._pace(worker, now)
        assert found == (None if pace is None else pytest.approx(pace))


def test_a_rank_that_runs_a_suspect_is_given_nothing_beside_it() -> None:
    ledger, copier = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,))
    ledger.workers[FAST].apart = True
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == []


@pytest.mark.parametrize("silent", [FAST, SLOW])
def test_a_silent_rank_neither_gives_nor_gets_a_copy(silent: int) -> None:
    ledger, copier = desk(slots=(1, 1), paces=(0.01, 0.1), started_at=(0.0,))
    ledger.workers[silent].heard = 4.0 - SILENT_S - 0.1
    out: list[Instruction] = []
    copier.dispatch(4.0, out)
    assert out == []


def test_a_rank_that_makes_no_tokens_any_more_is_slow_whatever_it_was() -> None:
    ledger, copier = desk(slots=(1, 1), paces=(0.01, 0.01), started_at=(0.0,), at=2.0)
    for worker in ledger.workers.values():
        worker.heard = 2.0 + STALL_S
    out: list[Instruction] = []
    copier.dispatch(2.0 + STALL_S - 0.1, out)
    assert out == []
    copier.dispatch(2.0 + STALL_S + 1.0, out)
    assert out == [Assign(1, [(0, 2)])]


def test_it_is_looked_at_more_rarely_where_there_is_much_to_look_at() -> None:
    many = REQUESTS_A_LOOK
    for requests, again in [(many - 1, 4.3), (many, 4.6)]:
        ledger, copier = desk(slots=(1, many), paces=(0.01, 0.1), started_at=(3.9,) * requests, limits=Limits())
        out: list[Instruction] = []
        copier.dispatch(4.0, out)
        ledger.workers[1].slots = 2
        copier.dispatch(again - 0.2, out)
        assert len(out) == 1
        copier.dispatch(again, out)
        assert len(out) == 2


def test_the_expected_gain_is_the_mean_over_how_long_it_may_become() -> None:
    """Half of the requests have 100 tokens, half 400. After 95 s at a second a token the short ones would end first:
    the copy, at a tenth of a second a token, wins where it becomes 400, by 305 - 40 s."""
    ledger, copier = desk(slots=(1, 1), paces=(0.1, 1.0), started_at=(0.0,), limit=400, outputs=(100, 400))
    for worker in ledger.workers.values():
        worker.heard = 95.0
    [request] = ledger.workers[2].running.values()
    tail = copier._lengths.tail()
    assert copier._gain_s(request, 1.0, 0.1, tail, 95.0) == pytest.approx((305 - 40) / 2)
    assert copier._left_s(request, 1.0, tail, 95.0) == pytest.approx((5 + 305) / 2)
    assert copier._gain_s(request, 1.0, 0.1, tail, 101.0) == pytest.approx(299 - 40)
    assert copier._left_s(request, 1.0, tail, 101.0) == pytest.approx(299)


def test_a_length_that_was_never_seen_is_guessed_from_what_there_is() -> None:
    """150 tokens where none had more than 100: as many again, but not beyond the limit."""
    _, copier = desk(slots=(1, 1), paces=(0.1, 1.0), started_at=(0.0,), limit=400, outputs=(100,))
    ledger = copier._ledger
    [request] = ledger.workers[2].running.values()
    tail = copier._lengths.tail()
    assert copier._left_s(request, 1.0, tail, 150.0) == pytest.approx(150)
    assert copier._gain_s(request, 1.0, 0.1, tail, 150.0) == pytest.approx(150 - 30)
    assert copier._left_s(request, 1.0, tail, 350.0) == pytest.approx(50)
    assert copier._left_s(request, 1.0, tail, 500.0) == pytest.approx(0)


def test_heard_alone_measures_nothing() -> None:
    play = Play()
    before = play.plane._copies._paces[SLOW].value
    play.at(9.0, Heard(SLOW))
    assert play.plane._copies._paces[SLOW].value == before
