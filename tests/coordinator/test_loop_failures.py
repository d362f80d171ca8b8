"""Rank 0's loop where workers fail, crash, fall silent and come back."""

from __future__ import annotations

import json

import pytest

from coordinator.loop import TICK_S, outcome_error
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import Limits
from scheduling.errors import EngineError, UserError
from scheduling.ledger import WorkerState
from tests.coordinator.fakes import finished
from tests.coordinator.stage import Stage, assigned


def cannot_load(reason: str, user_error: bool = False) -> m.EngineDown:
    return m.EngineDown(reason=reason, restarting=False, user_error=user_error)


@pytest.mark.parametrize(("user_error", "kind"), [(True, UserError), (False, EngineError)])
def test_engines_that_cannot_load_end_the_job_with_the_reason_and_the_ranks(
    user_error: bool, kind: type[Exception]
) -> None:
    stage = Stage(["one"], workers=2)
    stage.hear(2, cannot_load("the model is damaged", user_error))
    assert stage.coordinator.outcome is None
    with pytest.raises(kind, match=r"^rank 1 on node1, rank 2 on node2: the model is damaged$"):
        stage.hear(1, cannot_load("the model is damaged", user_error))


def test_engines_that_cannot_load_for_different_reasons_are_told_each_with_its_own() -> None:
    stage = Stage(["one"], workers=3)
    stage.hear(2, cannot_load("out of memory"))
    stage.hear(1, m.Crashed(reason="ValueError: no", traceback="Traceback"))
    with pytest.raises(EngineError) as raised:
        stage.hear(3, cannot_load("llama.cpp sees no GPU", user_error=True))
    assert str(raised.value) == (
        "rank 1 on node1: ValueError: no; rank 2 on node2: out of memory; rank 3 on node3: llama.cpp sees no GPU"
    )


@pytest.mark.parametrize("user_error", [True, False])
@pytest.mark.parametrize("first", [1, 2])
def test_one_rank_whose_engine_cannot_load_leaves_the_others_at_work(user_error: bool, first: int) -> None:
    stage = Stage(["one"], workers=2)
    for rank in (first, 3 - first):
        if rank == 1:
            assert assigned(stage.ready(1)) == [0]
        else:
            stage.hear(2, cannot_load("its GPU is broken", user_error))
    assert stage.notes == ["rank 2 on node2: its engine was lost (its GPU is broken); this worker takes no more work"]
    stage.hear(1, m.Report(finished=[finished(0)]))
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("done", "")


def test_engine_that_is_being_restarted_before_it_was_ready_ends_nothing() -> None:
    stage = Stage(["one"])
    stage.hear(1, m.EngineDown(reason="killed by signal 9", restarting=True))
    assert assigned(stage.ready()) == [0]
    assert any("killed by signal 9" in note and "rank 1 on node1" in note for note in stage.notes)


def test_requests_of_a_dead_engine_go_again_with_the_next_attempt() -> None:
    stage = Stage(["one", "two", "three"])
    assert assigned(stage.ready(slots=2)) == [0, 1, 2]
    stage.hear(1, m.Report(started=[(0, 1), (1, 1)]))
    stage.hear(1, m.EngineDown(reason="gone", started=[(0, 1), (1, 1)], unstarted=[(2, 1)]))
    said = [message for message in stage.ready(generation=2) if isinstance(message, m.Assign)]
    items = [(item.index, item.attempt) for message in said for item in message.items]
    assert sorted(items) == [(0, 2), (1, 2), (2, 1)]
    assert {message.generation for message in said} == {2}


def test_request_that_kills_engines_again_and_again_is_failed_with_its_history() -> None:
    stage = Stage(["poison"], limits=Limits(prefetch=1, deaths=2))
    stage.ready()
    for attempt in (1, 2):
        stage.hear(1, m.Report(started=[(0, attempt)]))
        stage.hear(1, m.EngineDown(reason=f"death {attempt}", started=[(0, attempt)]))
        stage.ready(generation=attempt + 1)
    [line] = stage.record.take()
    entry = json.loads(line)
    assert entry["custom_id"] == "id-0"
    assert entry["error"]["code"] == "engine_died"
    assert "death 1" in entry["error"]["message"]
    assert "death 2" in entry["error"]["message"]
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("done", "")


