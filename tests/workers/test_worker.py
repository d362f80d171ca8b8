"""The worker's logic between a fake rank 0 and a fake engine: no process, no clock, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scheduling import messages as m
from scheduling.errors import ConfigError
from scheduling.link import Spoke
from scheduling.requestlines import text_line
from scheduling.requests import Sampling
from scheduling.seeds import derive_seed
from scheduling.tables import RANK, TELEMETRY
from scheduling.vectors import to_bytes
from tests.coordinator.fakes import FakeClock, FakeEndpoint, FakeEngine, answer, fake_rank0, hello, loaded
from workers.care import (
    ANSWERS_A_RESTART,
    LOADING_LEASES,
    OVERSLEPT_S,
    RESTART_BACKOFF_S,
    RESTARTS_MAX,
    SECONDS_A_RESTART,
)
from workers.protocol import Answer, Choice, EngineFailed, Frame, Piece, Returned, Stats
from workers.worker import HEARTBEAT_S, Worker, WorkerOptions

RANK_NUMBER = 3
SEED = 11


class Bench:
    """A worker with everything around it. `engines` lists those it has started, the last one being in use."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.engines: list[FakeEngine] = []
        self.refuse: Exception | None = None
        endpoint = FakeEndpoint()
        self.rank0 = fake_rank0(endpoint)
        fields: dict[str, Any] = {
            "rank": RANK_NUMBER, "hello": hello(), "model_name": "m", "defaults": Sampling(max_tokens=9),
            "engine_factory": self._start, "clock": self.clock, "wall_clock": lambda: 1_700_000_000.9,
        }  # fmt: skip
        self.worker = Worker(Spoke(endpoint), WorkerOptions(**(fields | options)))

    def _start(self, placement: m.Placement) -> FakeEngine:
        if self.refuse is not None:
            raise self.refuse
        self.engines.append(FakeEngine())
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def hear(self, *messages: Any) -> list[Any]:
        """Rank 0 says this; returns what the worker answers in that turn."""
        self.rank0.say(*messages)
        self.worker.step()
        return self.rank0.take()

    def step(self) -> list[Any]:
        self.worker.step()
        return self.rank0.take()

    def pass_(self, seconds: float) -> list[Any]:
        self.clock.pass_(seconds)
        return self.step()

    def ready(self, slots: int = 2) -> Bench:
        """Past hello and welcome, with a loaded engine."""
        self.hear(m.Welcome(placement=m.Placement(note="CPU"), run_seed=SEED, session=4))
        self.engine.say(loaded(slots))
        *_, message = self.step()
        assert isinstance(message, m.Ready)
        return self

    def assign(self, *indexes: int, attempt: int = 1, generation: int = 1) -> list[Any]:
        items = [m.WorkItem(index, attempt, text_line(f"prompt {index}", f"id-{index}")) for index in indexes]
        return self.hear(m.Assign(generation, items))


def line_of(finished: m.Finished) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(finished.line)
    return line


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


# ---------------------------------------------------------------- engines that die


def test_dead_engine_gives_back_everything_started_and_unstarted_apart() -> None:
    bench = Bench().ready()
    bench.assign(5, 6, 7)
    bench.engine.say(Frame(started=[5, 6], finished=[answer(5)]))
    bench.engine.die("it was killed by signal 9")
    report, down = bench.step()
    assert [one.index for one in report.finished] == [5]
    assert (down.started, down.unstarted) == ([(6, 1)], [(7, 1)])
    assert (down.reason, down.restarting) == ("it was killed by signal 9", True)
    assert bench.engines[0].closed
    assert not bench.worker.in_flight


def test_what_comes_after_the_death_of_an_engine_is_not_laid_to_it() -> None:
    bench = Bench().ready()
    bench.engine.die()  # and its rank was stopped meanwhile, so that nobody has seen it
    *_, down = bench.assign(5)
    assert isinstance(down, m.EngineDown)
    assert (down.started, down.unstarted) == ([], [])


def test_restart_waits_longer_each_time() -> None:
    bench = Bench().ready()
    waits = []
    for _ in range(RESTARTS_MAX):
        bench.engine.die()
        count, since = len(bench.engines), bench.clock.now
        bench.step()
        while len(bench.engines) == count:
            bench.pass_(0.01)
        waits.append(bench.clock.now - since)
        bench.engine.say(loaded())
        bench.step()
    assert waits == pytest.approx([RESTART_BACKOFF_S * 2**k for k in range(RESTARTS_MAX)], abs=0.02)


