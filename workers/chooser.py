"""Each step's tokens: who of its rows needs what, and where that comes from.

Where the device chooses (`Decoder.best`), a row whose token is the largest logit needs nothing else. Rows with filters,
penalties, grammars or log-probabilities need their logits, and only these are fetched. Where it does not, all logits
are there anyway.

A `Turn` is one step's choosing. It begins when the device has been given the batch: masks of grammars are made while it
computes. `wait` until it is done, then `tokens`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from workers.choosing import choose, largest
from workers.constraints import Allowed, Constraints
from workers.logprobs import Asker, Look
from workers.parameters import Parameters
from workers.passes import Pass
from workers.sampling import NOT_FINITE, Flags
from workers.seating import Decoder, Seating
from workers.shortlist import Shortlist
from workers.slots import Ints, SlotArrays
from workers.threads import PARALLEL_ELEMENTS_MIN, Threads


class Chooser:
    """Of one context. `eog`: (vocab_tokens,) which tokens end a generation."""

    def __init__(
        self,
        decoder: Decoder,
        slots: SlotArrays,
        seats: Seating,
        eog: npt.NDArray[np.bool_],
        *,
        constraints: Constraints | None = None,
        pool: ThreadPoolExecutor | None = None,
        pool_threads: int = 1,
    ) -> None:
        self.decoder = decoder
        self.slots = slots
        self.seats = seats
        self.eog = eog
        self.eog_ids = np.flatnonzero(eog)
        self.constraints = constraints
        self._pool = pool if pool_threads > 1 else None
        self._pool_threads = pool_threads

    def begin(self, rows: Pass) -> Turn:
        return Turn(self, rows)

    def threads(self, logits: npt.NDArray[np.float32]) -> Threads:
        return Threads(self._pool if logits.size >= PARALLEL_ELEMENTS_MIN else None, self._pool_threads)


class Turn:
    """The choosing of one step, whose last batch was `rows`."""

    __slots__ = (
        "_all_easy",
        "_allowed",
        "_best",
        "_count",
        "_listable",
        "_hard",
        "_listed",
        "_logits",
        "_of",
        "_parameters",
        "_rows",
    )

    def __init__(self, chooser: Chooser, rows: Pass) -> None:
        self._of = chooser
        self._rows = rows
        self._count = int(np.count_nonzero(rows.wanted))
        self._hard: Flags = ~chooser.slots.plain[rows.output_slots]
        if chooser.seats.noting:
            seats = chooser.seats
            self._hard |= np.array([seats[slot].noted is not None for slot in rows.output_slots.tolist()], np.bool_)
        self._all_easy = not np.count_nonzero(self._hard)
        """Each row's token is its largest logit, as far as that is allowed to come."""
        self._listable: Flags = self._hard & chooser.slots.listable[rows.output_slots]
        self._parameters = None if self._all_easy else self._asked(rows.only(self._hard))
        """Of the hard rows."""
        self._listed: Shortlist | None = None
        self._allowed: Allowed | None = None
        """Of the hard rows that are not listable."""
        if chooser.seats.constrained and chooser.constraints is not None:
            slots = rows.output_slots[self._hard & ~self._listable].tolist()
            self._allowed = chooser.constraints.allowed([chooser.seats[slot].matcher for slot in slots])
        self._best: Ints | None = None
        self._logits: npt.NDArray[np.float32] | None = None

    def wait(self) -> None:
        """Until the device is done."""
        decoder = self._of.decoder
        self._best = decoder.best(self._count)
        if self._best is None:
            self._logits = decoder.logits(self._count)
        elif not self._all_easy and self._listable.any():
            self._listed = decoder.shortlist(self._count)

    def tokens(self) -> Ints:
        """One token for each of the batch's `output_slots`; NOT_FINITE where its row of logits is damaged, STUCK where
        its grammar has failed."""
        of, rows, hard = self._of, self._rows, self._hard
        if self._all_easy and self._best is None:
            return self._choose(rows, None)
        tokens = np.empty(hard.size, np.int32)
        easy = (~hard).nonzero()[0]
        if self._listed is not None and self._best is not None:
            hard = self._choose_listed(tokens, self._listed, self._best)
        if not self._all_easy and hard.any():
            allowed = self._allowed
            if allowed is not None:
                strict = np.flatnonzero(~self._listable[hard])
                allowed = replace(allowed, places=strict[allowed.places])
            tokens[hard] = self._choose(rows.only(hard), allowed, self._parameters if hard is self._hard else None)
        if not easy.size:
            return tokens
        if self._best is None:
            tokens[easy] = self._choose(rows.only(easy) if easy.size < tokens.size else rows, None)
            return tokens
        tokens[easy] = best = self._best[rows.output_rows[easy]]
        # A text that must not end may have its end as the likeliest token: what comes next after that?
        ends = of.slots.ignore_eos[rows.output_slots[easy]] & (best >= 0) & of.eog[best]
        if np.count_nonzero(ends):
            again = easy[ends]
            tokens[again] = self._choose(rows.only(again), None)
        return tokens

    def _choose_listed(self, tokens: Ints, listed: Shortlist, best: Ints) -> Flags:
        """Choose from shortlists, where they decide. Returns which rows need their logits."""
        rows = self._rows
        hard: Flags = self._hard.copy()
        places = np.flatnonzero(self._listable)
        damaged = best[rows.output_rows[places]] == NOT_FINITE
        tokens[places[damaged]], hard[places[damaged]] = NOT_FINITE, False
        places = places[~damaged]
        if places.size:
            slots, some = self._of.slots, rows if places.size == rows.output_slots.size else rows.only(places)
            parameters = self._parameters
            assert parameters is not None
            if places.size < len(parameters.samplers):
                parameters = parameters.only(np.searchsorted(np.flatnonzero(self._hard), places))
            silenced = slots.ignore_eos[some.output_slots]
            found, undecided = listed.choose(some.output_rows, parameters, silenced, self._of.eog_ids)
            tokens[places] = found
            hard[places[~undecided]] = False
        return hard

    def _choose(self, rows: Pass, allowed: Allowed | None, asked: Parameters | None = None) -> Ints:
        """The tokens of `rows`, from their logits, which are changed in place. `asked`: if it is known already."""
        of = self._of
        logits = self._logits if self._logits is not None else of.decoder.logits(self._count, rows.output_rows)
        look = self._look(logits, rows)
        # Before bias and penalties, which leave -inf as it is.
        silenced = of.slots.ignore_eos[rows.output_slots].nonzero()[0]
        if silenced.size and of.eog_ids.size:
            logits[rows.output_rows[silenced, None], of.eog_ids] = -np.inf
        threads = of.threads(logits)
        if allowed is not None:
            allowed.forbid_others(logits, rows.output_rows, threads)
        tokens = self._chosen(logits, rows, asked, threads)
        if allowed is not None:
            allowed.consume(tokens)
        if look is not None:
            look.note(tokens)
        return tokens

    def _chosen(self, logits: npt.NDArray[np.float32], rows: Pass, asked: Parameters | None, threads: Threads) -> Ints:
        slots, outputs = self._of.slots, rows.output_slots
        if np.count_nonzero(slots.plain[outputs]) == outputs.size:
            return largest(logits, rows.output_rows, threads)
        places = outputs.tolist()
        ahead = None if rows.ahead is None else rows.ahead.tolist()

        def history(place: int) -> Ints:
            slot = places[place]
            return slots.tokens[slot, : slots.length[slot] + (0 if ahead is None else ahead[place])]

        return choose(logits, rows.output_rows, asked or self._asked(rows), history, threads)

    def _asked(self, rows: Pass) -> Parameters:
        """What the output rows of `rows` ask for."""
        seats, slots, outputs = self._of.seats, self._of.slots, rows.output_slots
        steps = slots.outputs[outputs]
        if rows.ahead is not None:
            steps = steps + rows.ahead
        return Parameters([seats[slot].sampler for slot in outputs.tolist()], steps, self._of.eog.size)

    def _look(self, logits: npt.NDArray[np.float32], rows: Pass) -> Look | None:
        """The rows whose log-probabilities are asked for, before tokens are chosen from them. None if nobody asks."""
        if not self._of.seats.noting:
            return None
        askers = []
        for place, slot in enumerate(rows.output_slots.tolist()):
            noted = self._of.seats[slot].noted
            if noted is not None:
                askers.append(Asker(place, noted, int(self._of.slots.outputs[slot])))
        return Look(logits, rows.output_rows, askers, self._of.threads(logits)) if askers else None
