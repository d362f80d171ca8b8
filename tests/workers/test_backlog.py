from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ProtocolError
from tests.workers.engine_fakes import job
from workers.backlog import Backlog
from workers.protocol import Choice
from workers.task import Lane, Task

DONE = Choice("x", "stop", 1)


def filled(count: int, contexts: int = 1, prepared: bool = True, n: int = 1) -> Backlog:
    backlog = Backlog()
    for _ in range(contexts):
        backlog.open(Lane.GENERATE)
    backlog.add(Task(job(key, n=n), 0.0) for key in range(count))
    if prepared:
        for _ in range(count):
            prepare_one(backlog)
    return backlog


def prepare_one(backlog: Backlog, limit: int = 4) -> Task:
    task = backlog.next_raw()
    assert task is not None
    task.limit = limit
    backlog.ready(task)
    return task


def keys(taken: list[tuple[Task, int]]) -> list[int]:
    return [task.key for task, _ in taken]


def test_requests_start_in_order_of_arrival() -> None:
    backlog = filled(5)
    assert keys(backlog.take(0, 3, 1.0)) == [0, 1, 2]
    assert keys(backlog.take(0, 3, 1.0)) == [3, 4]
    assert backlog.running == 5


def with_limits(*limits: int) -> Backlog:
    backlog = filled(len(limits), prepared=False)
    for limit in limits:
        prepare_one(backlog, limit)
    return backlog


def test_those_that_may_run_longest_start_first_and_equals_in_order_of_arrival() -> None:
    backlog = with_limits(10, 1000, 11, 100, 990, 0)
    assert keys(backlog.take(0, 6, 1.0)) == [1, 4, 3, 0, 2, 5]


def test_nobody_is_overtaken_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.backlog.OVERTAKEN_MAX", 3)
    backlog = with_limits(1, *[100] * 3)
    started = []
    for key in range(4, 10):
        backlog.add([Task(job(key), 0.0)])
        prepare_one(backlog, 100)
        started += keys(backlog.take(0, 1, 1.0))
    assert started == [1, 2, 3, 0, 4, 5]


def test_a_long_line_is_no_reason_to_start_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.backlog.OVERTAKEN_MAX", 3)
    backlog = with_limits(*[100] * 8, 1, 1, 100, 100)
    assert keys(backlog.take(0, 12, 1.0)) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 8, 9]


def test_what_was_taken_back_does_not_stay() -> None:
    backlog = with_limits(1)
    line = backlog._line_of[0]
    for key in range(1, 1000):
        backlog.add([Task(job(key), 0.0)])
        prepare_one(backlog, 1)
        assert backlog.recall([key]) == [key]
    assert len(line._by_limit) < 100
    assert len(line._arrived) < 100
    assert keys(backlog.take(0, 5, 1.0)) == [0]


def test_what_has_gone_does_not_stay_behind_one_that_waits_long() -> None:
    backlog = with_limits(1)
    line = backlog._line_of[0]
    for key in range(1, 1000):
        backlog.add([Task(job(key), 0.0)])
        prepare_one(backlog, 100)
        assert keys(backlog.take(0, 1, 1.0)) == [key]
    assert len(line._by_limit) < 100
    assert len(line._arrived) < 100
    assert keys(backlog.take(0, 5, 1.0)) == [0]


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "recall", "cancel"]), st.integers(0, 40)), max_size=60))
def test_every_choice_starts_once_or_is_taken_back(events: list[tuple[str, int]]) -> None:
    backlog = Backlog()
    for _ in range(2):
        backlog.open(Lane.GENERATE)
    added, started, ended = 0, [], set[int]()
    for event, number in events:
        if event == "add":
            backlog.add([Task(job(added, n=1 + number % 3), 0.0)])
            prepare_one(backlog, number)
            added += 1
        elif event == "take":
            started += [(task.key, choice) for task, choice in backlog.take(number % 2, number % 5, 1.0)]
        elif event == "recall":
            ended.update(backlog.recall([number]))
        else:
            ended.update(task.key for task in backlog.cancel([number]))
    for _ in range(200):
        for context in (0, 1):
            started += [(task.key, choice) for task, choice in backlog.take(context, 9, 1.0)]
    assert len(started) == len(set(started))
    assert {key for key, _ in started} | ended == set(range(added))
    assert all(line.choices == 0 for line in backlog._lines.values())


def test_what_has_no_tokens_yet_does_not_start() -> None:
    backlog = filled(3, prepared=False)
    assert backlog.take(0, 3, 1.0) == []
    prepare_one(backlog)
    assert keys(backlog.take(0, 3, 1.0)) == [0]


