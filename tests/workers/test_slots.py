from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.slots import SlotArrays


def prompt(length: int, first: int = 0) -> np.typing.NDArray[np.int32]:
    return np.arange(first, first + length, dtype=np.int32)


def test_the_smallest_free_slot_is_taken() -> None:
    slots = SlotArrays(4, 16)
    assert [slots.take(prompt(2), 1) for _ in range(3)] == [0, 1, 2]
    slots.release(1)
    slots.release(0)
    assert slots.take(prompt(2), 1) == 0


def test_nothing_in_use_gives_no_batch() -> None:
    assert SlotArrays(2, 8).fill(16) is None


def test_a_prompt_is_fed_in_pieces_and_wants_its_last_row_only() -> None:
    slots = SlotArrays(1, 16)
    slots.take(prompt(5, 10), 4)
    first, second = slots.fill(3), slots.fill(3)
    assert first is not None
    assert second is not None
    assert (first.token.tolist(), first.pos.tolist()) == ([10, 11, 12], [0, 1, 2])
    assert not first.wanted.any()
    assert first.output_slots.size == 0
    assert (second.token.tolist(), second.pos.tolist()) == ([13, 14], [3, 4])
    assert second.wanted.tolist() == [False, True]
    assert second.output_slots.tolist() == [0]


def test_decoding_goes_on_beside_prompts_which_share_what_is_left() -> None:
    slots = SlotArrays(3, 16)
    slots.take(prompt(2), 4)
    slots.fill(8)
    slots.put(np.array([0]), np.array([7], np.int32), 1.0)
    slots.take(prompt(4, 20), 4)
    slots.take(prompt(4, 30), 4)
    rows = slots.fill(6)
    assert rows is not None
    assert rows.seq.tolist() == [0, 1, 1, 1, 1, 2]
    assert rows.token.tolist() == [7, 20, 21, 22, 23, 30]
    assert rows.pos.tolist() == [2, 0, 1, 2, 3, 0]
    assert rows.output_slots.tolist() == [0, 1]
    assert rows.prompt_tokens == 5


def test_prompts_are_read_in_order_of_arrival_not_of_slots() -> None:
    slots = SlotArrays(2, 16)
    slots.take(prompt(2), 4)
    slots.take(prompt(6, 10), 4)
    slots.release(0)
    slots.take(prompt(6, 20), 4)
    rows = slots.fill(4)
    assert rows is not None
    assert rows.seq.tolist() == [1, 1, 1, 1]


def test_gaps_are_between_tokens_of_a_sequence() -> None:
    slots = SlotArrays(2, 16)
    slots.take(prompt(1), 4)
    slots.take(prompt(1), 4)
    both = np.array([0, 1])
    assert slots.put(both[:1], np.array([5], np.int32), 1.0).size == 0
    assert slots.put(both, np.array([6, 8], np.int32), 1.5).tolist() == [0.5]
    assert slots.output_of(0).tolist() == [5, 6]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=30), st.integers(4, 12))
def test_every_sequence_is_fed_once_in_order_in_sorted_batches(work: list[tuple[int, int]], batch: int) -> None:
    slots = SlotArrays(4, 32)
    waiting = list(enumerate(work))
    running: dict[int, int] = {}
    fed: dict[int, list[int]] = {}
    while waiting or running:
        while waiting and slots.free:
            number, (length, limit) = waiting.pop(0)
            running[slots.take(prompt(length, number * 100), limit)] = number
            fed[number] = []
        rows = slots.fill(batch)
        assert rows is not None
        assert rows.token.size <= batch
        assert rows.seq.tolist() == sorted(rows.seq.tolist())
        for token, pos, seq in zip(rows.token.tolist(), rows.pos.tolist(), rows.seq.tolist(), strict=True):
            assert pos == len(fed[running[seq]])
            fed[running[seq]].append(token)
        assert int(rows.wanted.sum()) == rows.output_slots.size
        slots.put(rows.output_slots, (rows.output_slots + 1).astype(np.int32), 0.0)
        for slot in rows.output_slots.tolist():
            if slots.outputs[slot] == slots.limit[slot]:
                slots.release(slot)
                del running[slot]
    assert {number: len(tokens) for number, tokens in fed.items()} == {
        number: length + limit - 1 for number, (length, limit) in enumerate(work)
    }
