"""Copies of stragglers: when one is made, and every event that can befall a request that runs twice."""

from __future__ import annotations

import pytest

from scheduling import copies
from scheduling.control import ControlPlane, Limits
from scheduling.copies import REQUESTS_A_LOOK, SILENT_S, STALL_S, WINDOW_TOKENS, Copied, Copier
from scheduling.errors import BugError
from scheduling.estimates import LengthEstimator
from scheduling.events import (
    Assign,
    Cancel,
    DrainRequested,
    Drop,
    EngineLost,
    Event,
    Exhausted,
    Fail,
    Heard,
    InputEnded,
    Instruction,
    NewRequest,
    Recall,
    Record,
    Reported,
    RequestsArrived,
    Stream,
    Tick,
    TimeLimited,
    WorkerLost,
    WorkerReady,
)
from scheduling.horizon import Horizon
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerState
from scheduling.messages import Delta
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


# ---------------------------------------------------------------- when one is made


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


# ---------------------------------------------------------------- what can befall it

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


def test_heard_alone_measures_nothing() -> None:
    play = Play()
    before = play.plane._copies._paces[SLOW].value
    play.at(9.0, Heard(SLOW))
    assert play.plane._copies._paces[SLOW].value == before
