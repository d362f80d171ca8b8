"""Rank 0's loop between fake workers, a fake record and a fake source: messages in, messages out, nothing sleeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from coordinator.callbacks import Callbacks, Snapshot
from coordinator.loop import ASSIGN_BYTES_MAX, TICK_S, Coordinator, outcome_error
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import ControlPlane, Limits
from scheduling.errors import EngineError, ProtocolError, RequestError, UserError
from scheduling.ledger import WorkerState
from scheduling.link import Hub
from tests.coordinator.fakes import FakeClock, FakeEndpoint, FakeRecord, FakeSource, Said, fake_rank, finished

LIMITS = Limits(prefetch=1, lease_s=60.0)


class Stage:
    """Rank 0 and its surroundings. `workers` speak for the ranks."""

    def __init__(
        self,
        prompts: Sequence[str | RequestError],
        workers: int = 1,
        limits: Limits = LIMITS,
        **callbacks: Any,
    ) -> None:
        self.clock = FakeClock()
        self.record = FakeRecord()
        self.source = FakeSource(prompts)
        self.results: list[bytes] = []
        self.notes: list[str] = []
        self.endpoint = endpoint = FakeEndpoint()
        ids = list(range(1, workers + 1))
        self.workers: dict[int, Said] = {rank: fake_rank(endpoint, rank) for rank in ids}
        self.hub = Hub(endpoint, ids)
        given: dict[str, Any] = {"on_result": self.results.append, "on_note": self.notes.append} | callbacks
        self.coordinator = Coordinator(
            self.hub, ControlPlane(ids, "work-stealing", self.clock(), limits=limits), self.source, self.record,
            self.clock, names={rank: f"rank {rank} on node{rank}" for rank in ids}, session=2, earlier=10,
            callbacks=Callbacks(**given),
        )  # fmt: skip

    def hear(self, worker: int, *messages: m.FromWorker) -> list[Any]:
        """The worker says this; returns what rank 0 answers it in that turn."""
        self.workers[worker].say(*messages)
        return self.step(worker)

    def step(self, worker: int = 1) -> list[Any]:
        self.coordinator.step()
        self.coordinator.plane.check()
        return self.workers[worker].take()

    def ready(self, worker: int = 1, slots: int = 2, generation: int = 1) -> list[Any]:
        message = m.Ready(slots=slots, generation=generation, load_s=0.1, backend="FAKE")
        self.workers[worker].say(message)
        said = []
        for _ in range(3):  # ready; read; assign
            said += self.step(worker)
        return said

    def durable(self) -> None:
        self.record.commit()
        self.coordinator.step()


def assigned(messages: list[Any]) -> list[int]:
    return [item.index for message in messages if isinstance(message, m.Assign) for item in message.items]


# ---------------------------------------------------------------- the way of a request


def test_requests_go_out_with_their_lines_and_the_workers_generation() -> None:
    stage = Stage(["one", "two"])
    said = [message for message in stage.ready(generation=7) if isinstance(message, m.Assign)]
    assert assigned(said) == [0, 1]
    assert {message.generation for message in said} == {7}
    item = said[0].items[0]
    assert (item.index, item.attempt) == (0, 1)
    assert json.loads(item.line) == {"custom_id": "id-0", "prompt": "one"}


def test_answers_are_recorded_first_and_counted_when_durable() -> None:
    stage = Stage(["one", "two"])
    stage.ready()
    first = finished(0)
    stage.hear(1, m.Report(finished=[first]))
    assert stage.record.take() == [first.line]
    assert stage.results == []
    assert stage.coordinator.snapshot().done == 0
    stage.durable()
    assert stage.results == [first.line]
    assert stage.coordinator.snapshot().done == 1
    assert stage.coordinator.outcome is None


def test_it_is_over_when_the_last_answer_is_durable_not_before() -> None:
    stage = Stage(["one", "two"])
    stage.ready()
    stage.hear(1, m.Report(finished=[finished(0), finished(1)]))
    stage.step()
    assert stage.coordinator.outcome is None
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("done", "")
    assert not stage.coordinator.in_flight


def test_a_heartbeat_is_no_reason_not_to_sleep() -> None:
    stage = Stage(["one"])
    stage.ready()
    stage.workers[1].say(m.Heartbeat())
    assert not stage.coordinator.step()
    stage.workers[1].say(m.Heartbeat(), m.Report(started=[(0, 1)]))
    assert stage.coordinator.step()


def test_an_empty_input_is_over_at_once() -> None:
    stage = Stage([])
    stage.step()
    assert stage.coordinator.outcome == ev.Stop("done", "")


def test_a_bad_line_is_recorded_as_failed_and_never_assigned() -> None:
    stage = Stage(["one", RequestError("line 2: top_p is 7"), "three"])
    assert assigned(stage.ready()) == [0, 2]
    [line] = stage.record.take()
    entry = json.loads(line)
    assert entry["custom_id"] == "id-1"
    assert entry["error"]["code"] == "invalid_request"
    assert "top_p is 7" in entry["error"]["message"]
    assert (entry["llmpi"]["index"], entry["llmpi"]["session"]) == (1, 2)
    stage.durable()
    assert stage.coordinator.snapshot().failed == 1


def test_late_answer_is_dropped_and_remembered_for_the_metrics() -> None:
    stage = Stage(["one"], workers=2)
    stage.ready(1)
    stage.hear(1, m.Crashed(reason="lost its mind"))
    stage.ready(2)
    stage.hear(1, m.Report(finished=[finished(0)]))
    stage.record.assert_empty()
    assert stage.coordinator.dropped == {(1, 0, 1)}
    stage.hear(2, m.Report(finished=[finished(0, attempt=2, rank=2)]))
    assert len(stage.record.take()) == 1


def test_answer_that_comes_twice_is_recorded_once() -> None:
    stage = Stage(["one", "two"])
    stage.ready()
    stage.hear(1, m.Report(finished=[finished(0)]), m.Report(finished=[finished(0)]))
    assert len(stage.record.take()) == 1


def test_an_answer_to_a_request_that_never_was_is_refused() -> None:
    stage = Stage(["one"])
    stage.ready()
    with pytest.raises(ProtocolError, match="rank 1"):
        stage.hear(1, m.Report(finished=[finished(99)]))


def test_streamed_text_goes_to_who_listens() -> None:
    deltas: list[m.Delta] = []
    stage = Stage(["one"], on_delta=deltas.append)
    stage.ready()
    mine, foreign = m.Delta(0, 1, 0, "he", 1), m.Delta(0, 9, 0, "??", 1)
    stage.hear(1, m.Report(started=[(0, 1)], deltas=[mine, foreign]))
    assert deltas == [mine]


def test_large_lines_are_sent_in_several_assigns() -> None:
    big = "x" * (ASSIGN_BYTES_MAX // 2 + 1)
    stage = Stage([big] * 4)
    said = [message for message in stage.ready(slots=4) if isinstance(message, m.Assign)]
    assert assigned(said) == [0, 1, 2, 3]
    assert max(sum(len(item.line) for item in message.items) for message in said) <= 2 * ASSIGN_BYTES_MAX
    assert len(said) >= 2


# ---------------------------------------------------------------- reading only what is wanted


def test_it_reads_no_more_than_workers_can_use() -> None:
    stage = Stage(["x"] * 1000)
    stage.step()
    before = 1000 - stage.source.left
    assert before <= 16, "a worker that is not ready yet counts as 16"
    stage.ready(slots=2)
    for _ in range(20):
        stage.step()
    assert 1000 - stage.source.left <= 16
    assert len(stage.source.asked) < 20, "what nobody wants is not asked for"


def test_a_record_that_is_behind_stops_the_reading() -> None:
    stage = Stage(["x"] * 1000, limits=Limits(prefetch=1, unacknowledged=10))
    indexes = assigned(stage.ready(slots=4))
    answered = 0
    for _ in range(200):
        report = m.Report(finished=[finished(index) for index in indexes])
        answered += len(indexes)
        indexes = assigned(stage.hear(1, report)) + assigned(stage.step())
        if not indexes:
            break
    assert 10 <= answered < 60
    left = stage.source.left
    for _ in range(5):
        stage.step()
    assert stage.source.left == left
    stage.record.commit()
    assert assigned(stage.step()) + assigned(stage.step())


def test_payloads_are_forgotten_when_their_requests_end() -> None:
    stage = Stage(["x" * 1000, RequestError("bad")])
    stage.ready()
    assert stage.coordinator.in_flight
    stage.hear(1, m.Report(finished=[finished(0)]))
    assert not stage.coordinator.in_flight
    assert stage.coordinator._payload_bytes == 0


# ---------------------------------------------------------------- workers that fail


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


# ---------------------------------------------------------------- stealing, draining


def test_unstarted_work_is_recalled_for_an_idle_worker_and_assigned_anew() -> None:
    stage = Stage(["x"] * 6, workers=2, limits=Limits(prefetch=5))
    given = assigned(stage.ready(1, slots=1))
    assert len(given) > 1
    stage.ready(2, slots=1)
    recalls = [message for message in stage.workers[1].take() if isinstance(message, m.Recall)]
    if not recalls:
        stage.hear(1, m.Report(started=[(given[0], 1)]))
        stage.hear(2, m.Heartbeat())
    first = recalls[0]
    assert first.indexes
    stage.hear(1, m.Recalled(first.recall, first.indexes))
    assert set(first.indexes) & set(assigned(stage.workers[2].take()) + assigned(stage.step(2)))


def test_a_straggler_is_copied_and_whoever_answers_second_is_cancelled_and_counts_for_nothing() -> None:
    stage = Stage(["x"] * 2, workers=2, limits=Limits(prefetch=0))
    stage.ready(1, slots=1)
    stage.ready(2, slots=1)
    stage.hear(1, m.Report(started=[(0, 1)]))
    stage.hear(2, m.Report(started=[(1, 1)]))
    stage.clock.pass_(2.0)
    stage.hear(1, m.Report(made_tokens=400))
    stage.hear(2, m.Report(made_tokens=20))
    stage.hear(1, m.Report(finished=[finished(0, tokens=300)]))
    stage.clock.pass_(1.0)
    [item] = [item for message in stage.step(1) if isinstance(message, m.Assign) for item in message.items]
    assert (item.index, item.attempt) == (1, 2)
    assert json.loads(item.line)["custom_id"] == "id-1"
    assert (stage.coordinator.snapshot().running, stage.coordinator.snapshot().queued) == (1, 0)
    stage.workers[2].take()
    stage.hear(1, m.Report(started=[(1, 2)], finished=[finished(1, attempt=2)]))
    assert stage.workers[2].take() == [m.Cancel([1])]
    # The metrics may be gathered before its answer comes: its row is known not to count already.
    assert stage.coordinator.dropped == {(2, 1, 1)}
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("done", "")
    stage.hear(2, m.Report(finished=[finished(1, tokens=33)]))
    assert len(stage.record.take()) == 2
    assert stage.coordinator.plane.totals.wasted_tokens == 33


def draining(*events: ev.DrainRequested | ev.TimeLimited) -> tuple[Stage, list[int], list[Any]]:
    """A stage whose worker runs the first of what it was given when these come; and what it is told then."""
    stops: list[ev.DrainRequested | ev.TimeLimited] = []
    stage = Stage(["x"] * 20, stops=lambda: [stops.pop(0) for _ in stops[:]])
    given = assigned(stage.ready(slots=2))
    stage.hear(1, m.Report(started=[(given[0], 1)]))
    stops.extend(events)
    stage.clock.pass_(TICK_S)
    return stage, given, stage.step()


def test_drain_starts_nothing_new_and_waits_for_what_runs() -> None:
    stage, given, said = draining(ev.DrainRequested("asked to"))
    assert not assigned(said)
    [recall] = [message for message in said if isinstance(message, m.Recall)]
    assert recall.indexes == given[1:]
    stage.hear(1, m.Recalled(recall.recall, recall.indexes))
    assert stage.coordinator.outcome is None
    stage.hear(1, m.Report(finished=[finished(given[0])]))
    stage.durable()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")


def test_what_runs_at_the_deadline_is_given_up_and_its_row_not_counted() -> None:
    stage, given, _ = draining(ev.DrainRequested("asked to", 101.0))
    stage.hear(1, m.Recalled(0, given[1:]))
    assert stage.coordinator.outcome is None
    assert stage.coordinator.in_flight
    stage.clock.pass_(1.0)
    stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")
    assert stage.coordinator.dropped == {(1, given[0], 1)}, "its worker may have ended it meanwhile"
    assert stage.record.take() == []


def test_what_is_set_aside_before_a_time_limit_is_not_kept_in_memory() -> None:
    stops: list[ev.TimeLimited] = []
    stage = Stage(["x", *["y" * 64_000] * 5, "x"], stops=lambda: [stops.pop(0) for _ in stops[:]])
    assert assigned(stage.ready(slots=1)) == [0, 1]
    stage.hear(1, m.Report(started=[(0, 1)]))
    stage.clock.pass_(1.0)
    stage.hear(1, m.Report(finished=[finished(0)]))
    stage.durable()
    stops.append(ev.TimeLimited(104.0, "time is up"))
    stage.clock.pass_(TICK_S)
    [recall] = [message for message in stage.step() if isinstance(message, m.Recall)]
    said = stage.hear(1, m.Recalled(0, recall.indexes))
    for _ in range(5):
        said += stage.step()
    assert assigned(said) == [6], "what is long would be late, what is short would not"
    assert stage.coordinator.plane.totals.set_aside == 5
    assert stage.coordinator.snapshot().queued == 1, "the others are not kept in memory"


def test_what_runs_twice_is_given_up_once_at_the_deadline_of_a_drain() -> None:
    asked: list[ev.DrainRequested] = []
    stage = Stage(["one", "two"], 2, Limits(prefetch=0), stops=lambda: asked.copy())
    stage.ready(1, 1)
    stage.ready(2, 1)
    stage.hear(1, m.Report(started=[(0, 1)]))
    stage.hear(2, m.Report(started=[(1, 1)]))
    stage.clock.pass_(1.0)
    stage.hear(1, m.Report(made_tokens=1000))
    stage.hear(2, m.Report(made_tokens=20))
    stage.clock.pass_(1.0)
    stage.hear(2, m.Report(made_tokens=20))
    stage.clock.pass_(0.5)
    assert [item.attempt for item in _items(stage.hear(1, m.Report(finished=[finished(0, tokens=512)])))] == [2]
    stage.durable()
    asked.append(ev.DrainRequested("asked to", stage.clock() + 1.0))
    for _ in range(2):
        stage.clock.pass_(1.0)
        stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked to")
    assert stage.coordinator.plane.totals.unfinished == 1
    assert not stage.coordinator.in_flight


def _items(messages: list[Any]) -> list[m.WorkItem]:
    return [item for message in messages if isinstance(message, m.Assign) for item in message.items]


def test_stop_request_is_looked_for_at_every_tick_and_drains() -> None:
    reasons: list[list[ev.DrainRequested]] = [[], [ev.DrainRequested("asked by llmpi stop")]]
    stage = Stage(["x"] * 5, stops=lambda: reasons.pop(0) if reasons else [])
    stage.step()
    assert stage.coordinator.outcome is None
    stage.clock.pass_(TICK_S / 2)
    stage.step()
    assert len(reasons) == 1, "between ticks nothing is asked"
    stage.clock.pass_(TICK_S)
    stage.step()
    stage.step()
    assert stage.coordinator.outcome == ev.Stop("drained", "asked by llmpi stop")


# ---------------------------------------------------------------- what others see


def test_snapshot_counts_from_the_first_assignment() -> None:
    ticks: list[Snapshot] = []
    stage = Stage(["x"] * 6, on_tick=ticks.append)
    stage.clock.pass_(100.0)
    given = assigned(stage.ready(slots=2))
    stage.clock.pass_(3.0)
    stage.hear(1, m.Report(started=[(given[0], 1)], finished=[finished(given[1], tokens=4)]))
    stage.durable()
    seen = stage.coordinator.snapshot()
    assert seen.elapsed_s == pytest.approx(3.0)
    assert (seen.total, seen.earlier, seen.done, seen.failed, seen.running) == (6, 10, 1, 0, 1)
    assert (seen.output_tokens, seen.prompt_tokens) == (4, 5)
    assert (seen.workers_ready, seen.workers) == (1, 1)
    assert ticks
    assert ticks[-1].total == 6


def test_step_tells_whether_anything_happened() -> None:
    stage = Stage(["one"])
    stage.ready()
    assert not stage.coordinator.step()
    stage.workers[1].say(m.Counters(row=b""))
    assert stage.coordinator.step()


def test_a_second_input_takes_over_ready_workers_and_cancels_what_was_left() -> None:
    stage = Stage(["x"] * 4)
    given = assigned(stage.ready(slots=2, generation=3))
    before = stage.coordinator
    clock, record = stage.clock, FakeRecord()
    plane = ControlPlane([1], "work-stealing", clock(), limits=LIMITS, first_index=before.plane.highest + 1)
    source = FakeSource(["new"], first_index=before.plane.highest + 1)
    after = Coordinator(stage.hub, plane, source, record, clock, names={1: "rank 1"}, session=2)
    after.take_over(before)
    for _ in range(3):
        after.step()
    said = stage.workers[1].take()
    [cancel] = [message for message in said if isinstance(message, m.Cancel)]
    assert set(cancel.indexes) >= set(given)
    [assign] = [message for message in said if isinstance(message, m.Assign)]
    assert assign.generation == 3
    stage.workers[1].say(m.Report(finished=[finished(given[0]), finished(assign.items[0].index)]))
    after.step()
    assert len(record.take()) == 1, "what the first input left is late now"
    assert after.dropped == {(1, given[0], 1)}
