"""The worker's logic between a fake rank 0 and a fake engine: how it begins and ends, and the way of a request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scheduling import messages as m
from scheduling.errors import ConfigError
from scheduling.requestlines import text_line
from scheduling.seeds import derive_seed
from scheduling.vectors import to_bytes
from tests.coordinator.fakes import answer, hello, loaded
from tests.workers.worker_bench import RANK_NUMBER, SEED, Bench, line_of
from workers.protocol import Answer, Choice, Frame, Piece, Returned
from workers.worker import HEARTBEAT_S

# ---------------------------------------------------------------- start and stop


def test_it_says_hello_first_and_starts_no_engine_before_it_is_welcome() -> None:
    bench = Bench()
    assert bench.step() == [hello()]
    assert not bench.engines
    assert bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0)) == []
    assert len(bench.engines) == 1


def test_ready_tells_slots_and_generation() -> None:
    bench = Bench()
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    bench.engine.say(loaded(7))
    [ready] = bench.step()
    assert (ready.slots, ready.generation, ready.engine_pid, ready.backend) == (7, 1, 4711, "FAKE")


def test_refused_it_stops_with_the_reason() -> None:
    bench = Bench()
    bench.hear(m.Refuse("rank 3 has another model"))
    assert bench.worker.stopped
    assert bench.worker.refused == "rank 3 has another model"


def test_stop_and_collect_are_for_the_caller_to_see() -> None:
    bench = Bench().ready()
    assert bench.hear(m.Collect(5)) == [m.Collecting(5)]
    assert bench.engine.closed
    assert bench.worker.collect_epoch is None
    bench.hear(m.Enter(5))
    assert bench.worker.collect_epoch == 5
    assert not bench.worker.stopped
    bench.hear(m.Stop("done"))
    assert bench.worker.stopped
    assert bench.worker.refused is None


def test_engine_that_cannot_be_started_at_all_is_told_and_not_tried_again() -> None:
    bench = Bench()
    bench.step()
    bench.refuse = OSError("no memory")
    [_, down] = bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    assert isinstance(down, m.EngineDown)
    assert "no memory" in down.reason
    assert not down.restarting
    assert not down.user_error
    assert [type(message) for message in bench.pass_(1000.0)] == [m.Heartbeat]


def test_engine_refused_for_a_users_mistake_says_so() -> None:
    bench = Bench()
    bench.step()
    bench.refuse = ConfigError("--contexts 9 is too many")
    [_, down] = bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    assert down.user_error


@pytest.mark.parametrize("message", [m.Collect(1, 0.5), m.Stop("drained", 0.5)])
def test_the_engine_has_as_long_to_end_as_rank_0_says(message: m.FromCoordinator) -> None:
    bench = Bench()
    bench.rank0.say(m.Welcome(placement=m.Placement(), run_seed=SEED, session=0), message)
    bench.worker.step()
    bench.worker.close()
    assert bench.engines[0].close_s == 0.5


def test_a_heartbeat_is_no_reason_not_to_sleep() -> None:
    bench = Bench().ready()
    bench.rank0.say(m.Heartbeat())
    assert not bench.worker.step()
    bench.rank0.say(m.Heartbeat(), m.Exhausted(True))
    assert bench.worker.step()


# ---------------------------------------------------------------- the way of a request


def test_assigned_request_goes_to_the_engine_and_its_answer_to_rank_0() -> None:
    bench = Bench().ready()
    assert bench.assign(5) == []
    [job] = bench.engine.jobs
    assert (job.key, job.request.prompt, job.request.sampling.max_tokens) == (5, "prompt 5", 9)
    bench.engine.start(5)
    assert bench.step() == [m.Report(started=[(5, 1)])]
    bench.engine.say(Frame(finished=[answer(5, "text", tokens=3)]))
    [report] = bench.step()
    [finished] = report.finished
    assert (finished.index, finished.attempt, finished.ok) == (5, 1, True)
    assert (finished.prompt_tokens, finished.output_tokens) == (5, 3)
    line = line_of(finished)
    assert line["custom_id"] == "id-5"
    assert line["response"]["body"]["choices"][0]["text"] == "text"
    assert line["response"]["body"]["created"] == 1_700_000_000
    told = line["llmpi"]
    assert (told["index"], told["attempt"], told["rank"], told["session"]) == (5, 1, RANK_NUMBER, 4)
    assert told["tpot_s"] == pytest.approx((0.6 - 0.2) / 2)
    assert not bench.worker.in_flight


def test_embeddings_come_as_bytes_and_are_recorded_as_numbers() -> None:
    bench = Bench().ready()
    line = b'{"input": ["a", "b"], "custom_id": "e"}'
    bench.hear(m.Assign(1, [m.WorkItem(5, 1, line)]))
    assert bench.engine.jobs[0].request.inputs == ("a", "b")
    vectors = np.array([[0.5, 0.25], [1, 0]], np.float32)
    done = Answer(5, [Choice("", "stop", 0)] * 2, 7, 0, 0.1, 0.0, 0.6, vectors=to_bytes(vectors))
    bench.engine.say(Frame(finished=[done]))
    [report] = bench.step()
    [finished] = report.finished
    assert (finished.ok, finished.prompt_tokens, finished.output_tokens) == (True, 7, 0)
    body = line_of(finished)["response"]["body"]
    assert [one["embedding"] for one in body["data"]] == vectors.tolist()
    [row] = bench.worker.metrics.requests.rows()
    assert (row["output_tokens"], row["ok"]) == (0, 1)
    assert np.isnan([row["ttft_s"], row["tpot_s"]]).all()


def test_embeddings_that_were_cancelled_half_way_are_no_answer() -> None:
    bench = Bench().ready()
    bench.hear(m.Assign(1, [m.WorkItem(5, 1, b'{"input": ["a", "b"], "custom_id": "e"}')]))
    choices = [Choice("", "stop", 0), Choice("", "cancelled", 0)]
    bench.engine.say(Frame(finished=[Answer(5, choices, 7, 0, 0.1, 0.0, 0.6, vectors=bytes(16))]))
    [report] = bench.step()
    assert not report.finished[0].ok
    assert line_of(report.finished[0])["error"]["code"] == "cancelled"


def test_request_that_starts_and_ends_in_one_frame_is_reported_once() -> None:
    bench = Bench().ready()
    bench.assign(5, 6)
    bench.engine.say(Frame(started=[5, 6], finished=[answer(5)]))
    [report] = bench.step()
    assert report.started == [(6, 1)]
    assert [one.index for one in report.finished] == [5]


def test_seed_comes_from_run_and_index_unless_the_request_has_one() -> None:
    bench = Bench().ready()
    own = b'{"custom_id": "a", "prompt": "x", "seed": 77}'
    others = [m.WorkItem(6, 1, text_line("y", "b")), m.WorkItem(7, 2, text_line("z", "c"))]
    bench.hear(m.Assign(1, [m.WorkItem(5, 1, own), *others]))
    assert [job.seed for job in bench.engine.jobs] == [77, derive_seed(SEED, 6), derive_seed(SEED, 7)]


def test_ends_are_told_since_the_welcome_and_from_whom_work_was_taken() -> None:
    bench = Bench()
    bench.clock.pass_(100.0)  # however long this rank took to start
    bench.ready(slots=4)
    lines = {index: text_line("good", f"id-{index}") for index in (5, 6)} | {7: b"{bad"}
    items = [
        m.WorkItem(index, 1, line, victim) for (index, line), victim in zip(lines.items(), (2, None, 0), strict=True)
    ]
    [report] = bench.hear(m.Assign(1, items))
    bench.clock.pass_(1.5)
    bench.engine.say(Frame(finished=[answer(5), answer(6, error="no")]))
    told = [line_of(one)["llmpi"] for one in (*report.finished, *bench.step()[0].finished)]
    assert [(one["index"], one["end_s"], one["stolen_from"]) for one in told] == [
        (7, 0.0, 0),
        (5, 1.5, 2),
        (6, 1.5, None),
    ]
    rows = bench.worker.metrics.requests.rows()
    assert rows["end_s"].tolist() == [0.0, 1.5, 1.5]
    assert rows["stolen_from"].tolist() == [0, 2, -1]


def test_bad_line_fails_alone_and_is_never_given_to_the_engine() -> None:
    bench = Bench().ready()
    lines = [b"{bad", text_line("good", "id-1"), b'{"prompt": 3.5}']
    [report] = bench.hear(m.Assign(1, [m.WorkItem(index, 1, line) for index, line in enumerate(lines)]))
    assert bench.engine.take() == [1]
    assert [(one.index, one.ok) for one in report.finished] == [(0, False), (2, False)]
    line = line_of(report.finished[0])
    assert line["custom_id"] == "request-0"
    assert line["error"]["code"] == "invalid_request"
    assert bench.worker.metrics.failed == 2


def test_failed_request_keeps_its_id_and_counts_no_output() -> None:
    bench = Bench().ready()
    bench.assign(5, 6)
    bench.engine.say(Frame(finished=[answer(5, error="the prompt has 900 tokens, the context 256"), answer(6)]))
    [report] = bench.step()
    bad, good = report.finished
    assert (bad.ok, good.ok) == (False, True)
    assert bad.output_tokens == 0
    assert line_of(bad)["custom_id"] == "id-5"
    assert "900 tokens" in line_of(bad)["error"]["message"]
    metrics = bench.worker.metrics
    assert (metrics.finished, metrics.failed, metrics.output_tokens) == (2, 1, 3)
    assert metrics.requests.rows()["ok"].tolist() == [0, 1]


def test_pieces_of_a_streamed_request_become_deltas_of_the_right_attempt() -> None:
    bench = Bench().ready()
    bench.assign(5, attempt=2)
    bench.engine.say(Frame(started=[5], pieces=[Piece(5, 0, "he", 1), Piece(9, 0, "??", 1)]))
    [report] = bench.step()
    assert report.deltas == [m.Delta(5, 2, 0, "he", 1)]
    bench.engine.say(Frame(pieces=[Piece(5, 0, "llo", 2)], finished=[answer(5, "hello")]))
    [report] = bench.step()
    assert report.deltas == [m.Delta(5, 2, 0, "llo", 2)]
    assert len(report.finished) == 1


def test_answer_to_what_is_not_held_is_ignored() -> None:
    bench = Bench().ready()
    bench.engine.finish(5)
    assert bench.step() == []
    assert bench.worker.metrics.finished == 0


@pytest.mark.parametrize(("tokens", "defined"), [(0, False), (1, False), (2, True)])
def test_tpot_and_ttft_are_missing_where_they_are_undefined(tokens: int, defined: bool) -> None:
    bench = Bench().ready()
    bench.assign(5)
    bench.engine.say(Frame(finished=[answer(5, tokens=tokens)]))
    bench.step()
    [row] = bench.worker.metrics.requests.rows()
    assert (row["tpot_s"] == row["tpot_s"]) == defined
    assert (row["ttft_s"] == row["ttft_s"]) == (tokens > 0)


# ---------------------------------------------------------------- recall, cancel


def test_recall_goes_to_the_engine_and_only_what_it_returns_is_forgotten() -> None:
    bench = Bench().ready()
    bench.assign(5, 6, 7)
    assert bench.hear(m.Recall(30, [6, 7])) == []
    assert bench.engine.recalls == [(30, [6, 7])]
    bench.engine.say(Frame(started=[5, 6]), Returned(30, [7]))
    report, confirmed = bench.step()
    # What has started must be told before the confirmation: rank 0 takes the others for returned.
    assert report.started == [(5, 1), (6, 1)]
    assert confirmed == m.Recalled(30, [7])
    bench.engine.finish(5, 6, 7)
    [report] = bench.step()
    assert [one.index for one in report.finished] == [5, 6]


def test_recall_without_an_engine_returns_nothing() -> None:
    bench = Bench().ready()
    bench.engine.die()
    bench.step()
    assert bench.hear(m.Recall(31, [5])) == [m.Recalled(31, [])]


def test_cancel_reaches_the_engine_for_what_is_held_only() -> None:
    bench = Bench().ready()
    bench.assign(5, 6)
    bench.hear(m.Cancel([6, 99]))
    assert bench.engine.cancelled == [6]


# ---------------------------------------------------------------- sign of life


def test_heartbeat_only_after_silence() -> None:
    bench = Bench().ready()
    assert bench.pass_(HEARTBEAT_S * 0.9) == []
    assert bench.pass_(HEARTBEAT_S * 0.2) == [m.Heartbeat()]
    assert bench.pass_(HEARTBEAT_S * 0.9) == []
    bench.assign(5)
    bench.engine.start(5)
    assert bench.step() == [m.Report(started=[(5, 1)])]
    assert bench.pass_(HEARTBEAT_S * 0.9) == []


@pytest.mark.parametrize(("lease_s", "every_s"), [(60.0, HEARTBEAT_S), (15.0, 3.0), (5.0, 1.0), (2.0, 0.4)])
def test_five_heartbeats_fit_into_a_lease(lease_s: float, every_s: float) -> None:
    bench = Bench(lease_s=lease_s).ready()
    assert bench.pass_(every_s * 0.9) == []
    assert bench.pass_(every_s * 0.2) == [m.Heartbeat()]


def test_an_engine_that_was_to_be_started_again_is_not_once_it_is_to_end() -> None:
    bench = Bench().ready()
    bench.engine.die()
    bench.step()
    assert bench.hear(m.Collect(1)) == [m.Collecting(1)]
    bench.pass_(1000.0)
    assert len(bench.engines) == 1


# ---------------------------------------------------------------- back after its lease


def test_told_to_rejoin_it_drops_what_it_had_and_then_says_ready_again() -> None:
    bench = Bench().ready()
    bench.assign(5, 6)
    bench.engine.start(5)
    bench.step()
    assert bench.hear(m.Rejoin(3)) == []
    assert bench.engine.cancelled == [5, 6]
    bench.assign(7)  # sent before: of the generation that is over
    assert bench.engine.take() == [5, 6]
    bench.engine.finish(5)
    assert [type(message) for message in bench.step()] == [m.Report]
    bench.engine.finish(6)
    report, ready = bench.step()
    assert [one.index for one in report.finished] == [6]
    assert (ready.generation, ready.rejoin, ready.slots) == (2, 3, 2)
    bench.assign(8, generation=2)
    assert bench.engine.take() == [8]
    assert bench.step() == []


def test_told_to_rejoin_while_its_engine_loads_it_says_ready_once() -> None:
    bench = Bench()
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0), m.Rejoin(1))
    bench.engine.say(loaded())
    [ready] = bench.step()
    assert ready.rejoin == 1
    assert bench.step() == []


def test_told_to_rejoin_without_work_it_says_ready_at_once() -> None:
    bench = Bench().ready()
    [ready] = bench.hear(m.Rejoin(1))
    assert (ready.generation, ready.rejoin) == (2, 1)


def test_step_tells_whether_anything_happened() -> None:
    bench = Bench().ready()
    assert not bench.worker.step()
    bench.rank0.say(m.Exhausted(False))
    assert bench.worker.step()
    bench.engine.say(Frame())
    assert bench.worker.step()


# ---------------------------------------------------------------- a crash of our own


def test_after_a_crash_it_only_listens_to_what_ends_it() -> None:
    bench = Bench().ready()
    bench.assign(5)
    bench.worker.crash("ValueError: no", "Traceback …")
    assert bench.rank0.take()[-1] == m.Crashed(reason="ValueError: no", traceback="Traceback …")
    assert bench.engine.closed
    assert not bench.worker.in_flight
    bench.rank0.say(m.Assign(1, [m.WorkItem(6, 1, text_line("x", "a"))]), m.Collect(2), m.Enter(2))
    assert bench.worker.listen()
    assert bench.worker.collect_epoch == 2
    assert bench.rank0.take() == [m.Collecting(2)]
    bench.clock.pass_(HEARTBEAT_S * 1.1)
    bench.worker.listen()
    assert bench.rank0.take() == [m.Heartbeat()]
    assert bench.engine.take() == [5]
    bench.rank0.say(m.Stop("done"))
    bench.worker.listen()
    assert bench.worker.stopped


def test_an_exception_while_the_engine_is_closed_is_told_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench().ready()
    bench.rank0.take()

    def poll() -> list[Any]:
        raise ValueError("no")

    monkeypatch.setattr(bench.engine, "poll", poll)
    bench.worker.close()
    *_, told = bench.rank0.take()
    assert isinstance(told, m.Crashed)
    assert told.reason == "ValueError: no"
    assert "in poll" in told.traceback
    assert bench.engine.closed


def test_answers_that_are_counted_are_told_before_a_crash() -> None:
    """Else the metrics would count requests that the record does not have from this rank."""
    times = [1.0]
    bench = Bench(wall_clock=times.pop).ready()
    bench.assign(5, 6)
    bench.engine.finish(5, 6)
    with pytest.raises(IndexError):
        bench.worker.step()
    bench.worker.crash("IndexError: planted", "")
    report, crashed = bench.rank0.take()
    assert [one.index for one in report.finished] == [5]
    assert isinstance(crashed, m.Crashed)
    assert bench.worker.metrics.finished == 1