def test_it_gives_up_after_restarts_without_a_single_answer() -> None:
    bench = Bench().ready()
    told = []
    for _ in range(RESTARTS_MAX + 1):
        bench.engine.die("it was killed by signal 11")
        told += downs(bench.step())
        bench.pass_(60.0)
        bench.engine.say(loaded())
        bench.step()
    assert [down.restarting for down in told] == [True] * RESTARTS_MAX + [False]
    started = len(bench.engines)
    bench.pass_(1000.0)
    assert len(bench.engines) == started


def downs(messages: list[Any]) -> list[m.EngineDown]:
    return [message for message in messages if isinstance(message, m.EngineDown)]


def deaths_until_it_leaves(bench: Bench, answers: int, lived_s: float, limit: int) -> int:
    """How often an engine may die that answers so many requests before, and lives so long."""
    for generation in range(1, limit + 1):
        for index in range(answers):
            bench.assign(100 * generation + index, generation=generation)
            bench.engine.finish(100 * generation + index)
            bench.step()
        bench.pass_(lived_s)
        bench.engine.die("it was killed by signal 11")
        [down] = downs(bench.step())
        if not down.restarting:
            assert down.reason == (
                f"it was killed by signal 11; {generation} of its engines have died, with too little done in between"
            )
            return generation
        bench.pass_(RESTART_BACKOFF_S * 2**RESTARTS_MAX)
        bench.engine.say(loaded())
        bench.step()
    return limit


@pytest.mark.parametrize(("answers", "lived_s"), [(ANSWERS_A_RESTART, 1.0), (1, SECONDS_A_RESTART)])
def test_a_death_now_and_then_is_forgiven_for_ever(answers: int, lived_s: float) -> None:
    assert deaths_until_it_leaves(Bench().ready(), answers, lived_s, 10 * RESTARTS_MAX) == 10 * RESTARTS_MAX


def test_an_engine_that_dies_after_each_answer_is_not_restarted_for_ever() -> None:
    deaths = deaths_until_it_leaves(Bench().ready(), 1, 1.0, 10 * RESTARTS_MAX)
    assert RESTARTS_MAX + 1 <= deaths <= 2 * RESTARTS_MAX


def test_an_engine_that_dies_while_it_loads_is_tried_less_often() -> None:
    bench = Bench()
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    told = []
    for _ in range(RESTARTS_MAX + 1):
        bench.engine.die("it was killed by signal 6")
        told += downs(bench.step())
        bench.pass_(RESTART_BACKOFF_S * 2**RESTARTS_MAX)
    assert [down.restarting for down in told] == [True, True, False]


def test_time_in_which_nothing_was_answered_earns_no_restart() -> None:
    bench = Bench().ready()
    assert deaths_until_it_leaves(bench, 0, SECONDS_A_RESTART, 10 * RESTARTS_MAX) == RESTARTS_MAX + 1


def test_engine_that_says_that_it_cannot_be_loaded_is_not_restarted() -> None:
    bench = Bench()
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    bench.engine.say(EngineFailed(reason="no such file", user_error=True))
    bench.engine.die("it left")
    assert downs(bench.step()) == [m.EngineDown(reason="no such file", restarting=False, user_error=True)]
    bench.pass_(1000.0)
    assert len(bench.engines) == 1


def test_engine_that_fails_at_its_work_is_restarted() -> None:
    """One request may have been too much for it: the others are not to lose this worker."""
    bench = Bench().ready()
    bench.assign(5)
    bench.engine.say(Frame(started=[5]), EngineFailed(reason="IndexError: list index out of range"))
    bench.engine.die("exit code 1")
    report, down = bench.step()
    assert report.started == [(5, 1)]
    assert down == m.EngineDown(reason="IndexError: list index out of range", started=[(5, 1)], restarting=True)


class Health:
    """What is known of a worker's GPUs."""

    def __init__(self, trouble: str = "") -> None:
        self.said = trouble

    def trouble(self) -> str:
        return self.said

    def free(self) -> str:
        return "free on its GPU now: 0.5 of 80.0 GiB"


