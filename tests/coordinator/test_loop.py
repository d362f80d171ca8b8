"""Rank 0's loop: the way of a request, reading only what is wanted, work that changes hands."""

from __future__ import annotations

import json

import pytest

from coordinator.callbacks import Snapshot
from coordinator.loop import ASSIGN_BYTES_MAX, Coordinator
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import ControlPlane, Limits
from scheduling.errors import ProtocolError, RequestError
from tests.coordinator.fakes import FakeRecord, FakeSource, finished
from tests.coordinator.stage import LIMITS, Stage, assigned

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


# ---------------------------------------------------------------- work that changes hands


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
