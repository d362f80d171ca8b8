"""Which choice of which request sits in which slot of one context: into slots, between slots, out of slots.

`Seating.admit` takes what waits in the backlog when it is a good moment to read prompts, has the free slots made
neighbours where that pays, and gives each prompt the slot where least of it has to be read (`workers.prefixes`).
`settle` gives slots that wait for another one's tokens what has become available. Whatever changes in `SlotArrays` here
is done to the decoder's cells in the same breath, so that the two never say different things.

It knows neither logits nor tokens' meaning; steps are `workers.stepper`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.backlog import Backlog
from workers.constraints import Matcher
from workers.logprobs import Noted
from workers.prefixes import Prefixes
from workers.sampling import RowSampler
from workers.shortlist import Shortlist
from workers.slots import NOBODY, Ints, Places, SlotArrays
from workers.task import Task
from workers.text import TextStream

ALLOCATION_FAILED = -2
"""llama_decode's code where ggml could not allocate what a pass needs."""
READ_TOGETHER = 8
"""Prompts that are enough for a pass: waiting for more of them brings nothing."""


class Decoder(Protocol):
    """What is needed of a context. See `workers.llama_contexts.LlamaContext`."""

    batch_tokens: int
    asynchronous: bool
    """`decode` comes back before the device has computed: until its results are asked for, there is time for other
    things."""
    token: Ints
    pos: Ints
    seq: Ints
    wanted: npt.NDArray[np.int8]

    def decode(self, rows: int) -> int: ...

    def want_lists(self, wanted: bool, temperature: float = 0.0) -> None:
        """Whether shortlists are wanted from the next decode on, and for rows of which temperature; 0: of none."""
        ...

    def best(self, rows: int) -> Ints | None:
        """(rows,) the token with the largest logit of each wanted row of the last batch, NOT_FINITE where a logit is
        not; None where the device does not choose."""
        ...

    def shortlist(self, rows: int) -> Shortlist | None:
        """The likeliest tokens of each row, if they were wanted and the device chooses."""
        ...

    def logits(self, rows: int, places: Places | None = None) -> npt.NDArray[np.float32]:
        """(rows, vocab_tokens) logits of the wanted rows; where the device chooses, `places` alone are there."""
        ...

    def forget(self, seq: int, first: int = 0) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def clear(self) -> None: ...


def failed(code: int) -> str:
    """What llama.cpp's code for a pass that was not computed says, as far as it says anything."""
    return f"failed with code {code}" + (", out of memory," if code == ALLOCATION_FAILED else "")


@dataclass
class Seat:
    """What one slot runs: choice `choice` of a request."""

    task: Task
    choice: int
    sampler: RowSampler
    matcher: Matcher | None = None
    """Of a constrained text."""
    noted: Noted | None = None
    """Log-probabilities of the output, if they are asked for."""
    stream: TextStream | None = None
    parts: list[str] = field(default_factory=list)
    unsent_tokens: int = 0


class Seating:
    """The seats of context `index`. `cached_tokens` counts tokens of prompts that were not read, until it is reset."""

    def __init__(self, index: int, slots: SlotArrays, decoder: Decoder, backlog: Backlog, vocab_tokens: int) -> None:
        self._index = index
        self._slots = slots
        self._decoder = decoder
        self._backlog = backlog
        self._vocab_tokens = vocab_tokens
        self._prefixes = Prefixes(slots)
        self._seats: list[Seat | None] = [None] * slots.count
        self._idle_rows = 0
        """How many rows were kept idle, over the last steps, though requests waited."""
        self.cached_tokens = 0
        self.constrained = 0
        """Seats with a matcher."""
        self.noting = 0
        """Seats that want log-probabilities."""

    def __getitem__(self, slot: int) -> Seat:
        seat = self._seats[slot]
        assert seat is not None, slot
        return seat

    def cancelled(self) -> list[int]:
        """Slots whose requests have been cancelled."""
        return [slot for slot, seat in enumerate(self._seats) if seat is not None and seat.task.cancelled]

    # ------------------------------------------------ into slots

    def admit(self, now_s: float) -> list[int]:
        """Take requests for free slots. Returns the keys of those that start with it."""
        slots = self._slots
        waiting = self._backlog.available(self._index)
        if not waiting:
            self._idle_rows = 0
            self._shrink()
            return []
        # Reading one prompt takes a pass that all others wait for, reading several takes hardly longer. So where more
        # requests wait than there are slots, wait for more slots to become free, until they are several, or as much
        # is lost by waiting as a pass costs.
        if slots.free < min(waiting, READ_TOGETHER):
            self._idle_rows += slots.free
            if self._idle_rows < slots.shape.patience * slots.decoding:
                return []
        self._idle_rows = 0
        taken = self._backlog.take(self._index, slots.free, now_s)
        self._move(slots.moves_for(len(taken)))
        for task, choice in taken:
            self._seat(task, choice)
        return [task.key for task, choice in taken if choice == 0]

    def _seat(self, task: Task, choice: int) -> None:
        slots, sampling = self._slots, task.sampling
        sampler = RowSampler(sampling, task.job.seed, choice, self._vocab_tokens)
        watched = task.job.stream or bool(sampling.stop)
        matcher = None if task.grammar is None else task.grammar.start()
        self.constrained += matcher is not None
        alternatives = task.job.request.logprobs
        noted = None if alternatives is None else Noted(task.limit, alternatives)
        self.noting += noted is not None
        place = self._prefixes.place(task.prompt)
        slot, stale = slots.take(
            task.prompt,
            task.limit,
            slot=place.slot,
            keep=place.keep,
            plain=sampler.plain and matcher is None,
            listable=(listable := sampler.listable and matcher is None and noted is None),
            whole_at=sampler.whole_at if listable else 0.0,
            ignore_eos=sampling.ignore_eos,
            watched=watched,
            # A matcher takes a token at a time.
            drafts=matcher is None and noted is None,
        )
        if stale:
            self._decoder.forget(slot, place.keep)
        self._seats[slot] = Seat(task, choice, sampler, matcher, noted, TextStream(sampling.stop) if watched else None)
        self.cached_tokens += place.keep
        self._prefixes.taken(place)
        if place.donor != NOBODY:
            # Now, if it is there: an idle donor may be the next one's slot.
            self.settle()

    # ------------------------------------------------ between slots

    def settle(self) -> None:
        """Copy what slots have waited for and others have read by now."""
        slots = self._slots
        for slot in self._prefixes.settled():
            source, tokens = int(slots.donor[slot]), int(slots.awaited[slot])
            self._decoder.copy(source, slot, tokens)
            self.cached_tokens += slots.give(slot, tokens)

    def _move(self, moves: list[tuple[int, int]]) -> None:
        slots = self._slots
        for source, target in moves:
            if tokens := int(slots.fed[source]):
                self._decoder.copy(source, target, tokens)
            else:
                self._decoder.forget(target)
            slots.move(source, target)
            self._seats[target] = self._seats[source]
            self._empty(source)

    def _shrink(self) -> None:
        """Nobody waits: let the decode pass be no wider than it need be."""
        if self._slots.mostly_idle:
            self._move(self._slots.moves_to_shrink())
            self._slots.narrow()

    # ------------------------------------------------ out of slots

    def leave(self, slot: int) -> None:
        """What sat in a slot has ended."""
        self.constrained -= self[slot].matcher is not None
        self.noting -= self[slot].noted is not None
        self._slots.release(slot)
        self._empty(slot)

    def _empty(self, slot: int) -> None:
        self._seats[slot] = None
        if not self._slots.shape.keeps:
            self._decoder.forget(slot)
