from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.engine_fakes import passes
from workers.passes import Pass, decode_pass, mixed_pass, mixes, read_passes, trim_idle
from workers.shape import Shape
from workers.slots import SlotArrays

SHAPED = Shape(steady=True, pad_tokens=10, moves=True)
PLAIN = Shape()
STEADY = Shape(steady=True)


def prompt(length: int, first: int = 0) -> np.typing.NDArray[np.int32]:
    return np.arange(first, first + length, dtype=np.int32)


def with_prompts(*lengths: int, ctx_tokens: int = 64, shape: Shape = STEADY) -> SlotArrays:
    slots = SlotArrays(len(lengths), ctx_tokens, shape)
    for place, length in enumerate(lengths):
        slots.take(prompt(length, 100 * place), 4)
    return slots


def read_all(slots: SlotArrays, batch_tokens: int = 1000) -> list[Pass]:
    return list(read_passes(slots, batch_tokens))


def step(slots: SlotArrays, batch_tokens: int = 1000) -> list[Pass]:
    """The passes of a step, after which token 7 is put out wherever one was wanted."""
    if mixes(slots):
        found = [mixed_pass(slots, batch_tokens, batch_tokens)]
    else:
        found = read_all(slots, batch_tokens)
        trim_idle(slots)
        last = decode_pass(slots)
        found += [] if last is None else [last]
    outputs = found[-1].output_slots
    slots.put(outputs, np.full(outputs.size, 7, np.int32), 0.0)
    return found


def test_the_smallest_free_slot_is_taken() -> None:
    slots = SlotArrays(4, 16)
    assert [slots.take(prompt(2), 1) for _ in range(3)] == [(0, False), (1, False), (2, False)]
    slots.release(1)
    slots.release(0)
    assert slots.take(prompt(2), 1) == (0, False)


