"""Where drafts come from: guesses at a sequence's next tokens, which the model then checks (`workers.speculation`).

`PromptLookup` needs no model. It takes the longest end of a sequence, up to five tokens, that stands in it once more,
prompt and output being one text, and guesses that what followed there follows again. That is right in what repeats
its input (extraction, corrections, code) and in a text that turns in a circle. The longer the end that was found, the
likelier the guess: a draft's *kind* says how long it was, and `odds` how often a token of that kind was right.

Nothing is kept from step to step: a search over some thousand tokens takes microseconds, and slots may be moved,
released and started again without telling anybody here. A draft model is in `workers.draft_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workers.slots import Ints, Places, SlotArrays

NOTHING = -1
"""The kind of draft of a sequence for which there is none."""


class Drafter(Protocol):
    """What `workers.speculation` needs to know of a source of drafts."""

    odds: tuple[float, ...]
    """For each kind of draft how likely a token of it is right, as long as nothing else is known."""

    def offers(self, slots: SlotArrays, places: Places) -> list[int]:
        """The kind of draft that there would be for each slot of `places`; NOTHING where there is none."""
        ...

    def seconds(self, length: int) -> float:
        """What it takes to draft `length` tokens for each of some slots."""
        ...

    def draft(self, slots: SlotArrays, places: Places, lengths: list[int]) -> list[Ints]:
        """At most `lengths` tokens for each slot of `places`, for which `offers` was asked just before."""
        ...


@dataclass(frozen=True, slots=True)
class Drafting:
    """How one stepper is to draft: at most `most` tokens at once for a sequence. `always`: as many as there are room
    for, without asking whether it pays."""

    drafter: Drafter
    most: int = 15
    always: bool = False


class PromptLookup:
    """Drafts from the sequence itself. A kind is the number of tokens that were found again, less one."""

    odds: tuple[float, ...] = (0.4, 0.7, 0.8, 0.85, 0.9)
    """As measured with SmolLM2-135M-Instruct (docs/decisions/0011-speculation-is-decided-by-measured-times.md)."""

    def __init__(self) -> None:
        self._starts: list[int] = []

    def offers(self, slots: SlotArrays, places: Places) -> list[int]:
        kinds, self._starts = [], []
        for slot, length in zip(places.tolist(), slots.length[places].tolist(), strict=True):
            matched, start = longest_match(slots.tokens[slot, :length], len(self.odds))
            kinds.append(matched - 1)
            self._starts.append(start)
        return kinds

    def seconds(self, length: int) -> float:
        return 0.0

    def draft(self, slots: SlotArrays, places: Places, lengths: list[int]) -> list[Ints]:
        ends = slots.length[places].tolist()
        return [
            continuation(slots.tokens[slot, :end], start, length)
            for slot, end, start, length in zip(places.tolist(), ends, self._starts, lengths, strict=True)
        ]


def longest_match(tokens: Ints, most: int) -> tuple[int, int]:
    """How many of the last tokens, `most` at most, stand in `tokens` once more, and what place comes after the last
    such occurrence; (0, 0) if there is none."""
    last = tokens.size - 1
    found = np.flatnonzero(tokens[:last] == tokens[last])
    if not found.size:
        return 0, 0
    matched = 1
    while matched < most:
        longer = found[found >= matched]
        longer = longer[tokens[longer - matched] == tokens[last - matched]]
        if not longer.size:
            break
        found = longer
        matched += 1
    return matched, int(found[-1]) + 1


def continuation(tokens: Ints, start: int, length: int) -> Ints:
    """`length` tokens from `start` on. Where `tokens` end, it goes on from `start`: a text that repeats itself."""
    return tokens[start + np.arange(length) % (tokens.size - start)]
