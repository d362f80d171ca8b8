"""Constrained texts in the slots of a stepper, over the decoder that needs no model.

It wants to say a, b, c, d, … after token 31, and where that is forbidden, the last token that is not.
"""

from __future__ import annotations

import pytest

from tests.workers.engine_fakes import EOG, VOCAB, job, piece_of
from tests.workers.grammar_fakes import grammar
from tests.workers.test_speculation import FakeDrafter
from tests.workers.test_stepper import Rig, only
from workers.constraints import Constraints
from workers.drafting import Drafting
from workers.protocol import Answer, Job
from workers.shape import Shape

STEADY = Shape(steady=True, pad_tokens=64, moves=True, patience=1.0)
SHORT_THEN_X = grammar('root ::= [a-c]+ "x"')
LETTERS = grammar("root ::= [a-c]+")
SURE = grammar('root ::= "cab"')


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(VOCAB, lambda token: b"" if token == EOG else piece_of(token), [EOG], 1)


def run(constraints: Constraints, *jobs: Job, **options: object) -> dict[int, Answer]:
    rig = Rig(constraints=constraints, **options)  # type: ignore[arg-type]
    rig.submit(*jobs)
    answers = rig.run()
    assert rig.backlog.running == 0
    return answers


@pytest.mark.parametrize("shape", [Shape(), STEADY])
def test_a_text_follows_its_grammar_and_ends_when_nothing_can_follow(constraints: Constraints, shape: Shape) -> None:
    answer = run(constraints, job(1, (31,), max_tokens=20, constraint=SHORT_THEN_X), shape=shape)[1]
    assert only(answer) == ("abcx", "stop", 4)


def test_a_text_that_may_end_ends_by_the_models_choice(constraints: Constraints) -> None:
    answer = run(constraints, job(1, (31,), max_tokens=20, constraint=LETTERS))[1]
    assert only(answer) == ("abc", "stop", 4)


def test_a_text_is_cut_at_its_limit(constraints: Constraints) -> None:
    answer = run(constraints, job(1, (31,), max_tokens=2, constraint=SHORT_THEN_X))[1]
    assert only(answer) == ("ab", "length", 2)


def test_a_text_that_is_whole_at_its_limit_has_stopped(constraints: Constraints) -> None:
    assert only(run(constraints, job(1, (31,), max_tokens=4, constraint=SHORT_THEN_X))[1]) == ("abcx", "stop", 4)


def test_streaming_and_stop_strings_work_as_ever(constraints: Constraints) -> None:
    rig = Rig(constraints=constraints)
    rig.submit(
        job(1, (31,), max_tokens=20, stream=True, constraint=SHORT_THEN_X),
        job(2, (31,), max_tokens=20, stop=("bc",), constraint=SHORT_THEN_X),
    )
    answers = rig.run()
    assert "".join(rig.streamed(1)) == only(answers[1])[0] == "abcx"
    assert only(answers[2]) == ("a", "stop", 3)


def test_choices_of_a_request_follow_the_grammar_each_for_itself(constraints: Constraints) -> None:
    one = job(1, (31,), n=6, temperature=50.0, seed=3, max_tokens=40, constraint=SHORT_THEN_X)
    texts = [choice.text for choice in run(constraints, one)[1].choices]
    assert len(set(texts)) > 1
    assert all(text[-1] == "x" and set(text[:-1]) <= set("abc") and len(text) > 1 for text in texts)


@pytest.mark.parametrize("shape", [Shape(), STEADY])
@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_neighbours_without_a_grammar_are_not_touched(
    constraints: Constraints, shape: Shape, temperature: float
) -> None:
    free = [
        job(key, (1 + key,) * (1 + key), max_tokens=6, temperature=temperature, top_k=8, seed=key) for key in range(6)
    ]
    held = [
        job(10 + key, (31,) * (1 + key), max_tokens=9, temperature=temperature, seed=key, constraint=one)
        for key, one in enumerate([SHORT_THEN_X, LETTERS, SURE])
    ]
    alone = run(constraints, *free, slots=4, shape=shape)
    mixed = run(constraints, *free[:3], *held, *free[3:], slots=4, shape=shape)
    assert [mixed[key].choices for key in range(6)] == [alone[key].choices for key in range(6)]
    assert only(mixed[12])[0] == "cab"


def test_a_grammar_that_fails_fails_its_request_alone(constraints: Constraints) -> None:
    rig = Rig(constraints=constraints)
    rig.submit(job(1, (31,), max_tokens=9, constraint=SHORT_THEN_X), job(2, (5,), max_tokens=9))
    rig.stepper.step()
    seat = rig.stepper._seats[0]
    assert seat is not None
    assert seat.matcher is not None
    seat.matcher.fail("it is broken")
    answers = rig.run()
    assert answers[1].error == "the grammar: it is broken"
    assert answers[2].error is None
    assert only(answers[2])[2] == 9
    # Nobody had to start again.
    assert sum(batch.count(1) for batch in rig.decoder.batches) == 9


def test_damaged_logits_are_told_from_a_grammar_that_fails(constraints: Constraints) -> None:
    rig = Rig(constraints=constraints)
    rig.submit(job(1, (31,), max_tokens=9, constraint=grammar("root ::= .{5,}")))
    rig.stepper.step()
    rig.decoder.damage.add(0)
    assert "NaN" in (rig.run()[1].error or "")


def test_an_end_is_forbidden_before_the_text_is_whole(
    constraints: Constraints,
) -> None:
    # After token 62 the decoder wants to end.
    answer = run(constraints, job(1, (62,), max_tokens=9, constraint=SURE))[1]
    assert only(answer) == ("cab", "stop", 3)


def test_slots_of_many_constrained_requests_are_given_back(constraints: Constraints) -> None:
    jobs = [job(key, (31,), max_tokens=1 + key % 6, constraint=SHORT_THEN_X) for key in range(200)]
    answers = run(constraints, *jobs, slots=3)
    assert sorted(answers) == list(range(200))
    assert {only(answers[key])[1] for key in range(3, 200, 6)} == {"stop"}


@pytest.mark.parametrize("shape", [Shape(), STEADY])
@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_drafts_are_checked_for_neighbours_without_a_grammar_only(
    constraints: Constraints, shape: Shape, temperature: float
) -> None:
    jobs = [
        job(key, (31,), max_tokens=30, temperature=temperature, seed=key, constraint=one)
        for key, one in enumerate([SHORT_THEN_X, None, LETTERS, None])
    ]
    expected = run(constraints, *jobs, slots=4, shape=shape)
    rig = Rig(slots=4, shape=shape, constraints=constraints, drafting=Drafting(FakeDrafter(0.9), always=True))
    rig.submit(*jobs)
    got = rig.run()
    assert {key: answer.choices for key, answer in got.items()} == {
        key: answer.choices for key, answer in expected.items()
    }
    assert max(len(batch) for batch in rig.decoder.batches) > 8