@pytest.mark.parametrize(
    ("reason", "trouble", "told"),
    [
        (
            "killed by SIGABRT; its last words: CUDA error: out of memory", "",
            "killed by SIGABRT; its last words: CUDA error: out of memory (free on its GPU now: 0.5 of 80.0 GiB); use "
            "fewer --slots, a smaller --ctx or fewer --gpu-layers",
        ),
        ("killed by SIGABRT; its last words: CUDA error: uncorrectable ECC error encountered", "", None),
        (
            "killed by SIGABRT; its last words: CUDA error: unknown error", "GPU-7: GPU is lost",
            "killed by SIGABRT; its last words: CUDA error: unknown error; GPU-7: GPU is lost",
        ),
        ("killed by SIGKILL", "GPU-7: Xid 79, it is gone", "killed by SIGKILL; GPU-7: Xid 79, it is gone"),
    ],
)  # fmt: skip
def test_nothing_is_tried_again_where_memory_does_not_suffice_or_the_gpu_is_gone(
    reason: str, trouble: str, told: str | None
) -> None:
    bench = Bench(health_factory=lambda placement: Health(trouble)).ready()
    bench.assign(5, 6)
    bench.engine.start(5)
    bench.engine.die(reason)
    *_, down = bench.step()
    assert down == m.EngineDown(reason=told or reason, started=[(5, 1)], unstarted=[(6, 1)], restarting=False)
    bench.pass_(1000.0)
    assert len(bench.engines) == 1


def test_too_little_memory_to_load_is_told_with_what_is_free() -> None:
    bench = Bench(health_factory=lambda placement: Health())
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    bench.engine.say(EngineFailed(reason="no context: cudaMalloc failed: out of memory. Use fewer --slots"))
    [down] = downs(bench.step())
    assert down.reason.endswith("Use fewer --slots (free on its GPU now: 0.5 of 80.0 GiB)")
    assert not down.restarting


# ---------------------------------------------------------------- engines that hang

LEASE_S = 50.0


def turns(bench: Bench, seconds: float) -> list[Any]:
    """Time passes as it does for a worker that runs: in many short turns. Heartbeats are left out."""
    said = []
    for _ in range(round(seconds)):
        said += bench.pass_(1.0)
    return [message for message in said if not isinstance(message, m.Heartbeat | m.Counters)]


def test_an_engine_that_has_work_and_says_nothing_for_its_lease_is_killed_and_replaced() -> None:
    bench = Bench(engine_lease_s=LEASE_S).ready()
    turns(bench, 10 * LEASE_S)  # nothing to do is nothing to say
    bench.assign(5, 6)
    bench.engine.start(5)
    assert turns(bench, LEASE_S) == [m.Report(started=[(5, 1)])]
    [down] = downs(turns(bench, 2))
    assert down == m.EngineDown(
        reason="it had work and made no step for 50 s (--engine-lease), and was killed", started=[(5, 1)],
        unstarted=[(6, 1)],
    )  # fmt: skip
    assert bench.engines[0].closed
    bench.engines[0].finish(5)  # too late: nobody listens to it any more
    assert turns(bench, 2) == []
    assert len(bench.engines) == 2
    bench.engine.say(loaded())
    bench.step()
    bench.assign(5, attempt=2, generation=2)
    bench.engine.finish(5)
    [report] = bench.step()
    assert [(one.index, one.attempt) for one in report.finished] == [(5, 2)]


def test_an_engine_that_counts_its_steps_keeps_its_lease() -> None:
    bench = Bench(engine_lease_s=LEASE_S).ready()
    bench.assign(5)
    bench.engine.start(5)
    turns(bench, 1)
    stats = Stats(
        interval_s=1.0, steps=1, prompt_tokens=0, output_tokens=0, busy_s=1.0, slot_s=1.0, decode_s=0.0, sample_s=0.0
    )
    for _ in range(4):
        bench.engine.say(stats)
        assert turns(bench, LEASE_S - 1) == []


def test_an_engine_in_which_one_context_stands_still_while_another_goes_on_is_replaced() -> None:
    bench = Bench(engine_lease_s=LEASE_S).ready()
    bench.assign(5, 6)
    bench.engine.start(5, 6)
    turns(bench, 1)
    for stalled_s, told in ((LEASE_S - 1, 0), (LEASE_S + 1, 1)):
        bench.engine.say(
            Stats(
                interval_s=1.0, steps=1, prompt_tokens=0, output_tokens=0, busy_s=1.0, slot_s=1.0, decode_s=0.0,
                sample_s=0.0, stalled_s=stalled_s,
            )
        )  # fmt: skip
        assert len(downs(turns(bench, 1))) == told
    bench.pass_(RESTART_BACKOFF_S)
    bench.engine.say(loaded())
    assert downs(turns(bench, 5)) == [], "the next one has done nothing wrong"


def test_loading_is_granted_a_longer_lease() -> None:
    bench = Bench(engine_lease_s=LEASE_S)
    bench.hear(m.Welcome(placement=m.Placement(), run_seed=0, session=0))
    assert downs(turns(bench, LOADING_LEASES * LEASE_S)) == []
    [down] = downs(turns(bench, 2))
    assert down.reason == "it did not load within 300 s (6 times --engine-lease), and was killed"
    assert down.restarting


