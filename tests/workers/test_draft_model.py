from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ModelFileError
from tests.workers.engine_fakes import FakeDecoder, job
from tests.workers.test_speculation import run_checked
from tests.workers.test_stepper import Rig, only
from workers.draft_model import DraftModel, check_same_tokenizer
from workers.drafting import NOTHING, Drafting
from workers.shape import Shape
from workers.slots import SlotArrays


class Tokenizer:
    def __init__(self, *texts: str, bos: int = 0, eos: int = 1) -> None:
        self.vocab_tokens = len(texts)
        self.bos, self.eos = bos, eos
        self._texts = texts

    def token_text(self, token: int) -> str:
        return self._texts[token]


def drafting_with(decoder: FakeDecoder, sequences: int = 4) -> DraftModel:
    return DraftModel(decoder, sequences, decoder.ctx_tokens, clock=lambda: 0.0)


def slots_with(*prompts: tuple[int, ...], count: int = 6) -> SlotArrays:
    slots = SlotArrays(count, 100)
    for prompt in prompts:
        slots.take(np.array(prompt, np.int32), 50)
    return slots


def draft(model: DraftModel, slots: SlotArrays, *lengths: int) -> list[list[int]]:
    places = np.flatnonzero(slots.used)
    assert model.offers(slots, places) == [0] * places.size
    return [tokens.tolist() for tokens in model.draft(slots, places, list(lengths))]


def put(slots: SlotArrays, slot: int, *tokens: int) -> None:
    for token in tokens:
        slots.put(np.array([slot]), np.array([token], np.int32), 0.0)


def test_it_drafts_what_the_model_says_next_as_much_as_is_asked_for() -> None:
    model = drafting_with(FakeDecoder())
    slots = slots_with((5, 6), (9,), (20, 3))
    assert draft(model, slots, 3, 0, 2) == [[7, 8, 9], [], [4, 5]]


def test_only_what_is_new_is_read_and_what_was_wrong_is_taken_back() -> None:
    decoder = FakeDecoder()
    model = drafting_with(decoder)
    slots = slots_with((1, 2, 3, 4))
    draft(model, slots, 3)
    assert decoder.cells[0] == [1, 2, 3, 4, 5, 6]
    put(slots, 0, 5, 9)
    decoder.batches.clear()
    assert draft(model, slots, 2) == [[10, 11]]
    assert [len(batch) for batch in decoder.batches] == [1, 1]
    assert decoder.cells[0] == [1, 2, 3, 4, 5, 9, 10]
    put(slots, 0, 10, 11, 12)
    decoder.batches.clear()
    draft(model, slots, 1)
    assert [len(batch) for batch in decoder.batches] == [2]


def test_another_request_in_a_slot_is_read_from_where_it_differs() -> None:
    decoder = FakeDecoder()
    model = drafting_with(decoder)
    slots = slots_with((1, 2, 3, 4))
    draft(model, slots, 1)
    slots.release(0)
    slots.take(np.array([1, 2, 40], np.int32), 50)
    assert draft(model, slots, 2) == [[41, 42]]
    assert decoder.cells[0] == [1, 2, 40, 41]


def test_long_prompts_are_read_in_batches() -> None:
    decoder = FakeDecoder(batch_tokens=8)
    model = drafting_with(decoder)
    slots = slots_with((1,) * 13, (2,) * 20, (3,))
    assert draft(model, slots, 2, 1, 2) == [[2, 3], [3], [4, 5]]
    assert [len(batch) for batch in decoder.batches] == [8, 8, 8, 8, 2, 2]


def test_slots_beyond_its_sequences_are_given_those_of_others() -> None:
    decoder = FakeDecoder()
    model = drafting_with(decoder, sequences=2)
    slots = slots_with((1,), (2,), (3,))
    assert model.offers(slots, np.arange(3)) == [NOTHING] * 3
    slots.release(0)
    assert draft(model, slots, 1, 1) == [[3], [4]]
    slots.release(1)
    slots.move(2, 1)
    assert draft(model, slots, 2) == [[4, 5]]


@pytest.mark.parametrize("trouble", ["code", "damage"])
def test_a_model_that_fails_drafts_no_more_and_says_so_once(trouble: str, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = FakeDecoder()
    model = drafting_with(decoder)
    slots = slots_with((1,))
    if trouble == "code":
        decoder.codes = [0, 1]
    else:
        decoder.damage = {0}
    (found,) = model.draft(slots, np.array([0]), [3])
    assert found.tolist() in ([], [2])
    assert model.offers(slots, np.array([0])) == [NOTHING]
    assert capfd.readouterr().err.count("draft model is not used any more") == 1


@given(
    work=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    shape=st.sampled_from([Shape(), Shape(steady=True, moves=True), Shape(keeps=True, copy_tokens=2)]),
    batch_tokens=st.sampled_from([5, 64]),
    always=st.booleans(),
)
def test_requests_come_and_go_and_the_answers_stay(
    work: list[tuple[int, int, int]], slots: int, shape: Shape, batch_tokens: int, always: bool
) -> None:
    jobs = [job(key, (first,) * length, max_tokens=output) for key, (length, output, first) in enumerate(work)]
    model = DraftModel(FakeDecoder(batch_tokens), slots, 100)
    plain, drafting = (
        Rig(slots=slots, shape=shape),
        Rig(slots=slots, shape=shape, drafting=Drafting(model, always=always)),
    )
    plain.submit(*jobs)
    drafting.submit(*jobs)
    expected, got = plain.run(), run_checked(drafting)
    assert {key: only(answer) for key, answer in got.items()} == {key: only(answer) for key, answer in expected.items()}


def test_a_model_that_says_the_same_is_always_right() -> None:
    rig = Rig(slots=1, drafting=Drafting(DraftModel(FakeDecoder(), 1, 100, clock=lambda: 0.0)))
    rig.submit(job(1, (0,), max_tokens=60))
    rig.meter.wake(0.0)
    rig.run()
    rig.meter.sleep(rig.clock())
    (stats,) = rig.stats
    assert stats.accepted_tokens == stats.drafted_tokens > 30


def test_the_same_tokenizer_is_accepted() -> None:
    check_same_tokenizer("draft.gguf", Tokenizer("a", "b", "c"), Tokenizer("a", "b", "c"))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Tokenizer("a", "b"), "its vocabulary has 2 tokens, the model's 3"),
        (Tokenizer("a", "b", "C"), "token 2 is 'C' in it, and 'c' in the model"),
        (Tokenizer("a", "b", "c", bos=2), "the token that begins a text is 2 in it, and 0 in the model"),
        (Tokenizer("a", "b", "c", eos=0), "the token that ends a text is 0 in it, and 1 in the model"),
    ],
)
def test_another_tokenizer_is_refused_with_the_difference(other: Tokenizer, why: str) -> None:
    with pytest.raises(ModelFileError, match=r"--draft-model draft\.gguf cannot draft for this model") as caught:
        check_same_tokenizer("draft.gguf", other, Tokenizer("a", "b", "c"))
    assert why in str(caught.value)
