"""The slots of one context as numpy arrays, so that a step over all of them is a handful of array operations.

A slot holds one sequence: its prompt and what has been put out so far stand in one row of `tokens`, of which `fed`
have been given to the model. A slot that decodes has one token to feed, a slot that reads its prompt has more;
nothing else tells them apart. The slot's number is llama.cpp's sequence id.

Only numbers live here; what a slot runs for is in `workers.stepper.Seat`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """One batch: parallel arrays, a row each, sorted by slot, positions ascending within a slot.

    `wanted` marks rows whose logits are needed: the last token of each slot in `output_slots` (ascending).
    """

    token: Ints
    pos: Ints
    seq: Ints
    wanted: npt.NDArray[np.bool_]
    slots: Places
    output_slots: Places
    prompt_tokens: int


class SlotArrays:
    """State of `count` slots of `ctx_tokens` tokens each."""

    def __init__(self, count: int, ctx_tokens: int) -> None:
        self.count = count
        # Not zeroed: pages that no request reaches cost nothing.
        self.tokens: Ints = np.empty((count, ctx_tokens), np.int32)
        self.used = np.zeros(count, np.bool_)
        self.length = np.zeros(count, np.int64)
        self.fed = np.zeros(count, np.int64)
        self.outputs = np.zeros(count, np.int64)
        self.limit = np.zeros(count, np.int64)
        self.order = np.zeros(count, np.int64)
        """When the slot was taken: prompts are read in this order."""
        self.last_s = np.zeros(count, np.float64)
        self.plain = np.ones(count, np.bool_)
        """The next token is the largest logit; no Python code is needed to choose it."""
        self.ignore_eos = np.zeros(count, np.bool_)
        self.watched = np.zeros(count, np.bool_)
        """The text is looked at token by token."""
        self._free = list(range(count))
        self._taken = 0

    @property
    def free(self) -> int:
        return len(self._free)

    def take(
        self, prompt: Ints, limit: int, *, plain: bool = True, ignore_eos: bool = False, watched: bool = False
    ) -> int:
        """Put a prompt into the smallest free slot (holes in the order of ids cut batches apart)."""
        slot = heapq.heappop(self._free)
        self._taken += 1
        self.tokens[slot, : prompt.size] = prompt
        self.used[slot] = True
        self.length[slot] = prompt.size
        self.fed[slot] = 0
        self.outputs[slot] = 0
        self.limit[slot] = limit
        self.order[slot] = self._taken
        self.plain[slot] = plain
        self.ignore_eos[slot] = ignore_eos
        self.watched[slot] = watched
        return slot

    def release(self, slot: int) -> None:
        self.used[slot] = False
        heapq.heappush(self._free, slot)

    def output_of(self, slot: int) -> Ints:
        """The tokens put out so far."""
        length = int(self.length[slot])
        return self.tokens[slot, length - int(self.outputs[slot]) : length]

    def fill(self, batch_tokens: int) -> Rows | None:
        """The next batch: a token for each slot that decodes, then prompts in order of arrival while there is
        room. Marks them as fed. None if no slot is in use."""
        slots = np.flatnonzero(self.used)
        if not slots.size:
            return None
        counts = self._shares(slots, batch_tokens)
        slots, counts = slots[counts > 0], counts[counts > 0]
        ends = np.cumsum(counts)
        column = np.arange(ends[-1]) + np.repeat(self.fed[slots] - (ends - counts), counts)
        seq = np.repeat(slots, counts)
        reading = self.outputs[slots] == 0
        self.fed[slots] += counts
        complete = self.fed[slots] == self.length[slots]
        wanted = np.zeros(seq.size, np.bool_)
        wanted[ends[complete] - 1] = True
        return Rows(
            token=self.tokens[seq, column],
            pos=column.astype(np.int32),
            seq=seq.astype(np.int32),
            wanted=wanted,
            slots=slots,
            output_slots=slots[complete],
            prompt_tokens=int(counts[reading].sum()),
        )

    def _shares(self, slots: Places, batch_tokens: int) -> Places:
        """How many tokens each of `slots` feeds."""
        left = self.length[slots] - self.fed[slots]
        if int(left.sum()) <= batch_tokens:
            return left
        decoding = self.outputs[slots] > 0
        room = batch_tokens - int(np.count_nonzero(decoding))
        reading = np.flatnonzero(~decoding)
        reading = reading[np.argsort(self.order[slots[reading]])]
        before = np.cumsum(left[reading]) - left[reading]
        shares = np.where(decoding, left, 0)
        shares[reading] = np.clip(room - before, 0, left[reading])
        return shares

    def put(self, slots: Places, tokens: Ints, now_s: float) -> npt.NDArray[np.float64]:
        """Append one output token to each of `slots`. Returns the gaps to the tokens before, where there are."""
        later = slots[self.outputs[slots] > 0]
        gaps: npt.NDArray[np.float64] = now_s - self.last_s[later]
        self.tokens[slots, self.length[slots]] = tokens
        self.length[slots] += 1
        self.outputs[slots] += 1
        self.last_s[slots] = now_s
        return gaps