def test_a_short_line_is_spread_over_the_contexts() -> None:
    backlog = filled(4, contexts=2)
    assert keys(backlog.take(0, 8, 1.0)) == [0, 1]
    assert keys(backlog.take(0, 6, 1.0)) == []
    assert keys(backlog.take(1, 8, 1.0)) == [2, 3]


def test_a_long_line_fills_every_context() -> None:
    backlog = filled(40, contexts=2)
    assert len(backlog.take(0, 8, 1.0)) == 8
    assert len(backlog.take(1, 8, 1.0)) == 8


def test_recall_gives_back_what_has_not_started_and_only_that() -> None:
    backlog = filled(4)
    late = Task(job(9), 0.0)
    backlog.add([late])
    backlog.take(0, 2, 1.0)
    assert backlog.recall([0, 1, 2, 9, 77]) == [2, 9]
    assert keys(backlog.take(0, 9, 1.0)) == [3]
    backlog.add([Task(job(2), 0.0)])


def test_a_request_recalled_while_it_is_prepared_never_starts() -> None:
    backlog = filled(1, prepared=False)
    task = backlog.next_raw()
    assert task is not None
    assert backlog.recall([0]) == [0]
    backlog.ready(task)
    assert backlog.take(0, 1, 1.0) == []
    assert not backlog.end_unstarted(task)


def test_a_request_of_many_choices_counts_as_started_with_its_first() -> None:
    backlog = filled(1, n=3)
    assert [choice for _, choice in backlog.take(0, 2, 1.0)] == [0, 1]
    assert backlog.recall([0]) == []
    assert [choice for _, choice in backlog.take(0, 2, 2.0)] == [2]


def test_a_request_is_answered_with_its_last_choice() -> None:
    backlog = filled(1, n=2)
    (task, _), _ = backlog.take(0, 2, 1.5)
    task.first_token_s = 2.0
    assert not backlog.finish(0, task, 1, DONE)
    assert backlog.finish(0, task, 0, Choice("y", "length", 4))
    answer = task.answer(3.0)
    assert [choice.text for choice in answer.choices] == ["y", "x"]
    assert (answer.output_tokens, answer.queue_s, answer.ttft_s, answer.e2e_s) == (5, 1.5, 2.0, 3.0)
    assert backlog.running == 0


def test_cancel_ends_what_waits_and_marks_what_runs() -> None:
    backlog = filled(3)
    ((running, _),) = backlog.take(0, 1, 1.0)
    ended = backlog.cancel([0, 1, 55])
    assert [task.key for task in ended] == [1]
    assert [choice.finish_reason for choice in ended[0].answer(2.0).choices] == ["cancelled"]
    assert running.cancelled
    assert backlog.cancels == 1
    assert keys(backlog.take(0, 9, 1.0)) == [2]


def test_cancel_withdraws_choices_that_have_not_started() -> None:
    backlog = filled(1, n=3)
    ((task, _),) = backlog.take(0, 1, 1.0)
    assert backlog.cancel([0]) == []
    assert backlog.take(0, 9, 1.0) == []
    assert backlog.finish(0, task, 0, Choice("", "cancelled", 0))
    assert len(task.answer(2.0).choices) == 3


def test_cancel_answers_itself_when_all_started_choices_are_done() -> None:
    backlog = filled(1, n=2)
    ((task, _),) = backlog.take(0, 1, 1.0)
    assert not backlog.finish(0, task, 0, DONE)
    assert backlog.cancel([0]) == [task]
    assert [choice.finish_reason for choice in task.answer(2.0).choices] == ["stop", "cancelled"]


def test_an_error_in_one_choice_fails_the_request() -> None:
    backlog = filled(1, n=3)
    (task, _), _ = backlog.take(0, 2, 1.0)
    assert not backlog.finish(0, task, 0, Choice("", "error", 1), "broken")
    assert task.cancelled
    assert backlog.finish(0, task, 1, Choice("", "cancelled", 1))
    answer = task.answer(2.0)
    assert (answer.error, answer.choices) == ("broken", [])


def test_a_key_that_is_still_here_is_refused() -> None:
    with pytest.raises(ProtocolError, match="submitted again"):
        filled(1).add([Task(job(0), 0.0)])


def test_closing_ends_all_waiting() -> None:
    backlog = Backlog()
    context = backlog.open(Lane.GENERATE)
    backlog.close()
    assert backlog.next_raw() is None
    assert not backlog.wait(context)
