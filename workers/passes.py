"""Which rows make a batch: the passes over the model of one step of all slots (`workers.slots`).

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

What a pass feeds is marked as fed when the pass is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from workers.sampling import Flags
from workers.slots import NOBODY, Ints, Places, SlotArrays

CELLS_STEP = 256
"""A pass attends to a multiple of this many cells of each stream: as many as the longest stream in it needs."""
IDLE_ROOM = 32
"""Where what an idle slot keeps is cut, for so many steps nothing need be cut again."""
_ONE_WANTED, _ONE_ROW = np.ones(1, np.bool_), np.zeros(1, np.int64)
"""Of the pass of one row. Nobody writes to them."""


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


def mixes(state: SlotArrays) -> bool:
    """Whether the next step is a `mixed_pass`. It is where a sequence is alone, too: there is nobody to share a
    pass with, and the last token of its prompt needs no pass of its own."""
    return not state.shape.steady or state.count - state.free == 1


def mixed_pass(state: SlotArrays, batch_tokens: int, read_tokens: int) -> Pass:
    """A token for each slot that decodes, then prompts in order of arrival while there is room, `read_tokens` of
    them at most. Marks them as fed. At least one slot must be in use."""
    slots = (state.used & (state.donor == NOBODY)).nonzero()[0]
    if slots.size == 1 and state.length[slots[0]] - state.fed[slots[0]] == 1:
        return _lonely_pass(state, slots)
    counts = _shares(state, slots, batch_tokens, read_tokens)
    slots, counts = slots[counts > 0], counts[counts > 0]
    ends = np.cumsum(counts)
    column = np.arange(ends[-1]) + np.repeat(state.fed[slots] - (ends - counts), counts)
    seq = np.repeat(slots, counts)
    reading = state.outputs[slots] == 0
    state.fed[slots] += counts
    complete = state.fed[slots] == state.length[slots]
    wanted = np.zeros(seq.size, np.bool_)
    wanted[ends[complete] - 1] = True
    return Pass(
        token=state.tokens[seq, column],
        pos=column.astype(np.int32),
        seq=seq.astype(np.int32),
        wanted=wanted,
        slots=slots,
        output_slots=slots[complete],
        output_rows=np.arange(np.count_nonzero(complete)),
        prompt_tokens=int(counts[reading].sum()),
        trim=slots[:0],
    )


def _lonely_pass(state: SlotArrays, slots: Places) -> Pass:
    """The next token of the only sequence, whose speed is all that matters then: a GPU stands still meanwhile."""
    slot = slots.item()
    pos = state.fed.item(slot)
    state.fed[slot] = pos + 1
    return Pass(
        token=state.tokens[slot, pos : pos + 1],
        pos=np.array([pos], np.int32),
        seq=np.array([slot], np.int32),
        wanted=_ONE_WANTED,
        slots=slots,
        output_slots=slots,
        output_rows=_ONE_ROW,
        prompt_tokens=int(not state.outputs.item(slot)),
        trim=state.no_places,
    )


def _shares(state: SlotArrays, slots: Places, batch_tokens: int, read_tokens: int) -> Places:
    """How many tokens each of `slots` feeds in a mixed pass."""
    left = state.length[slots] - state.fed[slots]
    # After a failure those that have put out something are read again, too.
    decoding = left == 1
    alone = int(np.count_nonzero(decoding))
    room = min(batch_tokens - alone, read_tokens)
    if int(left.sum()) - alone <= room:
        return left
    reading = np.flatnonzero(~decoding)
    reading = reading[np.argsort(state.order[slots[reading]])]
    before = np.cumsum(left[reading]) - left[reading]
    shares = np.where(decoding, left, 0)
    shares[reading] = np.clip(room - before, 0, left[reading])
    return shares


def read_passes(state: SlotArrays, batch_tokens: int) -> Iterator[Pass]:
    """The next pieces of prompts, `batch_tokens` in all at most, oldest prompts first, none to its last token.
    Marks them as fed as they are yielded."""
    slots = np.flatnonzero(state.used & (state.length - state.fed > 1) & (state.donor == NOBODY))
    if not slots.size:
        return
    left = state.length[slots] - state.fed[slots] - 1
    if int(left.sum()) > batch_tokens:
        by_age = np.argsort(state.order[slots])
        before = np.cumsum(left[by_age]) - left[by_age]
        left[by_age] = np.clip(batch_tokens - before, 0, left[by_age])
        slots, left = slots[left > 0], left[left > 0]
    for first, last in _runs(slots):
        yield from _read_run(state, slots[first:last], left[first:last], batch_tokens)


def _read_run(state: SlotArrays, slots: Places, left: Places, batch_tokens: int) -> Iterator[Pass]:
    """Passes over neighbours, each with the same number of tokens for all that take part in it."""
    longest = int(left.max())
    room = int((state.ctx_tokens - state.fed[slots]).min())
    padded = longest * slots.size
    if longest <= room and padded <= batch_tokens and padded - int(left.sum()) <= state.shape.pad_tokens:
        yield _read(state, slots, left, longest)
        return
    tokens = int(left.min())
    yield _read(state, slots, np.full(slots.size, tokens), tokens)
    longer = np.flatnonzero(left > tokens)
    for first, last in _runs(slots[longer]):
        places = longer[first:last]
        yield from _read_run(state, slots[places], left[places] - tokens, batch_tokens)


def _read(state: SlotArrays, slots: Places, counts: Places, tokens: int) -> Pass:
    """One pass of `tokens` rows for each of `slots`, of which `counts` are the prompts' own."""
    column = state.fed[slots][:, None] + np.arange(tokens)
    # Padding repeats the last token: any would do.
    own = np.minimum(column, (state.fed[slots] + counts - 1)[:, None])
    seq = np.repeat(slots, tokens)
    state.fed[slots] += counts
    return Pass(
        token=state.tokens[seq, own.ravel()],
        pos=column.ravel().astype(np.int32),
        seq=seq.astype(np.int32),
        wanted=np.zeros(seq.size, np.bool_),
        slots=slots,
        output_slots=slots[:0],
        output_rows=slots[:0],
        prompt_tokens=int(counts[state.outputs[slots] == 0].sum()),
        trim=slots[counts < tokens],
    )