def test_crashed_worker_is_told_of_with_its_traceback_and_its_work_goes_elsewhere() -> None:
    stage = Stage(["one", "two"], workers=2)
    assert 0 in assigned(stage.ready(1, slots=1))
    stage.hear(1, m.Crashed(reason="ValueError: no", traceback="Traceback (most recent call last): …"))
    assert "rank 1 on node1: ValueError: no\nTraceback" in stage.notes[0]
    assert sorted(assigned(stage.ready(2, slots=2))) == [0, 1]


def test_silent_worker_is_lost_after_its_lease() -> None:
    stage = Stage(["one"], workers=2)
    assert assigned(stage.ready(1)) == [0]
    stage.ready(2)
    again: list[int] = []
    for _ in range(140):
        stage.clock.pass_(0.5)
        again += assigned(stage.hear(2, m.Heartbeat()))
    assert again == [0]


def test_silence_is_found_also_where_every_turn_of_rank_0_takes_long() -> None:
    stage = Stage(["one"], workers=2)
    assert assigned(stage.ready(1)) == [0]
    stage.ready(2)
    again: list[int] = []
    for _ in range(90):  # of a disk that answers after 1.5 s, say
        stage.clock.pass_(1.5)
        again += assigned(stage.hear(2, m.Heartbeat()))
    assert again == [0]


def test_a_disk_that_hangs_while_it_is_asked_for_a_stop_costs_no_worker() -> None:
    hangs_s = [100.0]

    def stops() -> list[ev.DrainRequested]:
        stage.clock.pass_(hangs_s.pop() if hangs_s and stage.coordinator.in_flight else 0.0)
        return []

    stage = Stage(["one"], stops=stops)
    stage.ready(1)
    stage.clock.pass_(TICK_S)
    stage.step()
    assert not hangs_s
    assert [view.state for view in stage.coordinator.plane.workers()] == [WorkerState.READY]
    assert stage.coordinator.outcome is None


def silent_stage() -> Stage:
    """Rank 1 was given request 0 and is silent for its lease; rank 2 has it now."""
    stage = Stage(["one"], workers=2)
    assert assigned(stage.ready(1)) == [0]
    stage.ready(2)
    for _ in range(140):
        stage.clock.pass_(0.5)
        stage.hear(2, m.Heartbeat())
    assert stage.coordinator.silent() == {1}
    assert stage.notes == ["rank 1 on node1: rank 1 has been silent for 60 s; its work goes to the others"]
    stage.workers[1].take()
    return stage


def test_a_worker_that_is_heard_again_begins_anew_and_takes_work() -> None:
    stage = silent_stage()
    said = stage.hear(1, m.Report(started=[(0, 1)], finished=[finished(0)]))
    assert said == [m.Rejoin(1)]
    assert stage.coordinator.silent() == set()
    assert stage.record.take() == [], "it answers for an attempt that is over"
    assert stage.hear(1, m.Heartbeat()) == []
    stage.hear(1, ready_again(rejoin=0))  # said before it heard of it
    assert stage.coordinator.plane.workers()[0].state is WorkerState.JOINING
    stage.hear(1, ready_again(rejoin=1, generation=2))
    assert "takes work again" in stage.notes[-1]
    stage.hear(2, m.Crashed(reason="x"))
    assert assigned(stage.step(1)) == [0]
    assert stage.hear(1, m.Heartbeat()) == []


def test_a_worker_that_returns_and_is_silent_again_is_lost_again() -> None:
    stage = silent_stage()
    stage.hear(1, m.Heartbeat())
    for _ in range(140):
        stage.clock.pass_(0.5)
        stage.hear(2, m.Heartbeat())
    assert stage.coordinator.plane.workers()[0].state is WorkerState.GONE
    assert m.Rejoin(2) in stage.hear(1, m.Heartbeat())


