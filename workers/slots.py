"""The slots of one context as numpy arrays, so that a step over all of them is a handful of array operations.

A slot holds one sequence: its prompt and what has been put out so far stand in one row of `tokens`, of which `fed`
have been given to the model. A slot with one token left to feed decodes, a slot with more reads its prompt; nothing
else tells them apart. The slot's number is llama.cpp's sequence id.

llama.cpp computes in one pass only what has consecutive sequence ids and the same number of tokens for each; the rest
of a batch costs a pass of its own, with all weights read again. A processor does nothing at once, so that costs it
little: there a step is one batch (`mixed_pass`) with a token for each slot that decodes and pieces of prompts. A GPU
takes nearly as long for one row as for fifty. There (`Shape.steady`) a step is some passes that read (`read_passes`),
then one that decodes (`decode_pass`), shaped as far as `workers.shape` says that it pays:

- Prompts are read up to their last token, without logits. The decode pass takes that token with everybody else's, so
  that it is one pass, whatever is being read.
- Prompts of neighbours are read together. Shorter ones are padded; the padding is taken back (`Pass.trim`).
- Idle slots take part in the decode pass with a token that means nothing: no hole cuts it in two, and it keeps its
  shape, so that a GPU replays it instead of being told each kernel again.

Where the model allows it (`Shape.keeps`) a slot that becomes idle keeps its cells: `kept` of them still hold the tokens
of its row, the rest mean nothing. `workers.prefixes` finds prompts that begin with them. A slot may also wait for
another, its donor, that has or reads what its own prompt begins with: it takes part in nothing that reads then.

Only numbers live here; what a slot runs for is in `workers.seating.Seat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from workers.shape import MOVES_PER_PASS, Shape

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

CELLS_STEP = 256
"""A pass attends to a multiple of this many cells of each stream: as many as the longest stream in it needs."""
IDLE_ROOM = 32
"""Where what an idle slot keeps is cut, for so many steps nothing need be cut again."""
NARROW_ROWS = 4
"""A decode pass of so many rows takes hardly longer than one of fewer."""
NOBODY = -1


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch: parallel arrays, a row each, sorted by slot, positions ascending within a slot.

    `wanted` marks rows whose logits are needed. Of these, `output_rows` (in their order) belong to `output_slots`
    (ascending); the others keep the shape steady. `slots`: all that are not idle. `prompt_tokens`: how many rows are
    prompts', without padding and what is fed again. `trim`: slots that were padded, whose cells from `fed` on must be
    emptied. `ahead`: for each of `output_rows` how many drafted tokens it follows (`workers.speculation`), which are
    in `tokens` behind those that have been put out; a slot is in `output_slots` for each of its rows then.
    """

    token: Ints
    pos: Ints
    seq: Ints
    wanted: Flags
    slots: Places
    output_slots: Places
    output_rows: Places
    prompt_tokens: int
    trim: Places
    ahead: Places | None = None

    def only(self, some: Flags | Places) -> Pass:
        """The same batch, of whose outputs only `some` matter."""
        ahead = None if self.ahead is None else self.ahead[some]
        return replace(self, output_slots=self.output_slots[some], output_rows=self.output_rows[some], ahead=ahead)


