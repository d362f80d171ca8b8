"""What a worker does about engines that die or hang, and about requests that run too long."""

from __future__ import annotations

from typing import Any

import pytest

from scheduling import messages as m
from tests.coordinator.fakes import answer, loaded
from tests.workers.worker_bench import Bench, line_of
from workers.care import (
    ANSWERS_A_RESTART,
    LOADING_LEASES,
    OVERSLEPT_S,
    RESTART_BACKOFF_S,
    RESTARTS_MAX,
    SECONDS_A_RESTART,
)
from workers.protocol import Answer, Choice, EngineFailed, Frame, Stats

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
