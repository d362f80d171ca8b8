"""Every (worker state, event), (request phase, event) and (mode, event) pair: what it becomes, or that it is refused.

A refused event changes nothing at all (`fakes.refused` compares everything that can be reached from the plane).
"""

from __future__ import annotations

import pytest

from scheduling.control import ControlPlane, Limits
from scheduling.errors import ConfigError
from scheduling.events import (
    Assign,
    Committed,
    DrainRequested,
    Drop,
    EngineLost,
    Event,
    Exhausted,
    Fail,
    Heard,
    InputEnded,
    NewRequest,
    Recall,
    RecallConfirmed,
    Record,
    Reported,
    RequestRejected,
    RequestsArrived,
    Stop,
    Stream,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduling.ledger import WorkerState
from scheduling.messages import Delta
from tests.scheduling.fakes import answer, refused

REFUSED = "refused"
OWNER, OTHER, STRANGER = 1, 2, 99


def plane_of(schedule: str = "work-stealing") -> ControlPlane:
    return ControlPlane([OWNER, OTHER], schedule, 0.0, limits=Limits(prefetch=4, lease_s=60.0))


def new(*indexes: int) -> RequestsArrived:
    return RequestsArrived([NewRequest(index, 10) for index in indexes])


def report(worker: int, started: list[tuple[int, int]] | None = None, *finished: tuple[int, int]) -> Reported:
    return Reported(worker, started or [], [answer(index, attempt) for index, attempt in finished], [])


# ---------------------------------------------------------------- a worker's states


def worker_in(state: str) -> ControlPlane:
    plane = plane_of()
    if state != "joining":
        plane.handle(WorkerReady(OWNER, 2), 0.0)
    if state == "gone":
        plane.handle(WorkerLost(OWNER, "died"), 0.0)
    plane.handle(new(0), 0.0)
    plane.check()
    return plane


JOINING, READY, GONE = "joining", "ready", "gone"
WORKER_EVENTS: dict[str, tuple[Event, str, str, str]] = {
    # name: (event, what becomes of a worker that is joining, ready, gone)
    "ready": (WorkerReady(OWNER, 2), READY, REFUSED, READY),
    "ready without slots": (WorkerReady(OWNER, 0), REFUSED, REFUSED, REFUSED),
    "nothing new": (report(OWNER), JOINING, READY, GONE),
    "started what never was": (report(OWNER, [(7, 1)]), REFUSED, REFUSED, REFUSED),
    "started what cannot be": (report(OWNER, [(-1, 1)]), REFUSED, REFUSED, REFUSED),
    "finished what never was": (report(OWNER, [], (7, 1)), REFUSED, REFUSED, REFUSED),
    "confirms what was not asked": (RecallConfirmed(OWNER, 0, []), REFUSED, REFUSED, REFUSED),
    "confirms recall -1": (RecallConfirmed(OWNER, -1, []), REFUSED, REFUSED, REFUSED),
    "engine restarts": (EngineLost(OWNER, "x", [], [], True), JOINING, JOINING, GONE),
    "engine is dead": (EngineLost(OWNER, "x", [], [], False), GONE, GONE, GONE),
    "engine lost what never was": (EngineLost(OWNER, "x", [(7, 1)], [], True), REFUSED, REFUSED, REFUSED),
    "engine held what never was": (EngineLost(OWNER, "x", [], [(7, 1)], True), REFUSED, REFUSED, REFUSED),
    "lost": (WorkerLost(OWNER, "x"), GONE, GONE, GONE),
    "heard": (Heard(OWNER), JOINING, READY, GONE),
    "lease not over": (Tick(), JOINING, READY, GONE),
}


@pytest.mark.parametrize("state", [JOINING, READY, GONE])
@pytest.mark.parametrize("name", WORKER_EVENTS)
def test_what_becomes_of_a_worker(state: str, name: str) -> None:
    plane = worker_in(state)
    event, *after = WORKER_EVENTS[name]
    expected = after[[JOINING, READY, GONE].index(state)]
    if expected == REFUSED:
        refused(plane, event, 1.0)
        return
    plane.handle(event, 1.0)
    plane.check()
    assert plane.workers()[0].state is WorkerState(expected)


@pytest.mark.parametrize("state", [JOINING, READY, GONE])
def test_a_lease_that_is_over_loses_the_worker(state: str) -> None:
    plane = worker_in(state)
    plane.handle(Heard(OTHER), 50.0)
    plane.handle(Tick(), 61.0)
    assert [view.state for view in plane.workers()] == [WorkerState.GONE, WorkerState.JOINING]
    assert plane.workers()[0].silent == (state != GONE)
    plane.handle(WorkerReady(OWNER, 2), 62.0)
    assert not plane.workers()[0].silent


@pytest.mark.parametrize(
    "event",
    [
        WorkerReady(STRANGER, 1), report(STRANGER), RecallConfirmed(STRANGER, 0, []), Heard(STRANGER),
        EngineLost(STRANGER, "x", [], [], True), WorkerLost(STRANGER, "x"),
    ],
    ids=lambda event: type(event).__name__,
)  # fmt: skip
def test_a_rank_that_is_no_worker_is_refused_by_name(event: Event) -> None:
    assert "rank 99 is no worker" in refused(plane_of(), event)


# ---------------------------------------------------------------- a request's phases

UNSEEN, WAITING, QUEUED, RECALLED, RUNNING, RETRIED, ENDED = (
    "unseen", "waiting", "queued", "recalled", "running", "retried", "ended",
)  # fmt: skip
PHASES = [UNSEEN, WAITING, QUEUED, RECALLED, RUNNING, RETRIED, ENDED]
IT = 2
"""The index of the request that is looked at. Retried: running at its owner in its second attempt."""


def request_in(phase: str) -> ControlPlane:
    """Request 2 in `phase`; its owner (rank 1) also runs requests 0 and 1, in its two slots, unless RUNNING needs one.

    OTHER joins where a recall is needed; a waiting request waits because nobody is ready.
    """
    plane = plane_of()
    if phase in (UNSEEN, WAITING):
        plane.handle(new(0, 1, 2) if phase == WAITING else new(0, 1), 0.0)
        return plane
    plane.handle(WorkerReady(OWNER, 3 if phase in (RUNNING, RETRIED) else 2), 0.0)
    plane.handle(new(0, 1, 2), 0.0)
    if phase in (RUNNING, RETRIED):
        plane.handle(report(OWNER, [(0, 1), (1, 1), (2, 1)]), 0.0)
    else:
        plane.handle(report(OWNER, [(0, 1), (1, 1)]), 0.0)
    if phase == RETRIED:
        plane.handle(EngineLost(OWNER, "x", [(0, 1), (1, 1), (2, 1)], [], True), 0.0)
        plane.handle(WorkerReady(OWNER, 3), 0.0)
        plane.handle(report(OWNER, [(0, 2), (1, 2), (2, 2)]), 0.0)
    if phase == RECALLED:
        assert plane.handle(WorkerReady(OTHER, 1), 0.0) == [Recall(OWNER, 0, [IT])]
    if phase == ENDED:
        plane.handle(report(OWNER, [], (IT, 1)), 0.0)
    plane.check()
    return plane


def phase_of(plane: ControlPlane) -> str:
    entry = plane._ledger.live.get(IT)
    if entry is None:
        return ENDED if plane.highest >= IT else UNSEEN
    if entry.attempt > 1 and entry.phase.value == RUNNING:
        return RETRIED
    return entry.phase.value


SAME = "same"
REQUEST_EVENTS: dict[str, tuple[Event, list[str]]] = {
    # name: (event, what becomes of a request that is unseen, waiting, queued, recalled, running, retried, ended)
    "arrives": (new(IT), [WAITING, *[REFUSED] * 6]),
    "is rejected": (RequestRejected(IT, "bad"), [ENDED, *[REFUSED] * 6]),
    "its owner started it": (report(OWNER, [(IT, 1)]), [REFUSED, SAME, RUNNING, RUNNING, SAME, SAME, SAME]),
    "another started it": (report(OTHER, [(IT, 1)]), [REFUSED, *[SAME] * 6]),
    "a later attempt started": (report(OWNER, [(IT, 9)]), [REFUSED, *[SAME] * 6]),
    "its owner finished it": (report(OWNER, [], (IT, 1)), [REFUSED, SAME, ENDED, ENDED, ENDED, SAME, SAME]),
    "another finished it": (report(OTHER, [], (IT, 1)), [REFUSED, *[SAME] * 6]),
    "its second attempt finished": (report(OWNER, [], (IT, 2)), [REFUSED, SAME, SAME, SAME, SAME, ENDED, SAME]),
    "its recall is confirmed with it": (
        RecallConfirmed(OWNER, 0, [IT]), [REFUSED, REFUSED, REFUSED, QUEUED, REFUSED, REFUSED, REFUSED]
    ),
    "its recall is confirmed without it": (
        RecallConfirmed(OWNER, 0, []), [REFUSED, REFUSED, REFUSED, RUNNING, REFUSED, REFUSED, REFUSED]
    ),
    "another confirms its recall": (RecallConfirmed(OTHER, 0, [IT]), [REFUSED] * 7),
    "its recall brings back a stranger": (RecallConfirmed(OWNER, 0, [IT, 1]), [REFUSED] * 7),
    "its owner's engine dies with it": (
        EngineLost(OWNER, "x", [(IT, 1)], [], True), [REFUSED, SAME, WAITING, QUEUED, WAITING, WAITING, SAME]
    ),
    "its owner's engine dies before it started": (
        EngineLost(OWNER, "x", [], [(IT, 1)], True), [REFUSED, SAME, WAITING, QUEUED, WAITING, WAITING, SAME]
    ),
    "its owner is lost": (WorkerLost(OWNER, "x"), [SAME, SAME, WAITING, QUEUED, WAITING, WAITING, SAME]),
    "another is lost": (WorkerLost(OTHER, "x"), [SAME, SAME, SAME, SAME, SAME, SAME, SAME]),
    "the run drains": (DrainRequested("x"), [SAME, ENDED, RECALLED, SAME, SAME, SAME, SAME]),
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", REQUEST_EVENTS)
def test_what_becomes_of_a_request(phase: str, name: str) -> None:
    plane = request_in(phase)
    assert phase_of(plane) == phase
    event, after = REQUEST_EVENTS[name]
    expected = after[PHASES.index(phase)]
    if expected == REFUSED:
        refused(plane, event, 1.0)
        return
    plane.handle(event, 1.0)
    plane.check()
    assert phase_of(plane) == (phase if expected == SAME else expected)


# ---------------------------------------------------------------- the plane's modes


def plane_in(mode: str) -> ControlPlane:
    plane = plane_of()
    plane.handle(WorkerReady(OWNER, 2), 0.0)
    plane.handle(new(0), 0.0)
    if mode == "input ended":
        plane.handle(InputEnded(), 0.0)
    if mode in ("draining", "stopped"):
        plane.handle(report(OWNER, [(0, 1)]), 0.0)
        plane.handle(DrainRequested("asked to"), 0.0)
    if mode == "stopped":
        plane.handle(report(OWNER, [], (0, 1)), 0.0)
        plane.handle(Committed(1), 0.0)
    return plane


MODES = ["open", "input ended", "draining", "stopped"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("event", [new(5), RequestRejected(5, "bad")], ids=["arrives", "rejected"])
def test_a_request_is_taken_only_while_the_plane_is_open(mode: str, event: Event) -> None:
    plane = plane_in(mode)
    if mode == "input ended":
        refused(plane, event)
        return
    known = plane.totals.accepted + plane.totals.rejected
    out = plane.handle(event, 1.0)
    plane.check()
    taken = plane.totals.accepted + plane.totals.rejected - known
    assert taken == (mode == "open")
    assert bool(out) == (mode == "open")


@pytest.mark.parametrize("mode", MODES)
def test_more_durable_records_than_there_are_is_refused(mode: str) -> None:
    refused(plane_in(mode), Committed(1))
    refused(plane_in(mode), Committed(-1))


@pytest.mark.parametrize("mode", MODES)
def test_the_input_ends_once(mode: str) -> None:
    plane = plane_in(mode)
    if mode != "input ended":
        plane.handle(InputEnded(), 1.0)
    refused(plane, InputEnded(), 1.0)


@pytest.mark.parametrize("mode", ["draining", "stopped"])
def test_a_second_drain_is_nothing_new(mode: str) -> None:
    assert plane_in(mode).handle(DrainRequested("again"), 1.0) == []


def test_indexes_that_do_not_rise_are_refused_as_a_whole() -> None:
    plane = plane_of()
    assert "must rise" in refused(plane, new(0, 2, 1))
    assert "must rise" in refused(plane, new(0, 0))


# ---------------------------------------------------------------- stories


def test_a_late_answer_of_an_older_attempt_is_dropped_and_counted() -> None:
    plane = request_in(RETRIED)
    assert plane.handle(report(OWNER, [], (IT, 1)), 1.0) == [Drop(OWNER, [(IT, 1)])]
    assert plane.totals.late == 1


def test_text_of_an_older_attempt_is_not_streamed() -> None:
    plane = request_in(RETRIED)
    old, current = Delta(IT, 1, 0, "old", 1), Delta(IT, 2, 0, "new", 1)
    assert plane.handle(Reported(OWNER, [], [], [old, current]), 1.0) == [Stream([current])]


def test_an_answer_that_arrives_twice_is_recorded_once() -> None:
    plane = request_in(RUNNING)
    twice = report(OWNER, [], (IT, 1), (IT, 1))
    assert plane.handle(twice, 1.0) == [Record(OWNER, [answer(IT)]), Drop(OWNER, [(IT, 1)])]


def test_a_request_whose_engines_keep_dying_fails_with_its_story() -> None:
    plane = request_in(RETRIED)
    plane.handle(report(OWNER, [], (0, 2), (1, 2)), 1.0)
    plane.handle(EngineLost(OWNER, "second", [(IT, 2)], [], True), 1.0)
    plane.handle(WorkerReady(OWNER, 3), 1.0)
    out = plane.handle(EngineLost(OWNER, "third", [(IT, 3)], [], True), 1.0)
    [failure] = [each for each in out if isinstance(each, Fail)]
    assert (failure.index, failure.attempt, failure.code) == (IT, 3, "engine_died")
    assert failure.reason == (
        "3 engines died while running this request: attempt 1 on rank 1: x; attempt 2 on rank 1: second; "
        "attempt 3 on rank 1, alone: third"
    )


def test_requests_that_died_together_are_run_one_at_a_time_before_one_is_failed() -> None:
    plane = request_in(RETRIED)
    plane.handle(new(3, 4), 1.0)
    plane.handle(EngineLost(OWNER, "second", [(0, 2), (1, 2), (IT, 2)], [(3, 1), (4, 1)], True), 1.0)
    assert plane.handle(WorkerReady(OWNER, 3), 1.0) == [Assign(OWNER, [(3, 1), (4, 1)])]
    assert plane.waiting == 3  # until there is nothing else for a worker that owns nothing
    assert plane.handle(report(OWNER, [], (3, 1)), 1.0) == [Record(OWNER, [answer(3)])]
    assert plane.handle(report(OWNER, [], (4, 1)), 1.0) == [Record(OWNER, [answer(4)]), Assign(OWNER, [(0, 3)])]
    assert plane.handle(new(5), 1.0) == []  # it has two slots free, and nothing is to run beside a suspect
    out = plane.handle(EngineLost(OWNER, "third", [(0, 3)], [], True), 1.0)
    assert [each.index for each in out if isinstance(each, Fail)] == [0]
    assert plane.handle(WorkerReady(OWNER, 3), 1.0) == [Assign(OWNER, [(5, 1)])]
    assert plane.handle(report(OWNER, [], (5, 1)), 1.0)[-1] == Assign(OWNER, [(1, 3)])
    assert plane.handle(report(OWNER, [], (1, 3)), 1.0)[-1] == Assign(OWNER, [(IT, 3)])
    plane.check()


def die_together(plane: ControlPlane, worker: int, *requests: tuple[int, int]) -> list[object]:
    """The worker's engine dies while it runs `requests`, and the next one is ready."""
    out = plane.handle(EngineLost(worker, "x", list(requests), [], True), 1.0)
    out += plane.handle(WorkerReady(worker, 2), 1.0)
    plane.check()
    return [each for each in out if not isinstance(each, Exhausted)]


def test_where_engines_die_and_nothing_is_answered_a_few_suspects_come_first() -> None:
    """Else a worker would lose all the engines that it may, and the next start of the run would do the same again."""
    plane = ControlPlane([OWNER], "work-stealing", 0.0, limits=Limits(prefetch=0))
    plane.handle(WorkerReady(OWNER, 2), 0.0)
    plane.handle(new(*range(8)), 0.0)
    assert die_together(plane, OWNER, (0, 1), (1, 1)) == [Assign(OWNER, [(0, 2), (1, 2)])]
    assert die_together(plane, OWNER, (0, 2), (1, 2)) == [Assign(OWNER, [(2, 1), (3, 1)])]
    assert die_together(plane, OWNER, (2, 1), (3, 1)) == [Assign(OWNER, [(2, 2), (3, 2)])]
    assert die_together(plane, OWNER, (2, 2), (3, 2)) == [Assign(OWNER, [(0, 3)])]
    [failed, assigned] = die_together(plane, OWNER, (0, 3))
    assert (isinstance(failed, Fail), assigned) == (True, Assign(OWNER, [(1, 3)]))
    [failed, assigned] = die_together(plane, OWNER, (1, 3))
    assert (isinstance(failed, Fail), assigned) == (True, Assign(OWNER, [(4, 1), (5, 1)])), "the engine may be broken"


def test_suspects_come_first_until_none_is_left_where_engines_are_known_to_work() -> None:
    plane = ControlPlane([OWNER], "work-stealing", 0.0, limits=Limits(prefetch=0))
    plane.handle(WorkerReady(OWNER, 2), 0.0)
    plane.handle(new(*range(9)), 0.0)
    plane.handle(report(OWNER, [], (0, 1), (1, 1)), 0.0)
    for first in (2, 4):
        for attempt in (1, 2):
            out = die_together(plane, OWNER, (first, attempt), (first + 1, attempt))
    assert out == [Assign(OWNER, [(2, 3)])]
    for index in (2, 3, 4):
        assert plane.handle(report(OWNER, [], (index, 3)), 1.0)[-1] == Assign(OWNER, [(index + 1, 3)])
    assert plane.handle(report(OWNER, [], (5, 3)), 1.0)[-1] == Assign(OWNER, [(6, 1), (7, 1)])


def test_where_something_is_answered_between_deaths_suspects_wait_for_the_end() -> None:
    plane = ControlPlane([OWNER], "work-stealing", 0.0, limits=Limits(prefetch=0))
    plane.handle(WorkerReady(OWNER, 2), 0.0)
    plane.handle(new(*range(9)), 0.0)
    for attempt in (1, 2):
        die_together(plane, OWNER, (0, attempt), (1, attempt))
    plane.handle(report(OWNER, [], (2, 1)), 1.0)
    for attempt in (1, 2):
        out = die_together(plane, OWNER, (3, attempt), (4, attempt))
    assert out == [Assign(OWNER, [(5, 1), (6, 1)])]


def test_an_engine_that_had_started_nothing_died_of_what_it_was_handed() -> None:
    plane = plane_of()
    plane.handle(new(0), 0.0)
    plane.handle(WorkerReady(OWNER, 2), 0.0)
    for attempt in (1, 2):
        plane.handle(EngineLost(OWNER, "x", [], [(0, attempt)], True), 0.0)
        assert plane.handle(WorkerReady(OWNER, 2), 0.0) == [Assign(OWNER, [(0, attempt + 1)])]
    [failure] = plane.handle(EngineLost(OWNER, "x", [], [(0, 3)], True), 0.0)
    assert isinstance(failure, Fail)


@pytest.mark.parametrize("restarts", [True, False])
def test_a_worker_that_never_answered_is_given_no_suspect_while_another_has(restarts: bool) -> None:
    plane = plane_of()
    plane.handle(WorkerReady(OTHER, 1), 0.0)
    plane.handle(new(0), 0.0)
    plane.handle(report(OTHER, [], (0, 1)), 0.0)
    plane.handle(new(1), 0.0)
    plane.handle(EngineLost(OTHER, "x", [(1, 1)], [], True), 0.0)
    plane.handle(WorkerReady(OTHER, 1), 0.0)
    plane.handle(EngineLost(OTHER, "x", [(1, 2)], [], True), 0.0)
    assert plane.handle(WorkerReady(OWNER, 1), 0.0) == []
    if restarts:
        assert plane.handle(WorkerReady(OTHER, 1), 0.0) == [Assign(OTHER, [(1, 3)])]
    else:
        assert plane.handle(EngineLost(OTHER, "x", [], [], False), 0.0) == [Assign(OWNER, [(1, 3)])]


def test_without_workers_and_without_requests_the_run_still_ends() -> None:
    plane = plane_of()
    plane.handle(WorkerLost(OWNER, "died"), 0.0)
    [stop] = plane.handle(WorkerLost(OTHER, "silent"), 0.0)
    assert isinstance(stop, Stop)
    assert stop.outcome == "no workers"
    assert "rank 1: died" in stop.reason


def test_stop_waits_until_the_last_answer_is_durable() -> None:
    plane = plane_in("input ended")
    assert not any(isinstance(each, Stop) for each in plane.handle(report(OWNER, [], (0, 1)), 1.0))
    assert plane.handle(Committed(1), 1.0) == [Stop("done", "")]


def test_a_victim_that_does_not_answer_does_not_keep_others_from_being_asked() -> None:
    plane = ControlPlane([1, 2, 3], "work-stealing", 0.0, limits=Limits(prefetch=4))
    plane.handle(WorkerReady(1, 1), 0.0)
    plane.handle(WorkerReady(2, 1), 0.0)
    plane.handle(new(*range(4)), 0.0)
    [first] = plane.handle(WorkerReady(3, 1), 0.0)
    assert isinstance(first, Recall)
    assert plane.handle(Tick(), 0.5) == []
    [second] = plane.handle(Tick(), 1.5)
    assert isinstance(second, Recall)
    assert {first.worker, second.worker} == {1, 2}


def test_what_a_victim_is_about_to_start_is_not_recalled_though_its_index_is_higher() -> None:
    """A worker starts requests in the order in which it got them, and one that moved comes behind later ones."""
    plane = ControlPlane([1, 2, 3], "work-stealing", 0.0, limits=Limits(prefetch=2))
    plane.handle(WorkerReady(1, 1), 0.0)
    plane.handle(new(0, 1, 2, 3, 4), 0.0)
    plane.handle(WorkerReady(2, 2), 0.0)  # has 3 and 4 queued for its two slots
    plane.handle(EngineLost(1, "x", [], [(0, 1), (1, 1), (2, 1)], True), 0.0)  # and now 0 and 1 behind them
    assert plane.handle(WorkerReady(3, 1), 0.0) == [Assign(3, [(2, 2)])]
    assert plane.handle(report(3, [(2, 2)], (2, 2)), 0.1) == [Record(3, [answer(2, 2)]), Recall(2, 0, [0])]


def test_workers_that_still_load_keep_their_share_of_a_short_input() -> None:
    plane = plane_of()
    plane.handle(new(*range(4)), 0.0)
    plane.handle(InputEnded(), 0.0)
    assert plane.handle(WorkerReady(OWNER, 4), 0.0) == [Assign(OWNER, [(0, 1), (1, 1)])]


def test_a_record_that_is_behind_stops_the_reader() -> None:
    plane = ControlPlane([1], "work-stealing", 0.0, limits=Limits(unacknowledged=2))
    plane.handle(WorkerReady(1, 4), 0.0)
    plane.handle(new(0, 1, 2), 0.0)
    assert plane.wanted() > 0
    plane.handle(report(1, [], (0, 1), (1, 1)), 0.0)
    assert plane.wanted() == 0
    plane.handle(Committed(1), 0.0)
    assert plane.wanted() > 0


def test_an_unknown_schedule_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="round-robin, work-stealing"):
        plane_of("random")