def test_time_in_which_the_worker_itself_stood_still_is_not_counted() -> None:
    bench = Bench(engine_lease_s=LEASE_S).ready()
    bench.assign(5)
    bench.engine.start(5)
    turns(bench, 20)
    bench.pass_(1000.0)  # its whole host was suspended, say
    assert turns(bench, LEASE_S - 20 - OVERSLEPT_S - 1) == []
    assert len(downs(turns(bench, OVERSLEPT_S + 2))) == 1


# ---------------------------------------------------------------- requests that run too long


def test_a_request_over_its_time_is_stopped_and_fails_and_no_other_does() -> None:
    bench = Bench(request_timeout_s=30.0).ready()
    bench.assign(5, 6, 7)
    bench.engine.start(5)
    bench.step()
    bench.pass_(20.0)
    bench.engine.start(6)
    bench.step()
    bench.pass_(9.0)
    assert bench.engine.cancelled == []
    bench.pass_(2.0)
    assert bench.engine.cancelled == [5], "7 has not started, 6 only just"
    cut = Answer(5, [Choice("endless", "cancelled", 40)], 5, 40, 0.1, 0.2, 31.0)
    bench.engine.say(Frame(finished=[cut, answer(6)]))
    [report] = bench.step()
    assert [(one.index, one.ok) for one in report.finished] == [(5, False), (6, True)]
    error = line_of(report.finished[0])["error"]
    assert error["code"] == "timeout"
    assert error["message"] == "it ran for longer than --request-timeout 30 and was stopped after 40 tokens of output"
    bench.pass_(100.0)
    assert bench.engine.cancelled == [5], "what has ended is not stopped again"


def test_an_answer_that_was_complete_before_it_could_be_stopped_counts() -> None:
    bench = Bench(request_timeout_s=30.0).ready()
    bench.assign(5)
    bench.engine.start(5)
    bench.step()
    bench.pass_(31.0)
    bench.engine.finish(5)
    [report] = bench.step()
    assert report.finished[0].ok


def test_the_time_of_a_request_begins_anew_in_another_engine() -> None:
    bench = Bench(request_timeout_s=30.0).ready()
    bench.assign(5)
    bench.engine.start(5)
    bench.step()
    bench.pass_(29.0)
    bench.engine.die()
    bench.step()
    bench.pass_(RESTART_BACKOFF_S)
    bench.engine.say(loaded())
    bench.step()
    bench.assign(5, attempt=2, generation=2)
    bench.engine.start(5)
    bench.step()
    bench.pass_(29.0)
    assert bench.engine.cancelled == []
    bench.pass_(2.0)
    assert bench.engine.cancelled == [5]


def test_work_for_an_engine_that_has_died_is_dropped() -> None:
    bench = Bench().ready()
    bench.engine.die()
    bench.step()
    assert bench.assign(5, generation=1) == []
    bench.pass_(RESTART_BACKOFF_S)
    bench.engine.say(loaded())
    [ready] = bench.step()
    assert ready.generation == 2
    bench.assign(6, generation=1)
    assert bench.engine.take() == []
    bench.assign(7, generation=2)
    assert bench.engine.take() == [7]


def test_what_a_dying_engine_last_says_of_its_work_is_counted() -> None:
    bench = Bench().ready()
    stats = Stats(
        interval_s=1.0, steps=7, prompt_tokens=1, output_tokens=2, busy_s=0.5, slot_s=0.75, decode_s=0.4, sample_s=0.1,
        drafted_tokens=6, accepted_tokens=4, itl_buckets=[3], itl_counts=[2],
    )  # fmt: skip
    bench.engine.say(stats)
    bench.engine.last_words = [stats]
    bench.engine.die()
    bench.step()
    metrics = bench.worker.metrics
    assert (metrics.steps, metrics.busy_s, metrics.slot_s) == (14, 1.0, 1.5)
    assert (metrics.drafted_tokens, metrics.accepted_tokens) == (12, 8)
    assert metrics.itl.counts[3] == 4


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


# ---------------------------------------------------------------- telemetry and starved slots


def test_slots_are_starved_only_while_work_exists_elsewhere() -> None:
    bench = Bench().ready(slots=2)
    bench.pass_(1.0)
    bench.assign(5)
    bench.pass_(2.0)
    bench.assign(6)
    bench.pass_(4.0)
    metrics = bench.worker.metrics
    assert metrics.starved_slot_s == pytest.approx(2 * 1.0 + 1 * 2.0)
    bench.hear(m.Exhausted(True))
    bench.engine.finish(5, 6)
    bench.pass_(8.0)
    bench.pass_(8.0)
    assert metrics.starved_slot_s == pytest.approx(4.0)
    bench.hear(m.Exhausted(False))
    bench.pass_(1.0)
    assert metrics.starved_slot_s == pytest.approx(6.0)