def test_a_mixed_prompt_is_fed_in_pieces_and_wants_its_last_row_only() -> None:
    slots = with_prompts(5, shape=PLAIN)
    first, second = mixed_pass(slots, 3, 3), mixed_pass(slots, 3, 3)
    assert (first.token.tolist(), first.pos.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert not first.wanted.any()
    assert first.output_slots.size == 0
    assert (second.token.tolist(), second.pos.tolist()) == ([3, 4], [3, 4])
    assert second.wanted.tolist() == [False, True]
    assert second.output_slots.tolist() == [0]


def test_in_a_mixed_pass_prompts_are_read_no_faster_than_asked_for() -> None:
    slots = with_prompts(1, 9, 9, shape=PLAIN)
    mixed_pass(slots, 1, 100)
    slots.put(np.array([0]), np.array([7], np.int32), 0.0)
    assert [mixed_pass(slots, 100, 4).seq.tolist(), mixed_pass(slots, 100, 7).seq.tolist()] == [
        [0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 2, 2],
    ]


def test_in_a_mixed_pass_decoding_goes_on_beside_prompts_which_share_what_is_left() -> None:
    slots = SlotArrays(3, 16)
    slots.take(prompt(2), 4)
    step(slots)
    slots.take(prompt(4, 20), 4)
    slots.take(prompt(4, 30), 4)
    rows = mixed_pass(slots, 6, 6)
    assert rows.seq.tolist() == [0, 1, 1, 1, 1, 2]
    assert rows.token.tolist() == [7, 20, 21, 22, 23, 30]
    assert rows.pos.tolist() == [2, 0, 1, 2, 3, 0]
    assert rows.output_slots.tolist() == [0, 1]
    assert rows.prompt_tokens == 5


@pytest.mark.parametrize("shape", [PLAIN, STEADY], ids=["mixed", "steady"])
def test_prompts_are_read_in_order_of_arrival_not_of_slots(shape: Shape) -> None:
    slots = SlotArrays(2, 16, shape)
    slots.take(prompt(2), 4)
    slots.take(prompt(6, 10), 4)
    slots.release(0)
    slots.take(prompt(6, 20), 4)
    rows = step(slots, 4)[0]
    assert rows.seq.tolist() == [1, 1, 1, 1]


def test_after_a_failure_nothing_overflows_though_all_is_fed_again() -> None:
    slots = with_prompts(9, 9, 9, shape=PLAIN)
    step(slots)
    slots.forget_all()
    fed = [mixed_pass(slots, 8, 8).token.size for _ in range(4)]
    assert fed == [8, 8, 8, 6]
    assert (slots.fed == slots.length).all()


def test_prompts_are_read_in_pieces_up_to_their_last_tokens_which_are_decoded() -> None:
    slots = with_prompts(6, 1)
    (first,) = read_all(slots, 3)
    assert (first.token.tolist(), first.pos.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert not first.wanted.any()
    (second,) = read_all(slots, 3)
    assert (second.token.tolist(), second.pos.tolist()) == ([3, 4], [3, 4])
    assert read_all(slots, 3) == []
    last = decode_pass(slots)
    assert last is not None
    assert (last.token.tolist(), last.pos.tolist(), last.wanted.tolist()) == ([5, 100], [5, 0], [True, True])
    assert last.output_slots.tolist() == [0, 1]
    assert first.prompt_tokens + second.prompt_tokens + last.prompt_tokens == 7


def test_nothing_is_decoded_before_a_prompt_is_complete() -> None:
    slots = with_prompts(6, 6)
    read_all(slots, 3)
    assert decode_pass(slots) is None


def test_a_sequence_that_is_alone_is_fed_in_whole_batches_its_last_token_too() -> None:
    """As llama.cpp's own programs do: one token by itself is computed in another way, with another rounding."""
    slots = with_prompts(8, 1, shape=SHAPED)
    slots.release(1)
    batches = [rows for _ in range(3) for rows in step(slots, 3)]
    assert [rows.token.tolist() for rows in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert batches[-1].wanted.tolist() == [False, True]


def test_a_prompt_that_is_being_read_takes_part_in_the_decode_pass() -> None:
    """Left out it would be a hole, and cut the pass in two."""
    slots = with_prompts(1, 500, 1, ctx_tokens=600)
    decode_pass(slots)
    slots.put(np.array([0, 2]), np.array([7, 8], np.int32), 0.0)
    slots.fed[1] = 0
    (read,) = read_all(slots, 256)
    assert read.seq.tolist() == [1] * 256
    rows = decode_pass(slots)
    assert rows is not None
    assert rows.seq.tolist() == [0, 1, 2]
    assert rows.pos.tolist() == [1, 256, 1]
    assert rows.output_slots.tolist() == rows.output_rows.tolist() == [0, 2]
    assert rows.prompt_tokens == 1


def test_neighbours_with_prompts_of_one_length_are_read_in_one_pass() -> None:
    (rows,) = read_all(with_prompts(9, 9, 9))
    assert passes(rows.seq.tolist()) == 1
    assert rows.prompt_tokens == 24
    assert not rows.trim.size


def test_shorter_prompts_are_padded_and_trimmed_where_that_is_cheaper_than_a_pass() -> None:
    (rows,) = read_all(with_prompts(9, 6, 9, shape=SHAPED))
    assert passes(rows.seq.tolist()) == 1
    assert rows.seq.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert rows.token[8:16].tolist() == [100, 101, 102, 103, 104, 104, 104, 104]
    assert rows.trim.tolist() == [1]
    assert rows.prompt_tokens == 8 + 5 + 8


@pytest.mark.parametrize(
    ("lengths", "shape", "ctx_tokens"),
    [((9, 6, 9), STEADY, 64), ((30, 6, 30), SHAPED, 64), ((7, 7), SHAPED, 8)],
    ids=["it does not pay", "too much padding", "no room for it"],
)
def test_otherwise_what_is_longer_is_read_in_passes_of_its_own(
    lengths: tuple[int, ...], shape: Shape, ctx_tokens: int
) -> None:
    slots = with_prompts(*lengths, ctx_tokens=ctx_tokens, shape=shape)
    slots.fed[0] = 0 if ctx_tokens == 64 else 3
    found = read_all(slots)
    assert len(found) > 1
    assert all(passes(rows.seq.tolist()) == 1 and not rows.trim.size for rows in found)
    assert (slots.length - slots.fed).tolist() == [1] * len(lengths)


def test_a_steady_decode_pass_has_no_holes_and_seldom_another_width() -> None:
    slots = with_prompts(*[1] * 20, ctx_tokens=8, shape=SHAPED)
    widths = set()
    for slot in (3, 19, 7, 0, 12):
        rows = step(slots)[-1]
        assert rows.seq.tolist() == list(range(20))
        assert rows.wanted.all()
        widths.add(rows.token.size)
        assert rows.output_slots.tolist() == np.flatnonzero(slots.used).tolist()
        assert rows.output_rows.tolist() == rows.output_slots.tolist()
        slots.release(slot)
    assert widths == {20}


def test_idle_slots_are_emptied_before_they_are_full_and_when_they_are_taken() -> None:
    slots = with_prompts(1, 1, ctx_tokens=4, shape=SHAPED)
    slots.release(0)
    for _ in range(3):
        slots.put(np.array([1]), np.array([7], np.int32), 0.0)
        slots.fed[1], slots.length[1] = 1, 2
        assert not trim_idle(slots).size
        decode_pass(slots)
    slots.fed[1] = 1
    decode_pass(slots)
    assert trim_idle(slots).tolist() == [0]
    slots.fed[1] = 1
    decode_pass(slots)
    assert slots.take(prompt(2), 1) == (0, True)


def test_idle_slots_never_hold_more_than_others_attend_to_anyway() -> None:
    slots = with_prompts(1, 1, 1, ctx_tokens=2000, shape=SHAPED)
    slots.release(1)
    slots.fed[:] = (255, 256, 0)
    assert trim_idle(slots).tolist() == [1]
    slots.fed[:] = (256, 256, 0)
    assert trim_idle(slots).tolist() == []


def test_newcomers_become_neighbours_where_moving_is_cheaper_than_passes() -> None:
    slots = with_prompts(*[1] * 8, shape=SHAPED)
    for slot in (1, 3, 5):
        slots.release(slot)
    moves = slots.moves_for(3)
    assert [target for _, target in moves] == [1, 3]
    for source, target in moves:
        slots.move(source, target)
    assert np.flatnonzero(slots.used).tolist() == [0, 1, 2, 3, 4]
    assert [slots.take(prompt(5), 1)[0] for _ in range(3)] == [5, 6, 7]
    assert len(read_all(slots)) == 1


def test_nothing_is_moved_for_one_newcomer_nor_where_it_does_not_pay() -> None:
    slots = with_prompts(*[1] * 8, shape=SHAPED)
    slots.release(1)
    slots.release(2)
    assert slots.moves_for(2) == []
    slots.release(5)
    assert slots.moves_for(1) == []
    plain = with_prompts(*[1] * 8, shape=PLAIN)
    plain.release(1)
    plain.release(3)
    assert plain.moves_for(2) == []


def test_a_pass_that_is_mostly_idle_becomes_narrow() -> None:
    slots = with_prompts(*[1] * 64, shape=SHAPED)
    step(slots)
    for slot in range(61):
        slots.release(slot)
    assert slots.mostly_idle
    assert slots.moves_to_shrink() == [(61, 0), (62, 1), (63, 2)]
    for source, target in slots.moves_to_shrink():
        slots.move(source, target)
    slots.narrow()
    assert step(slots)[-1].seq.tolist() == [0, 1, 2]
    assert not slots.mostly_idle


def test_a_moved_sequence_goes_on_where_it_was() -> None:
    slots = with_prompts(3, 5, 2, shape=SHAPED)
    step(slots)
    slots.release(0)
    slots.move(2, 0)
    assert slots.output_of(0).tolist() == [7]
    (rows,) = step(slots)
    assert (rows.token[0], rows.pos[0]) == (7, 2)


def test_gaps_are_between_tokens_of_a_sequence() -> None:
    slots = SlotArrays(2, 16)
    slots.take(prompt(1), 4)
    slots.take(prompt(1), 4)
    both = np.array([0, 1])
    assert slots.put(both[:1], np.array([5], np.int32), 1.0).size == 0
    assert slots.put(both, np.array([6, 8], np.int32), 1.5).tolist() == [0.5]
    assert slots.output_of(0).tolist() == [5, 6]


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=30),
    st.integers(4, 40),
    st.builds(Shape, steady=st.booleans(), pad_tokens=st.sampled_from([0, 3, 100]), moves=st.booleans()),
)
def test_every_sequence_is_fed_once_and_in_order(work: list[tuple[int, int]], batch: int, shape: Shape) -> None:
    slots = SlotArrays(4, 32, shape)
    waiting = list(enumerate(work))
    running: dict[int, int] = {}
    fed: dict[int, list[int]] = {}

    def check(rows: Pass) -> None:
        assert rows.token.size <= batch
        assert passes(rows.seq.tolist()) == 1 or not shape.steady
        assert rows.pos.max() < 32
        for token, pos, seq in zip(rows.token.tolist(), rows.pos.tolist(), rows.seq.tolist(), strict=True):
            if seq in running and pos < slots.fed[seq]:
                assert pos == len(fed[running[seq]])
                fed[running[seq]].append(token)

    while waiting or running:
        for source, target in slots.moves_for(min(slots.free, len(waiting))) or slots.moves_to_shrink():
            slots.move(source, target)
            running[target] = running.pop(source)
        while waiting and slots.free:
            number, (length, limit) = waiting.pop(0)
            running[slots.take(prompt(length, number * 100), limit)[0]] = number
            fed[number] = []
        if mixes(slots):
            last: Pass | None = mixed_pass(slots, batch, batch)
        else:
            for rows in read_passes(slots, batch):
                check(rows)
            trim_idle(slots)
            last = decode_pass(slots)
        if last is None:
            continue
        check(last)
        slots.put(last.output_slots, (last.output_slots + 1).astype(np.int32), 0.0)
        for slot in last.output_slots.tolist():
            if slots.outputs[slot] == slots.limit[slot]:
                slots.release(slot)
                del running[slot]
    assert {number: len(tokens) for number, tokens in fed.items()} == {
        number: length + limit - 1 for number, (length, limit) in enumerate(work)
    }


def test_what_is_to_be_read_is_counted_and_what_is_short_of_it() -> None:
    slots = SlotArrays(6, 1000)
    for tokens in (1, 100, 300, 500):
        slots.take(np.zeros(tokens, np.int32), 5)
    slots.take(np.zeros(600, np.int32), 5, keep=500)
    assert slots.to_read(256) == (4, 99 + 99)
    slots.fed[1] = 60
    assert slots.to_read(256) == (4, 39 + 99)
