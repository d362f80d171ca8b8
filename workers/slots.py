"""The slots of one context as numpy arrays, so that a step over all of them is a handful of array operations.

A slot holds one sequence: its prompt and what has been put out so far stand in one row of `tokens`, of which `fed`
have been given to the model. A slot with one token left to feed decodes, a slot with more reads its prompt; nothing
else tells them apart. The slot's number is llama.cpp's sequence id.

Where the model allows it (`Shape.keeps`) a slot that becomes idle keeps its cells: `kept` of them still hold the tokens
of its row, the rest mean nothing. `workers.prefixes` finds prompts that begin with them. A slot may also wait for
another, its donor, that has or reads what its own prompt begins with: it takes part in nothing that reads then.

Only numbers live here. Which of them make a batch is in `workers.passes`, what a slot runs for in
`workers.seating.Seat`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.shape import MOVES_PER_PASS, Shape

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

NARROW_ROWS = 4
"""A decode pass of so many rows takes hardly longer than one of fewer."""
NOBODY = -1


class SlotArrays:
    """State of `count` slots of `ctx_tokens` tokens each."""

    def __init__(self, count: int, ctx_tokens: int, shape: Shape = Shape()) -> None:  # noqa: B008, a frozen value
        self.count = count
        self.shape = shape
        self.ctx_tokens = ctx_tokens
        # Not zeroed: pages that no request reaches cost nothing.
        self.tokens: Ints = np.empty((count, ctx_tokens), np.int32)
        self.used = np.zeros(count, np.bool_)
        self.length = np.zeros(count, np.int64)
        self.fed = np.zeros(count, np.int64)
        """Tokens in the cells of the slot; of an idle slot, those that mean nothing included."""
        self.kept = np.zeros(count, np.int64)
        """Of an idle slot: its first cells that hold the tokens of its row."""
        self.cached = np.zeros(count, np.int64)
        """Tokens of the prompt that were in cells already, and not read."""
        self.donor = np.full(count, NOBODY, np.int64)
        """The slot from which this one waits to be given its first `awaited` tokens."""
        self.awaited = np.zeros(count, np.int64)
        self.asked_tokens = np.zeros(count, np.int64)
        """So many tokens at its beginning have been asked for by another prompt, ..."""
        self.asked = np.zeros(count, np.int64)
        """... last when this many slots had been taken."""
        self.outputs = np.zeros(count, np.int64)
        self.limit = np.zeros(count, np.int64)
        self.order = np.zeros(count, np.int64)
        """When the slot was taken: prompts are read in this order."""
        self.last_s = np.zeros(count, np.float64)
        self.plain = np.ones(count, np.bool_)
        """The next token is the largest logit; no Python code is needed to choose it."""
        self.listable = np.zeros(count, np.bool_)
        """A shortlist of the likeliest tokens may do (`workers.shortlist`)."""
        self.whole_at = np.zeros(count, np.float64)
        """The temperature, if a shortlist may do and no filter is asked for; else 0."""
        self.ignore_eos = np.zeros(count, np.bool_)
        self.watched = np.zeros(count, np.bool_)
        """The text is looked at token by token."""
        self.drafts = np.ones(count, np.bool_)
        """Tokens may be drafted for it (`workers.speculation`)."""
        self.taken = 0
        """How often a slot was taken."""
        self._busy = 0
        self._rows = 0
        """Rows of the decode pass, where it is kept steady."""

    no_places: Places = np.empty(0, np.int64)

    @property
    def free(self) -> int:
        return self.count - self._busy

    @property
    def span(self) -> int:
        """Slots below this one may be taken without making the decode pass wider, where it is kept steady."""
        if not self.shape.steady:
            return self.count
        return max(self._rows, self._width(self._busy + 1), min(self.count, NARROW_ROWS))

    @property
    def held(self) -> Places:
        """(slots,) first cells of each that hold the tokens of its row."""
        return np.where(self.used, self.fed, self.kept)

    @property
    def decoding(self) -> int:
        """Slots that have put out something."""
        return int(np.count_nonzero(self.used & (self.outputs > 0)))

    def to_read(self, short_tokens: int) -> tuple[int, int]:
        """How many prompts are being read, and how many tokens are left, without the last one, of those that have up to
        `short_tokens` to read in all."""
        left = self.length - self.fed - 1
        reading = self.used & (left > 0)
        short = reading & (self.length - self.cached <= short_tokens)
        return int(np.count_nonzero(reading)), int(left[short].sum())

    def take(
        self,
        prompt: Ints,
        limit: int,
        *,
        slot: int | None = None,
        keep: int = 0,
        plain: bool = True,
        listable: bool = False,
        whole_at: float = 0.0,
        ignore_eos: bool = False,
        watched: bool = False,
        drafts: bool = True,
    ) -> tuple[int, bool]:
        """Put a prompt into a free slot, by default the smallest, whose first `keep` cells hold its beginning.

        Returns the slot, and whether its cells from there on have to be emptied first.
        """
        if slot is None:
            slot = int(np.flatnonzero(~self.used)[0])
        stale = bool(self.fed[slot] > keep)
        self.taken += 1
        self._busy += 1
        self.tokens[slot, keep : prompt.size] = prompt[keep:]
        self.used[slot] = True
        self.length[slot] = prompt.size
        self.fed[slot] = self.cached[slot] = keep
        self.outputs[slot] = 0
        self.limit[slot] = limit
        self.order[slot] = self.taken
        self.plain[slot] = plain
        self.listable[slot] = listable
        self.whole_at[slot] = whole_at
        self.ignore_eos[slot] = ignore_eos
        self.watched[slot] = watched
        self.drafts[slot] = drafts
        return slot, stale

    def release(self, slot: int) -> None:
        """The slot is idle. Unless idle slots keep them, its cells must be emptied."""
        if not self.shape.keeps:
            self.fed[slot] = 0
        self.used[slot] = False
        self.kept[slot] = self.fed[slot]
        self.donor[slot] = NOBODY
        self._busy -= 1

    def give(self, slot: int, tokens: int) -> int:
        """A slot has been given its first `tokens` tokens, which are in its cells now. Returns how many are new."""
        new = tokens - int(self.fed[slot])
        self.cached[slot] += new
        self.fed[slot] = tokens
        self.donor[slot] = NOBODY
        return new

    def forget_all(self) -> None:
        """All cells are empty: everything is fed again, outputs included."""
        for array in (self.fed, self.kept, self.cached):
            array[:] = 0

    def output_of(self, slot: int) -> Ints:
        """The tokens put out so far."""
        length = int(self.length[slot])
        return self.tokens[slot, length - int(self.outputs[slot]) : length]

    def put(self, slots: Places, tokens: Ints, now_s: float) -> npt.NDArray[np.float64]:
        """Append one output token to each of `slots`. Returns the gaps to the tokens before, where there are."""
        length, outputs = self.length[slots], self.outputs[slots]
        gaps: npt.NDArray[np.float64] = now_s - self.last_s[slots[outputs > 0]]
        self.tokens[slots, length] = tokens
        self.length[slots] = length + 1
        self.outputs[slots] = outputs + 1
        self.last_s[slots] = now_s
        return gaps

    def put_one(self, slot: int, token: int, now_s: float) -> float:
        """Append one more output token to `slot`. Returns the gap to the token before."""
        length: int = self.length.item(slot)
        self.tokens[slot, length] = token
        self.length[slot] = length + 1
        self.outputs[slot] += 1
        gap_s: float = now_s - self.last_s.item(slot)
        self.last_s[slot] = now_s
        return gap_s

    # ------------------------------------------------ neighbours

    def moves_for(self, newcomers: int) -> list[tuple[int, int]]:
        """Moves (from, to) after which the next `newcomers` prompts are neighbours; none if that does not pay."""
        if not self.shape.moves or newcomers < 2:
            return []
        free = np.flatnonzero(~self.used)[:newcomers]
        runs = 1 + int(np.count_nonzero(np.diff(free) > 1))
        moves = self._downwards()
        return moves if len(moves) <= MOVES_PER_PASS * (runs - 1) else []

    @property
    def mostly_idle(self) -> bool:
        """Whether the decode pass could be half as wide or less."""
        busy = np.flatnonzero(self.used)
        if not busy.size:
            return self._rows > 0
        needed = busy.size if self.shape.moves else int(busy[-1]) + 1
        return self._width(needed) <= self._rows // 2

    def moves_to_shrink(self) -> list[tuple[int, int]]:
        """Moves (from, to) after which the slots in use are the first ones."""
        return self._downwards() if self.shape.moves else []

    def move(self, source: int, target: int) -> None:
        """Everything of a slot goes to a free one. The cells have to follow."""
        for array in (
            self.length, self.fed, self.cached, self.donor, self.awaited, self.asked_tokens, self.asked, self.outputs,
            self.limit, self.order, self.last_s, self.plain, self.listable, self.whole_at, self.ignore_eos,
            self.watched, self.drafts,
        ):  # fmt: skip
            array[target] = array[source]
        length = int(self.length[source])
        self.tokens[target, :length] = self.tokens[source, :length]
        self.used[target] = True
        self._busy += 1
        self.donor[self.donor == source] = target
        self.release(source)

    def narrow(self) -> None:
        """The decode pass need not be wider than the slots in use."""
        self._rows = 0

    def _downwards(self) -> list[tuple[int, int]]:
        busy = np.flatnonzero(self.used)
        above = busy[busy >= busy.size]
        holes = np.flatnonzero(~self.used[: busy.size])
        return list(zip(above.tolist(), holes.tolist(), strict=True))

    def decode_rows(self) -> Places:
        """The slots that take part in a steady decode pass: all up to a width that seldom changes."""
        self._rows = max(self._rows, self._width(int(np.flatnonzero(self.used)[-1]) + 1))
        return np.arange(self._rows)

    def _width(self, rows: int) -> int:
        """A few widths only: each new one costs a GPU as much as several steps."""
        if rows <= 4:
            return min(rows, self.count)
        return min(self.count, 8 if rows <= 8 else -(-rows // 16) * 16)