def test_no_slot_is_starved_without_an_engine() -> None:
    bench = Bench().ready(slots=2)
    bench.engine.die()
    bench.step()
    bench.pass_(100.0)
    assert bench.worker.metrics.starved_slot_s == 0.0


def test_telemetry_is_sampled_once_an_interval_while_an_engine_lives() -> None:
    asked: list[tuple[m.Placement, int | None]] = []

    def factory(placement: m.Placement, pid: int | None) -> Callable[[], list[tuple[Any, ...]]]:
        asked.append((placement, pid))
        return lambda: [(0, 50.0, 10, 100.0, 40.0, 5.0, 1.0, 77)]

    bench = Bench(telemetry_factory=factory, telemetry_interval_s=1.0)
    bench.ready()
    assert asked == [(m.Placement(note="CPU"), 4711)]
    for _ in range(10):
        bench.pass_(0.25)
    rows = bench.worker.metrics.telemetry.rows()
    assert len(rows) == 3
    assert rows["rss_bytes"].tolist() == [77] * 3
    assert rows["session"].tolist() == [4] * 3
    bench.engine.die()
    bench.step()
    bench.pass_(0.4)
    count = len(bench.worker.metrics.telemetry.rows())
    bench.pass_(0.05)
    assert len(bench.worker.metrics.telemetry.rows()) == count


# ---------------------------------------------------------------- intervals


def counters_of(messages: list[Any]) -> list[m.Counters]:
    return [message for message in messages if isinstance(message, m.Counters)]


def test_once_an_interval_rank_0_is_told_all_counters_and_the_new_telemetry() -> None:
    bench = Bench(
        telemetry_factory=lambda placement, pid: lambda: [(0, 50.0, 10, 100.0, 40.0, 5.0, 1.0, 77)],
        telemetry_interval_s=1.0, metrics_interval_s=3.0,
    ).ready()  # fmt: skip
    stats = Stats(
        interval_s=1.0, steps=5, prompt_tokens=0, output_tokens=9, busy_s=1.0, slot_s=1.5, decode_s=0.0, sample_s=0.0,
        itl_buckets=[7, 9], itl_counts=[2, 1],
    )  # fmt: skip
    bench.engine.say(stats)
    told = counters_of([message for _ in range(10) for message in bench.pass_(0.75)])
    assert len(told) == 2
    samples = [np.frombuffer(message.telemetry, TELEMETRY) for message in told]
    assert len(np.unique(np.concatenate(samples)["t_s"])) == sum(map(len, samples)) > 4, "each sample is told once"
    assert len(bench.worker.metrics.telemetry) < 3, "and forgotten then"
    for message in told:
        [row] = np.frombuffer(message.row, RANK)
        assert (row["rank"], row["session"], row["steps"]) == (RANK_NUMBER, 4, 5), "sums since the session's start"
        assert (message.itl_buckets, message.itl_counts) == ([7, 9], [2, 1])


def test_telemetry_is_told_earlier_where_much_of_it_has_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gauges.TELEMETRY_ROWS_MAX", 5)
    bench = Bench(
        telemetry_factory=lambda placement, pid: lambda: [(gpu, 50.0, 1, 1.0, 1.0, 1.0, 1.0, 1) for gpu in range(2)],
        telemetry_interval_s=1.0, metrics_interval_s=1e6,
    ).ready()  # fmt: skip
    told = counters_of([message for _ in range(9) for message in bench.pass_(1.0)])
    assert [len(np.frombuffer(message.telemetry, TELEMETRY)) for message in told] == [6, 6, 6]


def test_nothing_is_told_before_the_engine_is_ready() -> None:
    bench = Bench(metrics_interval_s=1.0)
    bench.hear(m.Welcome(placement=m.Placement(note="CPU"), run_seed=SEED, session=4))
    assert not counters_of([message for _ in range(5) for message in bench.pass_(1.0)])


@pytest.mark.parametrize("message", [m.Collect(1, 0.5), m.Stop("drained", 0.5)])
def test_the_engine_has_as_long_to_end_as_rank_0_says(message: m.FromCoordinator) -> None:
    bench = Bench()
    bench.rank0.say(m.Welcome(placement=m.Placement(), run_seed=SEED, session=0), message)
    bench.worker.step()
    bench.worker.close()
    assert bench.engines[0].close_s == 0.5
