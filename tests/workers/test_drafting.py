from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.drafting import NOTHING, PromptLookup, continuation, longest_match
from workers.slots import SlotArrays


def ints(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def slots_with(*sequences: tuple[int, ...]) -> SlotArrays:
    slots = SlotArrays(len(sequences), 100)
    for tokens in sequences:
        slots.take(ints(*tokens), 50)
    return slots


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((1, 2, 3), (0, 0)),
        ((1,), (0, 0)),
        ((1, 2, 1), (1, 1)),
        ((7, 1, 2, 8, 1, 2), (2, 3)),
        ((5, 1, 2, 8, 6, 1, 2), (2, 3)),
        ((1, 2, 8, 3, 2, 9, 1, 2), (2, 2)),  # longer before more recent
        ((3, 1, 2, 8, 3, 1, 2, 9, 3, 1, 2), (3, 7)),  # of two as long the more recent
        ((4, 4), (1, 1)),
        ((1, 2, 1, 2, 1, 2), (4, 4)),
    ],
)
def test_the_longest_end_that_stands_there_once_more_is_found(
    tokens: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert longest_match(ints(*tokens), 5) == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5))
def test_a_match_is_what_a_search_token_by_token_finds(tokens: list[int], most: int) -> None:
    best = (0, 0)
    for start in range(1, len(tokens)):
        length = 0
        while length < min(most, start) and tokens[start - 1 - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length and length >= best[0]:
            best = (length, start)
    assert longest_match(ints(*tokens), most) == best


def test_a_continuation_that_reaches_the_end_goes_round() -> None:
    assert continuation(ints(9, 1, 2, 3), 1, 8).tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert continuation(ints(9, 1, 2, 3), 1, 2).tolist() == [1, 2]


def test_what_followed_is_drafted_for_each_slot_that_has_something() -> None:
    lookup = PromptLookup()
    slots = slots_with((1, 2, 3, 4, 9, 2, 3), (1, 2, 3), (8, 5, 8))
    places = np.arange(3)
    assert lookup.offers(slots, places) == [1, NOTHING, 0]
    drafts = lookup.draft(slots, places, [2, 0, 3])
    assert [draft.tolist() for draft in drafts] == [[4, 9], [], [5, 8, 5]]
    assert lookup.seconds(100) == 0.0
