"""Several tokens a step for few sequences: drafted tokens are fed behind the last one and checked in one pass.

Tokens are drafted (`workers.drafting`, `workers.draft_model`), and the model is asked about all of them at once. For
each row a token is chosen as if the drafted ones before it had been put out. As far as the chosen tokens are the
drafted ones, they are output, and so is the one after them; the cells of the rest are taken back. A choice depends on
seed, place, history and logits (`workers.sampling`), which are what they would have been. So the output is the same
whatever is drafted, greedy or sampled, with penalties or without, but for rounding: logits of a pass of another size
differ in their last bits (docs/determinism.md).

Whether and how many tokens are drafted is decided before each step by what it promises (`workers.payoff`). Where more
than SLOTS_MAX sequences run, they fill a pass with rows that are certainly of use. A step that reads a prompt, or
begins an answer, is none of these.

On a GPU a pass has the same number of rows for all slots that take part, and for idle ones between them
(`workers.passes` says why): shorter drafts are padded there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workers.drafting import NOTHING, Drafting
from workers.passes import Pass
from workers.payoff import Odds, PassTimes, best_length
from workers.slots import Ints, Places, SlotArrays

SLOTS_MAX = 8
ROWS_MAX = 32
"""Most rows of a pass that checks drafts: a context has room for their logits."""
LENGTHS = (1, 2, 3, 4, 6, 8, 11)
LENGTHS_STEADY = (1, 3, 7)
"""Lengths of drafts below the longest. A GPU takes some steps to get used to each new shape."""

Round = tuple[Places, Ints]
"""Slots, and a token that each of them puts out."""


@dataclass(frozen=True, slots=True)
class Check:
    """A pass that checks drafts. Lists have an item for each of `places`: the kind of draft, its tokens, its rows.

    `idle`: slots that are not in use and took part. `extra`: rows beyond one for each slot.
    """

    rows: Pass
    places: Places
    kinds: list[int]
    drafts: list[Ints]
    row_counts: list[int]
    idle: Places
    extra: int

    @property
    def drafted(self) -> int:
        return sum(draft.size for draft in self.drafts)


class Speculation:
    """Decides for one stepper which steps check drafts, and undoes what was wrong in them."""

    def __init__(self, slots: SlotArrays, drafting: Drafting, batch_tokens: int) -> None:
        self._slots = slots
        self._drafter = drafting.drafter
        self._always = drafting.always
        usual = LENGTHS_STEADY if slots.shape.steady else LENGTHS
        self._lengths = [*(length for length in usual if length < drafting.most), drafting.most]
        self._rows_max = min(ROWS_MAX, batch_tokens)
        self._odds = Odds(drafting.drafter.odds)
        self._times = PassTimes()

    def timed(self, sequences: int, extra: int, seconds: float) -> None:
        """A pass in which `sequences` slots put out tokens, and which read no prompt, took so long."""
        if sequences <= SLOTS_MAX:
            self._times.add(sequences, extra, seconds)

    def check(self) -> Check | None:
        """The pass of a step that checks drafts, marked as fed; None where a step without is likely to be better."""
        slots = self._slots
        if slots.count - slots.free > SLOTS_MAX:
            return None
        places = np.flatnonzero(slots.used)
        if not (slots.outputs[places] > 0).all() or not (slots.length[places] - slots.fed[places] == 1).all():
            return None
        offers = self._drafter.offers(slots, places)
        kinds = [kind if may else NOTHING for kind, may in zip(offers, slots.drafts[places].tolist(), strict=True)]
        # The last token that a request may put out is never fed.
        left = slots.limit[places] - slots.outputs[places] - 1
        rooms = [0 if kind == NOTHING else room for kind, room in zip(kinds, left.tolist(), strict=True)]
        if not any(rooms):
            return None
        length = self._length(places, kinds, rooms)
        if not length:
            return None
        drafts = self._drafter.draft(slots, places, [min(length, room) for room in rooms])
        if not any(draft.size for draft in drafts):
            return None
        return self._check(places, kinds, drafts)

    def _length(self, places: Places, kinds: list[int], rooms: list[int]) -> int:
        """How many tokens to draft for each sequence."""
        slots, odds, count = self._slots, self._odds, places.size
        requests = slots.order[places].tolist()
        odds.keep(requests)
        offers = [(request, kind) for request, kind in zip(requests, kinds, strict=True) if kind != NOTHING]
        chance = {request: odds.chance(request, kind) for request, kind in offers}
        lengths = self._lengths
        if slots.shape.steady:
            span = np.arange(places[0], places[-1] + 1)
            room = int((slots.tokens.shape[1] - 1 - slots.fed[span]).min())
            room = min(room, self._rows_max // span.size - 1, max(rooms))
            lengths = [length for length in lengths if length <= room]

            def extra_of(length: int) -> int:
                return int(span.size) * length
        else:
            lengths = [length for length in lengths if count * (length + 1) <= self._rows_max]

            def extra_of(length: int) -> int:
                return sum(min(length, room) for room in rooms)

        if self._always:
            return lengths[-1] if lengths else 0
        length = best_length(
            lengths,
            [chance.get(request, 0.0) for request in requests],
            rooms,
            extra_of,
            self._times.known(count),
            self._drafter.seconds,
        )
        if not length:
            for request, kind in offers:
                odds.unused(request, kind)
        return length

    def _check(self, places: Places, kinds: list[int], drafts: list[Ints]) -> Check:
        slots = self._slots
        for slot, draft in zip(places.tolist(), drafts, strict=True):
            end = int(slots.length[slot])
            slots.tokens[slot, end : end + draft.size] = draft
        own = np.array([draft.size + 1 for draft in drafts])
        if slots.shape.steady:
            span = np.arange(places[0], places[-1] + 1)
            counts = np.full(span.size, own.max())
        else:
            span, counts = places, own
        used = slots.used[span]
        seq = np.repeat(span, counts)
        ahead = np.arange(seq.size) - np.repeat(np.cumsum(counts) - counts, counts)
        column = slots.fed[seq] + ahead
        # Padding repeats the last drafted token, what is fed to idle slots is any: both are taken back.
        last = slots.fed[span]
        last[used] += own - 1
        token = slots.tokens[seq, np.minimum(column, np.repeat(last, counts))]
        token[~slots.used[seq]] = 0
        outputs = np.flatnonzero(slots.used[seq] & (column <= np.repeat(last, counts)))
        slots.fed[places] += own
        rows = Pass(
            token=token,
            pos=column.astype(np.int32),
            seq=seq.astype(np.int32),
            wanted=np.ones(seq.size, np.bool_),
            slots=places,
            output_slots=seq[outputs],
            output_rows=outputs,
            prompt_tokens=0,
            trim=slots.no_places,
            ahead=ahead[outputs],
        )
        return Check(rows, places, kinds, drafts, counts[used].tolist(), span[~used], int(seq.size - span.size))

    def settle(self, check: Check, tokens: Ints, forget: Callable[[int, int], None]) -> list[Round]:
        """What comes of the chosen `tokens`, one for each of the pass's `output_rows`, in the order in which it is put
        out. `forget(slot, first)` is called to take back cells from position `first` on."""
        slots, rounds, first = self._slots, list[tuple[list[int], list[int]]](), 0
        for place, slot in enumerate(check.places.tolist()):
            draft = check.drafts[place]
            chosen = tokens[first : first + draft.size + 1]
            first += chosen.size
            wrong = np.flatnonzero(chosen[:-1] != draft)
            right = int(wrong[0]) if wrong.size else draft.size
            if draft.size:
                self._odds.checked(int(slots.order[slot]), check.kinds[place], right, draft.size)
            slots.fed[slot] -= draft.size - right
            if right + 1 < check.row_counts[place]:
                forget(slot, int(slots.fed[slot]))
            for number, token in enumerate(chosen[: right + 1].tolist()):
                if number == len(rounds):
                    rounds.append(([], []))
                rounds[number][0].append(slot)
                rounds[number][1].append(token)
        for slot in check.idle.tolist():
            forget(slot, int(slots.fed[slot]))
        return [(np.array(taken, np.int64), np.array(put, np.int32)) for taken, put in rounds]
