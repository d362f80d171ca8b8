from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from scheduling.histogram import bucket_of
from workers.meter import Meter
from workers.protocol import Stats


def step(meter: Meter, now_s: float, *, gaps: tuple[float, ...] = ()) -> None:
    meter.step(
        now_s,
        prompt_tokens=3,
        cached_tokens=4,
        output_tokens=2,
        drafted_tokens=5,
        accepted_tokens=1,
        slot_s=0.5,
        decode_s=0.2,
        sample_s=0.1,
        gaps_s=np.array(gaps, np.float64),
    )


@contextmanager
def other_context() -> Iterator[Callable[..., None]]:
    """Calls a function in another thread: each context has one of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, now_s: pool.submit(function, now_s).result()


def test_counters_go_out_about_once_a_second_and_start_again() -> None:
    sent: list[Stats] = []
    meter = Meter(sent.append, 0.0)
    meter.wake(0.25)
    step(meter, 0.5, gaps=(0.01, 0.01))
    assert sent == []
    step(meter, 1.25, gaps=(0.02,))
    step(meter, 1.5)
    meter.close(1.75)
    first, second = sent
    assert (first.steps, first.prompt_tokens, first.cached_tokens, first.output_tokens) == (2, 6, 8, 4)
    assert (first.interval_s, first.busy_s, first.slot_s) == (1.25, 1.0, 1.0)
    assert (first.drafted_tokens, first.accepted_tokens) == (10, 2)
    assert first.decode_s == pytest.approx(0.4)
    assert first.sample_s == pytest.approx(0.2)
    assert first.itl_buckets == bucket_of(np.array([0.01, 0.02])).tolist()
    assert first.itl_counts == [2, 1]
    assert (second.steps, second.interval_s, second.busy_s, second.itl_counts) == (1, 0.5, 0.5, [])


def test_the_rest_goes_out_when_the_last_context_runs_out_of_work() -> None:
    sent: list[Stats] = []
    meter = Meter(sent.append, 0.0)
    with other_context() as other:
        meter.wake(0.0)
        other(meter.wake, 0.1)
        step(meter, 0.2)
        meter.sleep(0.3)
        assert sent == []
        other(meter.sleep, 0.4)
    assert [(stats.steps, stats.busy_s) for stats in sent] == [(1, 0.4)]


def test_idleness_sends_nothing() -> None:
    sent: list[Stats] = []
    meter = Meter(sent.append, 0.0)
    meter.wake(5.0)
    meter.sleep(6.0)
    meter.close(9.0)
    assert sent == []


def test_a_context_that_has_work_and_makes_no_step_is_told_of_by_the_others() -> None:
    sent: list[Stats] = []
    meter = Meter(sent.append, 0.0)
    with other_context() as other:
        meter.wake(0.0)
        other(meter.wake, 0.5)
        for now_s in (1.0, 2.0, 3.0):
            step(meter, now_s)
        other(lambda now_s: step(meter, now_s), 3.5)
        step(meter, 4.0)
        other(meter.sleep, 4.25)  # it has nothing to do any more
        step(meter, 6.0)
    assert [stats.stalled_s for stats in sent] == [0.5, 1.5, 2.5, 0.5, 0.0]
