"""The sequences of a context whose cells are shared: who holds which cells, and what a new prompt can begin with.

A cell holds the keys and values of one token at one place. In a context with shared cells (llama.cpp: a unified cache)
a sequence takes over the first cells of another at no cost, both then hold them, and a cell is free when nobody holds
it. `Sequences` keeps count of that, so that a batch never lacks cells, and tells llama.cpp.

A sequence that is done can be *held*: its cells stay until they are needed, the longest unused ones going first. A
prompt that begins as another, held or being read, begins with its cells.

Array work over all sequences is done at once. Nothing here knows what a sequence is for.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np

from workers.logprobs import Noted
from workers.slots import Ints, Places

NOT_FOUND = -2
"""Stands for `noted_k` of what no prompt can begin with."""


class Keeper(Protocol):
    """What is needed of a context. See `workers.llama_contexts.LlamaContext`."""

    def share(self, source: int, target: int, count: int) -> None: ...

    def forget(self, seq: int, first: int = -1) -> None: ...

    def clear(self) -> None: ...


class Sequence:
    """Some tokens, of which the first `fed` are in cells and the first `end` are to be.

    From place `wanted` on logits are wanted; what they say of the tokens goes into `noted`, whose first place is the
    token at place `base`.
    """

    __slots__ = ("base", "cells", "end", "fed", "gone", "id", "noted", "running", "tokens", "wanted")

    def __init__(
        self, number: int, tokens: Ints, cells: Places, *, end: int, wanted: int, base: int, noted: Noted
    ) -> None:
        self.id = number
        self.tokens = tokens
        self.cells = cells
        """Which cells hold the first tokens: numbers of our own, llama.cpp has others."""
        self.fed = cells.size
        self.end = end
        self.wanted = wanted
        self.base = base
        self.noted = noted
        self.running = True
        """False: held, or gone."""
        self.gone = False

    @property
    def left(self) -> int:
        return self.end - self.fed


class Sequences:
    """Up to `count` sequences over `cells` cells. `reuse`: prompts may begin with the cells of other prompts."""

    def __init__(self, keeper: Keeper, count: int, cells: int, ctx_tokens: int, *, reuse: bool) -> None:
        self._keeper = keeper
        self._reuse = reuse
        self._count = count
        self._holders = np.zeros(cells, np.int32)
        """How many sequences hold each cell."""
        self._prompts = np.empty((count, ctx_tokens), np.int32)
        self._ends = np.zeros(count, np.int64)
        self._ks = np.full(count, NOT_FOUND)
        self._by_id: list[Sequence | None] = [None] * count
        self._free_ids = list(range(count))
        self._held: dict[int, Sequence] = {}
        """The longest unused first."""
        self.free_cells = cells

    @property
    def free_ids(self) -> int:
        return len(self._free_ids)

    def find(self, prompt: Ints, end: int, noted_k: int) -> tuple[Sequence | None, int]:
        """The sequence with most of the first tokens of `prompt`, and how many of its cells can be taken over.

        `noted_k`: with how many alternatives each token's log-probability must be known, -1 if it need not be. Of the
        first `end` tokens one at least is left to be fed: nobody keeps logits. What is known of a token comes from the
        row before it; where that is needed, the last token that both have is fed again, too.
        """
        size = prompt.size
        same = self._prompts[:, :size] == prompt
        shared = np.where(same.all(axis=1), size, same.argmin(axis=1))
        shared = np.minimum(np.minimum(shared - (noted_k >= 0), end - 1), self._ends)
        shared[self._ks < max(noted_k, -1)] = 0
        best = int(shared.argmax())
        return (self._by_id[best], int(shared[best])) if shared[best] > 0 else (None, 0)

    def start(
        self, tokens: Ints, source: Sequence | None, shared: int, *, end: int, wanted: int, base: int, noted: Noted
    ) -> Sequence:
        """A new sequence that takes over `shared` cells of `source`. An id must be free."""
        number = heapq.heappop(self._free_ids)
        cells = source.cells[:shared] if source is not None else np.empty(0, np.int64)
        sequence = Sequence(number, tokens, cells.copy(), end=end, wanted=wanted, base=base, noted=noted)
        self._by_id[number] = sequence
        if source is not None and shared:
            self._holders[cells] += 1
            self._keeper.share(source.id, number, shared)
            if source.id in self._held:
                self._held[source.id] = self._held.pop(source.id)
        return sequence

    def publish(self, sequence: Sequence, noted_k: int) -> None:
        """Let prompts begin with it. See `find` for `noted_k`."""
        if self._reuse:
            self._prompts[sequence.id, : sequence.tokens.size] = sequence.tokens
            self._prompts[sequence.id, sequence.tokens.size :] = -1
            self._ends[sequence.id] = sequence.end
            self._ks[sequence.id] = noted_k

    def feed(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens go into cells, of which so many must be free."""
        taken = np.flatnonzero(self._holders == 0)[:count]
        self._holders[taken] = 1
        self.free_cells -= count
        sequence.cells = np.concatenate([sequence.cells, taken])
        sequence.fed += count

    def hold(self, sequence: Sequence) -> None:
        """It is done; its cells stay until they are needed."""
        sequence.running = False
        if self._reuse:
            self._held[sequence.id] = sequence
        else:
            self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Its id is free, and those of its cells that nobody else holds."""
        self._held.pop(sequence.id, None)
        self._holders[sequence.cells] -= 1
        self.free_cells += int(np.count_nonzero(self._holders[sequence.cells] == 0))
        self._keeper.forget(sequence.id)
        self._forget(sequence)

    def make_room(self) -> bool:
        """Drop the held sequence that was not used for longest. False if none is held."""
        oldest = next(iter(self._held.values()), None)
        if oldest is not None:
            self.drop(oldest)
        return oldest is not None

    def clear(self) -> None:
        """Empty all cells, with all that is in them."""
        self._keeper.clear()
        for sequence in self._by_id:
            if sequence is not None:
                self._forget(sequence)
        self._held.clear()
        self._holders[:] = 0
        self.free_cells = self._holders.size

    def _forget(self, sequence: Sequence) -> None:
        sequence.running, sequence.gone = False, True
        self._by_id[sequence.id] = None
        self._ks[sequence.id] = NOT_FOUND
        self._ends[sequence.id] = 0
        heapq.heappush(self._free_ids, sequence.id)
