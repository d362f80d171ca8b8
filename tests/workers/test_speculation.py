"""Steps that check drafts, over the fake decoder: what they put out is what plain steps put out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import EngineError
from tests.workers.engine_fakes import EOG, VOCAB, job, passes
from tests.workers.test_stepper import Rig, only
from workers.drafting import NOTHING, Drafter, Drafting, PromptLookup
from workers.protocol import Answer, Job
from workers.shape import Shape
from workers.slots import Ints, Places, SlotArrays
from workers.speculation import ROWS_MAX, SLOTS_MAX

STEADY = Shape(steady=True, pad_tokens=8, moves=True)
KEEPING = Shape(steady=True, pad_tokens=8, moves=True, keeps=True, copy_tokens=2)


class FakeDrafter:
    """Knows what the fake model says next, and says something else with probability 1 - `right`."""

    odds: tuple[float, ...] = (0.9,)

    def __init__(self, right: float, seed: int = 0, offered: float = 1.0, token_s: float = 0.0) -> None:
        self._right = right
        self._offered = offered
        self._token_s = token_s
        self._random = np.random.default_rng(seed)

    def offers(self, slots: SlotArrays, places: Places) -> list[int]:
        return [0 if self._random.random() < self._offered else NOTHING for _ in places]

    def seconds(self, length: int) -> float:
        return length * self._token_s

    def draft(self, slots: SlotArrays, places: Places, lengths: list[int]) -> list[Ints]:
        drafts = []
        for slot, length in zip(places.tolist(), lengths, strict=True):
            last = int(slots.tokens[slot, slots.length[slot] - 1])
            draft = ((last + 1 + np.arange(length)) % VOCAB).astype(np.int32)
            if slots.ignore_eos[slot]:
                # With its end silenced, the fake model says the token before it for ever.
                draft = np.minimum(last + 1 + np.arange(length), EOG - 1).astype(np.int32)
            wrong = self._random.random(length) >= self._right
            draft[wrong] = self._random.integers(0, VOCAB, np.count_nonzero(wrong))
            drafts.append(draft)
        return drafts


def speculating(
    right: float = 1.0,
    *,
    slots: int = 1,
    ctx_tokens: int = 100,
    shape: Shape = Shape(),  # noqa: B008
) -> Rig:
    return Rig(slots=slots, ctx_tokens=ctx_tokens, shape=shape, drafting=Drafting(FakeDrafter(right)))


def check_cells(rig: Rig) -> None:
    """What is in the cells of slots in use is what was fed of their tokens, and what idle ones keep is theirs."""
    slots = rig.stepper._slots
    for slot in np.flatnonzero(slots.used).tolist():
        fed = slots.tokens[slot, : slots.fed[slot]].tolist()
        assert rig.decoder.cells.get(slot, []) == fed
        assert slots.fed[slot] < slots.length[slot]
    for slot in np.flatnonzero(~slots.used).tolist():
        kept = int(slots.kept[slot])
        assert rig.decoder.cells.get(slot, [])[:kept] == slots.tokens[slot, :kept].tolist()


def run_checked(rig: Rig) -> dict[int, Answer]:
    while rig.stepper.step():
        check_cells(rig)
    return rig.answers()


def outcome(rig: Rig, answer: Answer) -> object:
    streamed = [rig.streamed(answer.key, choice) for choice in range(len(answer.choices))]
    return answer.choices, answer.error, streamed


def some_jobs() -> st.SearchStrategy[list[Job]]:
    # Prompts that count up, so that lookups find what the fake model will say, among others.
    counting = st.builds(
        lambda first, length, again: (*((first + k) % VOCAB for k in range(length)), first + again),
        st.integers(0, 40), st.integers(2, 16), st.integers(0, 4),
    )  # fmt: skip
    any_prompt = st.lists(st.integers(0, 61), min_size=1, max_size=12).map(tuple)
    sampling = st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 40), "ignore_eos": st.booleans()},
        optional={
            "temperature": st.sampled_from([0.5, 2.0, 5.0]),
            "stop": st.sampled_from([("d",), ("xy", "gh"), ("<9>",), ("hijk",)]),
            "repeat_penalty": st.sampled_from([1.5, 3.0]),
            "frequency_penalty": st.sampled_from([1.0]),
            "logit_bias": st.sampled_from([{40: 100.0}, {12: -100.0}]),
            "n": st.sampled_from([2]),
            "top_k": st.sampled_from([3]),
        },
    )
    one = st.tuples(counting | any_prompt, sampling, st.booleans(), st.integers(0, 9))
    return st.lists(one, min_size=1, max_size=8).map(
        lambda found: [
            job(key, prompt, stream=stream, seed=seed, **options)
            for key, (prompt, options, stream, seed) in enumerate(found)
        ]
    )


@given(
    jobs=some_jobs(),
    drafter=st.one_of(
        st.just(PromptLookup()),
        st.builds(FakeDrafter, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 9), st.sampled_from([0.5, 1.0])),
    ),
    slots=st.integers(1, 5),
    shape=st.sampled_from([Shape(), STEADY, Shape(steady=True), Shape(keeps=True), KEEPING]),
    draft_max=st.sampled_from([1, 3, 15]),
    always=st.booleans(),
)
def test_what_is_drafted_changes_no_answer(
    jobs: list[Job], drafter: Drafter, slots: int, shape: Shape, draft_max: int, always: bool
) -> None:
    plain = Rig(slots=slots, ctx_tokens=60, shape=shape)
    drafting = Rig(slots=slots, ctx_tokens=60, shape=shape, drafting=Drafting(drafter, draft_max, always))
    plain.submit(*jobs)
    drafting.submit(*jobs)
    expected, got = plain.run(), run_checked(drafting)
    assert {key: outcome(drafting, one) for key, one in got.items()} == {
        key: outcome(plain, one) for key, one in expected.items()
    }
    assert drafting.backlog.running == 0


@pytest.mark.parametrize("shape", [Shape(), STEADY], ids=["mixed", "steady"])
def test_right_drafts_are_put_out_many_a_step(shape: Shape) -> None:
    rig = speculating(shape=shape, ctx_tokens=200)
    rig.submit(job(1, (0,), max_tokens=120, ignore_eos=True))
    rig.meter.wake(0.0)
    assert only(run_checked(rig)[1])[2] == 120
    rig.meter.sleep(rig.clock())
    (stats,) = rig.stats
    assert stats.steps < 40
    assert max(len(batch) for batch in rig.decoder.batches) == 16
    assert stats.accepted_tokens == stats.drafted_tokens == 120 - stats.steps
    assert (stats.output_tokens, stats.prompt_tokens, sum(stats.itl_counts)) == (120, 1, 119)


def test_tokens_that_come_together_have_no_gap_between_them() -> None:
    rig = speculating(ctx_tokens=200)
    rig.submit(job(1, (0,), max_tokens=60))
    rig.meter.wake(0.0)
    rig.run()
    rig.meter.sleep(rig.clock())
    (stats,) = rig.stats
    assert stats.itl_buckets[0] == 0
    assert stats.itl_counts[0] == stats.accepted_tokens
    assert sum(stats.itl_counts[1:]) == stats.steps - 1


def test_wrong_drafts_are_given_up_and_tried_again_now_and_then() -> None:
    # A pass takes a few milliseconds here: each reading of the clock is one.
    rig = Rig(slots=1, ctx_tokens=3000, drafting=Drafting(FakeDrafter(0.0, token_s=0.001)))
    rig.submit(job(1, (0,), max_tokens=2500, ignore_eos=True))
    rig.run()
    checks = [place for place, batch in enumerate(rig.decoder.batches) if len(batch) > 1]
    assert len(checks) < 250
    assert checks[-1] > 2000


def test_an_accepted_draft_ends_at_the_end_of_generation() -> None:
    rig = speculating()
    rig.submit(job(1, (40,), max_tokens=50))
    text, reason, tokens = only(run_checked(rig)[1])
    assert (reason, tokens) == ("stop", 23)
    assert text.endswith("<61><62>")
    assert len(rig.decoder.batches) < 20


def test_an_accepted_draft_ends_at_the_limit_and_is_no_longer() -> None:
    rig = speculating(ctx_tokens=20)
    rig.submit(job(1, (1, 2, 3), max_tokens=50), job(2, (1, 2, 3), max_tokens=12))
    answers = run_checked(rig)
    assert only(answers[1])[1:] == ("length", 17)
    assert only(answers[2])[1:] == ("length", 12)


def test_a_stop_string_inside_an_accepted_draft_ends_the_text_before_it() -> None:
    rig = speculating()
    rig.submit(job(1, (20,), max_tokens=40, stop=("jk",), stream=True), job(2, (20,), max_tokens=40, stop=("jk",)))
    answers = run_checked(rig)
    assert only(answers[1]) == only(answers[2])
    assert only(answers[1])[0].endswith("<31>abcdefghi")
    assert only(answers[1])[1:] == ("stop", 22)
    assert "".join(rig.streamed(1)) == only(answers[1])[0]
    assert len(rig.decoder.batches) < 40


def test_penalties_count_the_drafted_tokens_before_a_row() -> None:
    jobs = [job(1, (5, 6, 7, 8, 5), max_tokens=60, repeat_penalty=9.0, repeat_last_n=1000, ignore_eos=True)]
    plain, drafting = Rig(slots=1), speculating()
    plain.submit(*jobs)
    drafting.submit(*jobs)
    assert plain.run()[1].choices == run_checked(drafting)[1].choices


@pytest.mark.parametrize("steps", range(2, 14))
def test_a_cancelled_request_is_answered_with_what_there_is(steps: int) -> None:
    rig, plain = speculating(slots=2), Rig()
    plain.submit(job(1, (0,), max_tokens=60, ignore_eos=True))
    rig.submit(job(1, (0,), max_tokens=60, ignore_eos=True))
    for _ in range(steps):
        rig.stepper.step()
    rig.backlog.cancel([1])
    text, reason, tokens = only(run_checked(rig)[1])
    assert reason == "cancelled" or tokens == 60
    assert only(plain.run()[1])[0].startswith(text)
    assert rig.decoder.cells == {}


@pytest.mark.parametrize("shape", [Shape(), STEADY], ids=["mixed", "steady"])
def test_damaged_logits_in_a_check_fail_their_request_alone(shape: Shape) -> None:
    rig = speculating(slots=2, shape=shape)
    rig.submit(*(job(key, (key,), max_tokens=40, ignore_eos=True) for key in (1, 2)))
    for _ in range(5):
        rig.stepper.step()
    put_out = int(rig.stepper._slots.outputs[0])
    rig.decoder.damage = {0}
    answers = run_checked(rig)
    assert f"output token {put_out + 1}" in (answers[1].error or "")
    plain = Rig()
    plain.submit(job(2, (2,), max_tokens=40, ignore_eos=True))
    assert answers[2].choices == plain.run()[2].choices


def test_a_refused_check_fails_its_requests_and_repeated_ones_the_engine() -> None:
    rig = speculating()
    rig.submit(*(job(key, (1,), max_tokens=40) for key in range(3)))
    while not any(len(batch) > 1 for batch in rig.decoder.batches):
        rig.stepper.step()
    rig.decoder.codes = [1]
    answers = run_checked(rig)
    assert answers[0].error == "llama_decode failed with code 1"
    assert [answers[key].error for key in (1, 2)] == [None, None]
    rig.submit(job(3, (1,), max_tokens=40))
    rig.decoder.codes = [0, -2]
    with pytest.raises(EngineError, match="code -2"):
        rig.run()


def test_many_sequences_are_not_speculated_with() -> None:
    rig = speculating(slots=SLOTS_MAX + 1)
    rig.submit(*(job(key, max_tokens=50, ignore_eos=True) for key in range(SLOTS_MAX + 1)))
    rig.run()
    assert max(len(batch) for batch in rig.decoder.batches) == SLOTS_MAX + 1


@pytest.mark.parametrize("shape", [Shape(), STEADY], ids=["mixed", "steady"])
def test_few_sequences_share_the_rows_of_a_pass(shape: Shape) -> None:
    rig = speculating(slots=5, shape=shape, ctx_tokens=200)
    rig.submit(*(job(key, (key,) * (1 + key), max_tokens=100, ignore_eos=True) for key in range(5)))
    run_checked(rig)
    assert 5 * 4 <= max(len(batch) for batch in rig.decoder.batches) <= ROWS_MAX


def test_on_a_steady_shape_drafts_of_different_lengths_are_one_pass() -> None:
    rig = Rig(slots=4, shape=STEADY, ctx_tokens=200, drafting=Drafting(FakeDrafter(0.8, offered=0.7)))
    # The second ends first: its slot lies between others then.
    rig.submit(*(job(key, (key,), max_tokens=20 if key == 1 else 150, ignore_eos=True) for key in range(4)))
    run_checked(rig)
    assert {passes(batch) for batch in rig.decoder.batches} == {1}
    assert any(len(batch) > 8 for batch in rig.decoder.batches)


def test_no_draft_reaches_beyond_the_cells_of_a_steady_pass() -> None:
    rig = Rig(slots=3, shape=STEADY, ctx_tokens=30, drafting=Drafting(FakeDrafter(1.0)))
    rig.submit(*(job(key, (1,) * (2 + 9 * key), max_tokens=25, ignore_eos=True) for key in range(3)))
    # The fake decoder refuses a cell too many.
    answers = run_checked(rig)
    assert [only(answers[key])[2] for key in range(3)] == [25, 19, 10]