def trim_idle(state: SlotArrays) -> Places:
    """Idle slots of the next decode pass whose cells from `fed` on must be emptied, to make room for tokens that
    mean nothing: what all attend to must not become longer by an idle slot."""
    rows = state.decode_rows()
    idle = rows[~state.used[rows]]
    longest = int(state.fed[state.used].max()) + 1
    limit = min(state.ctx_tokens, -(-longest // CELLS_STEP) * CELLS_STEP)
    full = idle[state.fed[idle] >= limit]
    state.kept[full] = np.minimum(state.kept[full], max(0, limit - IDLE_ROOM))
    state.fed[full] = state.kept[full]
    return full


def decode_pass(state: SlotArrays) -> Pass | None:
    """One token for each slot in use and for idle ones between them, marked as fed. None if no slot would put out
    anything by it."""
    complete = state.used & (state.length - state.fed == 1)
    if not complete.any():
        return None
    rows = state.decode_rows()
    used = state.used[rows]
    slots = rows[used]
    pos = state.fed[rows]
    token = np.zeros(rows.size, np.int32)
    token[used] = state.tokens[slots, pos[used]]
    reading = int(np.count_nonzero(state.outputs[slots] == 0))
    state.fed[rows] += 1
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


def _runs(slots: Places) -> list[tuple[int, int]]:
    """Places [first, last) in `slots` (ascending) of numbers that follow each other."""
    edges = [0, *(np.flatnonzero(np.diff(slots) > 1) + 1).tolist(), slots.size]
    return list(pairwise(edges)) if slots.size else []