def test_a_worker_that_has_returned_takes_work_after_its_engine_has_died_too() -> None:
    stage = silent_stage()
    stage.hear(1, m.Heartbeat())
    stage.hear(1, ready_again(rejoin=1, generation=2))
    stage.hear(1, m.EngineDown(reason="it was killed by signal 11"))
    assert stage.coordinator.plane.workers()[0].state is WorkerState.JOINING
    stage.hear(1, ready_again(rejoin=1, generation=3))
    assert stage.coordinator.plane.workers()[0].state is WorkerState.READY
    assert len([note for note in stage.notes if "takes work again" in note]) == 1
    stage.hear(2, m.Crashed(reason="x"))
    assert assigned(stage.step(1)) == [0]


def ready_again(rejoin: int, generation: int = 1) -> m.Ready:
    return m.Ready(slots=2, generation=generation, load_s=0.1, backend="FAKE", rejoin=rejoin)


def test_a_worker_whose_process_is_known_to_be_dead_is_lost_after_what_it_has_said() -> None:
    stage = Stage(["one", "two"], workers=2)
    assert assigned(stage.ready(1)) == [0, 1]
    stage.ready(2)
    stage.endpoint.gone.add(1)
    stage.workers[1].say(m.Report(finished=[finished(0)]))
    assert assigned(stage.step(2)) == [1]
    stage.workers[1].assert_empty()
    assert stage.record.take() == [finished(0).line]
    assert stage.notes == ["rank 1 on node1: its process has died; its work goes to the others"]
    stage.clock.pass_(5.0)
    assert stage.step(1) == [], "nothing is sent to the dead"
    assert stage.coordinator.silent() == set()
    assert len(stage.notes) == 1


def test_rank_0_says_to_all_that_it_is_here() -> None:
    stage = Stage(["one"], workers=2)
    stage.ready(1)
    stage.ready(2)
    heard = {1: 0, 2: 0}
    for _ in range(40):
        stage.clock.pass_(0.25)
        stage.coordinator.step()
        for rank, said in stage.workers.items():
            heard[rank] += said.take().count(m.Heartbeat())
    assert heard == {1: 5, 2: 5}


def test_when_rank_0_itself_has_slept_nobody_is_taken_for_silent() -> None:
    stage = Stage(["one"], workers=2)
    assert assigned(stage.ready(1)) == [0]
    stage.ready(2)
    stage.clock.pass_(300.0)  # the whole job was suspended, or the caller of a Pool took its time
    assert assigned(stage.hear(2, m.Heartbeat())) == []
    assert stage.coordinator.outcome is None


def test_counters_are_handed_on_and_are_a_sign_of_life() -> None:
    told: list[tuple[int, m.Counters]] = []
    stage = Stage(["one"], on_counters=lambda worker, message: told.append((worker, message)))
    stage.ready()
    message = m.Counters(row=b"row", itl_buckets=[3], itl_counts=[4], telemetry=b"rows")
    for _ in range(3):
        stage.clock.pass_(50.0)  # of a lease of 60
        stage.hear(1, message)
    assert told == [(1, message)] * 3
    assert stage.coordinator.outcome is None
    Stage(["one"]).hear(1, message)


def test_without_any_worker_left_it_ends_with_each_ones_reason() -> None:
    stage = Stage(["one"])
    stage.ready()
    stage.hear(1, m.EngineDown(reason="the GPU fell off the bus", started=[(0, 1)], restarting=False))
    assert stage.coordinator.outcome is not None
    assert stage.coordinator.outcome.outcome == "no workers"
    error = outcome_error(stage.coordinator.outcome)
    assert isinstance(error, EngineError)
    assert "the GPU fell off the bus" in str(error)
    assert outcome_error(ev.Stop("done", "")) is None