class SlotArrays:
    """State of `count` slots of `ctx_tokens` tokens each."""

    def __init__(self, count: int, ctx_tokens: int, shape: Shape = Shape()) -> None:  # noqa: B008, a frozen value
        self.count = count
        self.shape = shape
        self._ctx_tokens = ctx_tokens
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
            self.limit, self.order, self.last_s, self.plain, self.listable, self.ignore_eos, self.watched, self.drafts,
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

    # ------------------------------------------------ passes

    @property
    def mixes(self) -> bool:
        """Whether the next step is a `mixed_pass`. It is where a sequence is alone, too: there is nobody to share a
        pass with, and the last token of its prompt needs no pass of its own."""
        return not self.shape.steady or self.count - self.free == 1

    def mixed_pass(self, batch_tokens: int, read_tokens: int) -> Pass:
        """A token for each slot that decodes, then prompts in order of arrival while there is room, `read_tokens` of
        them at most. Marks them as fed. At least one slot must be in use."""
        slots = np.flatnonzero(self.used & (self.donor == NOBODY))
        if slots.size == 1 and self.length[slots[0]] - self.fed[slots[0]] == 1:
            return self._lonely_pass(slots)
        counts = self._shares(slots, batch_tokens, read_tokens)
        slots, counts = slots[counts > 0], counts[counts > 0]
        ends = np.cumsum(counts)
        column = np.arange(ends[-1]) + np.repeat(self.fed[slots] - (ends - counts), counts)
        seq = np.repeat(slots, counts)
        reading = self.outputs[slots] == 0
        self.fed[slots] += counts
        complete = self.fed[slots] == self.length[slots]
        wanted = np.zeros(seq.size, np.bool_)
        wanted[ends[complete] - 1] = True
        return Pass(
            token=self.tokens[seq, column],
            pos=column.astype(np.int32),
            seq=seq.astype(np.int32),
            wanted=wanted,
            slots=slots,
            output_slots=slots[complete],
            output_rows=np.arange(np.count_nonzero(complete)),
            prompt_tokens=int(counts[reading].sum()),
            trim=slots[:0],
        )

    def _lonely_pass(self, slots: Places) -> Pass:
        """The next token of the only sequence, whose speed is all that matters then."""
        pos = self.fed[slots]
        self.fed[slots] += 1
        return Pass(
            token=self.tokens[slots, pos],
            pos=pos.astype(np.int32),
            seq=slots.astype(np.int32),
            wanted=np.ones(1, np.bool_),
            slots=slots,
            output_slots=slots,
            output_rows=np.zeros(1, np.int64),
            prompt_tokens=int(self.outputs[slots[0]] == 0),
            trim=slots[:0],
        )

    def _shares(self, slots: Places, batch_tokens: int, read_tokens: int) -> Places:
        """How many tokens each of `slots` feeds in a mixed pass."""
        left = self.length[slots] - self.fed[slots]
        # After a failure those that have put out something are read again, too.
        decoding = left == 1
        alone = int(np.count_nonzero(decoding))
        room = min(batch_tokens - alone, read_tokens)
        if int(left.sum()) - alone <= room:
            return left
        reading = np.flatnonzero(~decoding)
        reading = reading[np.argsort(self.order[slots[reading]])]
        before = np.cumsum(left[reading]) - left[reading]
        shares = np.where(decoding, left, 0)
        shares[reading] = np.clip(room - before, 0, left[reading])
        return shares

    def read_passes(self, batch_tokens: int) -> Iterator[Pass]:
        """The next pieces of prompts, `batch_tokens` in all at most, oldest prompts first, none to its last token.
        Marks them as fed as they are yielded."""
        slots = np.flatnonzero(self.used & (self.length - self.fed > 1) & (self.donor == NOBODY))
        if not slots.size:
            return
        left = self.length[slots] - self.fed[slots] - 1
        if int(left.sum()) > batch_tokens:
            by_age = np.argsort(self.order[slots])
            before = np.cumsum(left[by_age]) - left[by_age]
            left[by_age] = np.clip(batch_tokens - before, 0, left[by_age])
            slots, left = slots[left > 0], left[left > 0]
        for first, last in _runs(slots):
            yield from self._read_run(slots[first:last], left[first:last], batch_tokens)

    def _read_run(self, slots: Places, left: Places, batch_tokens: int) -> Iterator[Pass]:
        """Passes over neighbours, each with the same number of tokens for all that take part in it."""
        longest = int(left.max())
        room = int((self._ctx_tokens - self.fed[slots]).min())
        padded = longest * slots.size
        if longest <= room and padded <= batch_tokens and padded - int(left.sum()) <= self.shape.pad_tokens:
            yield self._read(slots, left, longest)
            return
        tokens = int(left.min())
        yield self._read(slots, np.full(slots.size, tokens), tokens)
        longer = np.flatnonzero(left > tokens)
        for first, last in _runs(slots[longer]):
            places = longer[first:last]
            yield from self._read_run(slots[places], left[places] - tokens, batch_tokens)

    def _read(self, slots: Places, counts: Places, tokens: int) -> Pass:
        """One pass of `tokens` rows for each of `slots`, of which `counts` are the prompts' own."""
        column = self.fed[slots][:, None] + np.arange(tokens)
        # Padding repeats the last token: any would do.
        own = np.minimum(column, (self.fed[slots] + counts - 1)[:, None])
        seq = np.repeat(slots, tokens)
        self.fed[slots] += counts
        return Pass(
            token=self.tokens[seq, own.ravel()],
            pos=column.ravel().astype(np.int32),
            seq=seq.astype(np.int32),
            wanted=np.zeros(seq.size, np.bool_),
            slots=slots,
            output_slots=slots[:0],
            output_rows=slots[:0],
            prompt_tokens=int(counts[self.outputs[slots] == 0].sum()),
            trim=slots[counts < tokens],
        )

    def trim_idle(self) -> Places:
        """Idle slots of the next decode pass whose cells from `fed` on must be emptied, to make room for tokens that
        mean nothing: what all attend to must not become longer by an idle slot."""
        rows = self._decode_rows()
        idle = rows[~self.used[rows]]
        longest = int(self.fed[self.used].max()) + 1
        limit = min(self._ctx_tokens, -(-longest // CELLS_STEP) * CELLS_STEP)
        full = idle[self.fed[idle] >= limit]
        self.kept[full] = np.minimum(self.kept[full], max(0, limit - IDLE_ROOM))
        self.fed[full] = self.kept[full]
        return full

    def decode_pass(self) -> Pass | None:
        """One token for each slot in use and for idle ones between them, marked as fed. None if no slot would put out
        anything by it."""
        complete = self.used & (self.length - self.fed == 1)
        if not complete.any():
            return None
        rows = self._decode_rows()
        used = self.used[rows]
        slots = rows[used]
        pos = self.fed[rows]
        token = np.zeros(rows.size, np.int32)
        token[used] = self.tokens[slots, pos[used]]
        reading = int(np.count_nonzero(self.outputs[slots] == 0))
        self.fed[rows] += 1
        outputs = complete[rows]
        return Pass(
            token=token,
            pos=pos.astype(np.int32),
            seq=rows.astype(np.int32),
            wanted=np.ones(rows.size, np.bool_),
            slots=slots,
            output_slots=rows[outputs],
            output_rows=np.flatnonzero(outputs),
            prompt_tokens=reading,
            trim=slots[:0],
        )

    def _decode_rows(self) -> Places:
        """The slots that take part: all up to a width that seldom changes."""
        self._rows = max(self._rows, self._width(int(np.flatnonzero(self.used)[-1]) + 1))
        return np.arange(self._rows)

    def _width(self, rows: int) -> int:
        """A few widths only: each new one costs a GPU as much as several steps."""
        if rows <= 4:
            return min(rows, self.count)
        return min(self.count, 8 if rows <= 8 else -(-rows // 16) * 16)

    def put(self, slots: Places, tokens: Ints, now_s: float) -> npt.NDArray[np.float64]:
        """Append one output token to each of `slots`. Returns the gaps to the tokens before, where there are."""
        later = slots[self.outputs[slots] > 0]
        gaps: npt.NDArray[np.float64] = now_s - self.last_s[later]
        self.tokens[slots, self.length[slots]] = tokens
        self.length[slots] += 1
        self.outputs[slots] += 1
        self.last_s[slots] = now_s
        return gaps


def _runs(slots: Places) -> list[tuple[int, int]]:
    """Places [first, last) in `slots` (ascending) of numbers that follow each other."""
    edges = [0, *(np.flatnonzero(np.diff(slots) > 1) + 1).tolist(), slots.size]
    return list(pairwise(edges)) if slots.size else []
