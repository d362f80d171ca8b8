"""Which slot a prompt gets, and how much of it need not be read because it is in cells already.

Three places may hold the beginning of a prompt:

- A free slot: idle slots keep their cells. The slot is taken as it is, and what follows the common part is emptied.
- Another slot of the same context, whose whole stream is copied. That takes as long as reading `Shape.copy_tokens`
  tokens, so less is not copied.
- A slot that has not read it yet. Then this one waits for it (`SlotArrays.donor`) and is given it by a copy. Donors
  were taken earlier than those that wait for them, so nobody waits in a circle; if one ends before, they look again.

The last token of a prompt is always read: its logits are needed.

Of free slots the one that has most in common with the prompt is given away, the smallest of equals, because slots in
use should be neighbours. But what has been asked for by a second prompt, a system prompt say, is kept while there is
anything else to give away, or another copy of it. And while no slot is in use the first few take turns, unless more
than half of the prompt is there: requests that come one by one find what one before the last had in common with them.

All slots are looked at together. A prompt that begins like none of them costs a comparison of one token each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.slots import NARROW_ROWS, NOBODY, Ints, Places, SlotArrays

COMMON_TOKENS_MIN = 16
"""A shorter beginning is not looked for: nothing is saved by it, and all prompts of one template have it."""
BLOCK_TOKENS = 64
"""So many are compared first, then twice as many each time."""
COPIES_SOUGHT = 8
"""Of so many slots another copy is looked for before one that has been asked for is given away."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt goes. The slot's first `keep` cells hold its beginning; `donor` has, or reads, `shared` tokens."""

    slot: int
    keep: int = 0
    donor: int = NOBODY
    shared: int = 0


class Prefixes:
    """Looks for prompts in the slots of one context."""

    def __init__(self, slots: SlotArrays) -> None:
        self._slots = slots

    def place(self, prompt: Ints) -> Place:
        """A free slot for `prompt`; there must be one."""
        slots = self._slots
        free = np.flatnonzero(~slots.used[: slots.span])
        if not slots.shape.keeps:
            return Place(int(free[0]))
        common = self._common(prompt, prompt.size - 1)
        slot = self._given_away(free, common, prompt.size)
        donor, shared = self._donor(common, int(common[slot]))
        return Place(slot, int(common[slot]), donor, shared)

    def taken(self, place: Place) -> None:
        """Its slot has been taken. What the prompt has in common with others has been asked for now."""
        slots = self._slots
        slot, donor, tokens = place.slot, place.donor, max(place.keep, place.shared)
        slots.asked_tokens[slot], slots.asked[slot] = tokens, slots.taken
        slots.donor[slot], slots.awaited[slot] = donor, place.shared
        if donor != NOBODY:
            slots.asked_tokens[donor] = max(int(slots.asked_tokens[donor]), tokens)
            slots.asked[donor] = slots.taken

    def settled(self) -> list[int]:
        """Slots that wait no longer: their donors have what they wait for. Those whose donors have ended look again."""
        slots = self._slots
        waiting = (slots.donor != NOBODY).nonzero()[0]
        if not waiting.size:
            return []
        there = slots.held[slots.donor[waiting]] >= slots.awaited[waiting]
        orphans = waiting[~there & ~slots.used[slots.donor[waiting]]]
        for slot in orphans[np.argsort(slots.order[orphans])].tolist():
            self._look_again(slot)
        waiting = np.flatnonzero(slots.donor != NOBODY)
        there = slots.held[slots.donor[waiting]] >= slots.awaited[waiting]
        late = slots.awaited[waiting] - slots.fed[waiting] < slots.shape.copy_tokens
        slots.donor[waiting[late]] = NOBODY
        settled: list[int] = waiting[there & ~late].tolist()
        return settled

    def _look_again(self, slot: int) -> None:
        slots = self._slots
        length = int(slots.length[slot])
        common = self._common(slots.tokens[slot, :length], length - 1)
        common[slots.used & (slots.order >= slots.order[slot])] = 0
        slots.donor[slot], slots.awaited[slot] = self._donor(common, int(slots.fed[slot]))

    # ------------------------------------------------ what slots have in common with a prompt

    def _common(self, prompt: Ints, most: int) -> Places:
        """(slots,) how many tokens at their beginning are the prompt's, up to `most`; 0 for less than is looked for.

        Of a slot in use its tokens count, whether they are in cells or will be.
        """
        slots = self._slots
        found = np.zeros(slots.count, np.int64)
        if most < COMMON_TOKENS_MIN:
            return found
        room = np.minimum(np.where(slots.used, slots.length, slots.kept), most)
        probe = COMMON_TOKENS_MIN - 1
        rows = np.flatnonzero((slots.tokens[:, probe] == prompt[probe]) & (room > probe))
        place, size = 0, BLOCK_TOKENS
        while rows.size:
            end = min(place + size, int(room[rows].max()))
            same = slots.tokens[rows, place:end] == prompt[place:end]
            whole = same.all(axis=1)
            found[rows] = place + np.where(whole, end - place, same.argmin(axis=1))
            rows = rows[whole & (room[rows] > end)]
            place, size = end, 2 * size
        np.minimum(found, room, out=found)
        found[found < COMMON_TOKENS_MIN] = 0
        return found

    def _donor(self, common: Places, keep: int) -> tuple[int, int]:
        """The slot to copy from and how many tokens, where that is worth more than a copy costs to a slot that has
        `keep` of them; else nobody."""
        slots = self._slots
        held = slots.held
        now = np.minimum(common, held)
        most = int(now.max())
        if int(common.max()) - most >= slots.shape.copy_tokens:
            now, most = common, int(common.max())
        if most - keep < slots.shape.copy_tokens:
            return NOBODY, 0
        equals = np.flatnonzero(now == most)
        # The one that is furthest; where none has begun, the one that is read first.
        best = np.lexsort((slots.order[equals], -held[equals]))[0]
        return int(equals[best]), most

    # ------------------------------------------------ what is given away

    def _given_away(self, free: Places, common: Places, prompt_tokens: int) -> int:
        """The one of the `free` slots to put a prompt into that has `common` with them."""
        slots = self._slots
        worth = np.minimum(slots.asked_tokens[free], slots.kept[free])
        harmless = free[worth - common[free] < slots.shape.copy_tokens]
        if not harmless.size:
            by_age: list[int] = free[np.argsort(slots.asked[free], kind="stable")].tolist()
            return next((slot for slot in by_age[:COPIES_SOUGHT] if self._is_elsewhere(slot)), by_age[0])
        best = int(harmless[common[harmless].argmax()])
        if slots.free < slots.count or 2 * common[best] > prompt_tokens:
            return best
        few = harmless[:NARROW_ROWS]
        return int(few[np.where(slots.kept[few] > 0, slots.order[few], 0).argmin()])

    def _is_elsewhere(self, slot: int) -> bool:
        """Whether what has been asked for of this slot is in another one, or will be."""
        slots = self._slots
        tokens = int(min(slots.asked_tokens[slot], slots.kept[slot]))
        common = self._common(slots.tokens[slot], tokens)
        common[slot] = 0
        return bool(common.max() >= tokens)
