"""One token for each row of a step, all rows at once.

What the filters mean and their order is in `workers.sampling`; here is how that is done with a number of numpy calls
that hardly grows with the rows. The interpreter's lock is what many contexts in one process share: numpy lets go of
it inside a call that is long enough, so work is cut into few long calls, and only those go to a pool of threads: each
of the short calls that a thread makes beside them is a queue at that lock.

A row is looked at once, for its *peaks*: its tokens are dealt out to some 2,000 columns (token modulo their number),
and a column's peak is its largest logit. Peaks say nearly all that is needed to find a *floor* that every token which
can be chosen reaches, and the few columns with a peak above the floor are all that is looked at again:

- greedy: the floor is the largest peak.
- top_k: the k-th largest peak. k tokens reach it, one in each of k columns.
- min_p: the largest peak + ln(min_p).
- top_p: needs Z, the sum of exp(logit - top) over all tokens, which costs more than all else. The floor is where the
  peaks from the largest on weigh top_p * Z. If they never do (flat logits), tokens under top + ln((1 - top_p) * Z / V)
  weigh less than (1 - top_p) * Z together, so top_p is reached above that.
- top_p and min_p: tokens above min_p's floor are found first. All peaks together weigh no more than Z. If the tokens
  that min_p keeps, without the last, weigh less than top_p of that, top_p keeps them all, and Z is not needed.

Tokens that reach the floor (candidates) are laid in a table, a line for each row, sorted, cut and drawn from. Rows
with thousands of candidates, and those with typical_p, are made to tables of one line.

Temperature alone keeps every token, and is drawn from all (`workers.groups`): no floor, no table.

What happens to a row is a function of this row alone. Tables are cumulated, never summed, along their lines, so
that neighbours that make a table wider change nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from workers.groups import draw_group, draw_within, drawn_group_tokens
from workers.parameters import Parameters
from workers.sampling import NOT_FINITE, Doubles, Flags, Floats, Ids, RowSampler, Tokens, penalise, typical
from workers.threads import ALONE, Threads

STRIPS = 64
"""Tokens in a column."""
COLUMNS_MIN = 256
CROWD_COLUMNS = 256
"""More columns than these above its floor, or more tokens than CROWD_TOKENS, and a row is worked at alone."""
CROWD_TOKENS = 1024
CACHED_TOKENS = 1 << 16
"""Rows with no more than so many in all are weighed together: of a small vocabulary one alone is not worth a call."""
FEW_COLUMNS = 64
"""Up to so many columns above min_p's floor, what min_p keeps is found before Z."""
MARGIN = 1e-3
"""Floors are so much lower than they need be: logits have 32 bits."""
MARGIN_SUM = 1e-4
"""Sums of weights of 32 bits are right to much less than this share."""

LOWEST = np.finfo(np.float32).min

History = Callable[[int], Tokens]
"""The tokens of prompt and output so far, of the place in the list of rows."""


def largest(logits: Floats, rows: Ids, threads: Threads = ALONE) -> Tokens:
    """For each of `rows` (ascending) the first of its largest logits; NOT_FINITE if that is NaN or infinite."""
    if rows.size == 1:
        row = rows.item()
        best = int(logits[row].argmax())
        return np.array([best if math.isfinite(logits[row, best]) else NOT_FINITE], np.int32)
    chosen = np.empty(rows.size, np.int32)

    def part(first: int, last: int) -> None:
        # Rows in between that are nobody's are looked at too: leaving them out would copy the others.
        places = rows[first:last]
        best = logits[places[0] : places[-1] + 1].argmax(axis=1)[places - places[0]]
        chosen[first:last] = np.where(np.isfinite(logits[places, best]), best, NOT_FINITE)

    threads.spread(part, rows.size)
    return chosen


def choose(logits: Floats, rows: Ids, parameters: Parameters, history: History, threads: Threads = ALONE) -> Tokens:
    """The token of each of `rows`, or NOT_FINITE if its largest logit is NaN or infinite.

    `logits`: (any, vocabulary), C-contiguous, changed in place by bias and penalties. `rows`: places in it,
    ascending.
    """
    adjust(logits, rows, parameters.samplers, history)
    with np.errstate(all="ignore"):
        return Step(logits, rows, parameters, threads).choose()


def adjust(logits: Floats, rows: Ids, samplers: Sequence[RowSampler], history: History) -> None:
    """Bias, then penalties, in place."""
    for place, sampler in enumerate(samplers):
        if sampler.bias_ids.size:
            logits[rows[place], sampler.bias_ids] += sampler.bias
    penalised = [place for place, sampler in enumerate(samplers) if sampler.window]
    if not penalised:
        return
    recent = [history(place)[-samplers[place].window :] for place in penalised]
    penalties = np.array([samplers[place].penalties for place in penalised])
    penalise(logits, rows[penalised], recent, penalties)


class _Scratch(threading.local):
    """Each thread's room for the weights of rows: new memory would cost as much as filling it."""

    def __init__(self) -> None:
        self._weights: Floats = np.empty(0, np.float32)

    def weights(self, tokens: int) -> Floats:
        """(tokens,) to be filled."""
        if self._weights.size < tokens:
            self._weights = np.empty(tokens, np.float32)
        return self._weights[:tokens]


_scratch = _Scratch()


class Step:
    """The arrays of one step, a line or an item for each row."""

    def __init__(
        self, logits: Floats, rows: Ids, parameters: Parameters, threads: Threads, width: int | None = None
    ) -> None:
        """`width`: columns, where they are not as usual."""
        self.logits, self.rows, self.of, self.threads = logits, rows, parameters, threads
        self.count, self.vocab = rows.size, logits.shape[1]
        self.width = width or min(self.vocab, max(COLUMNS_MIN, -(-self.vocab // STRIPS)))
        self.peaks: Floats = np.empty((self.count, self.width), np.float32)
        self.top: Floats = np.empty(self.count, np.float32)
        self.floor: Floats = np.empty(self.count, np.float32)
        """NaN where there are no candidates to be found: nothing reaches it."""
        self.total: Doubles = np.full(self.count, np.nan)
        """Z, where a row was weighed."""
        self.total_min: Doubles = np.zeros(self.count)
        """What Z is at least, for rows with top_p and min_p."""
        self.slack: Doubles | None = None
        """How much less than `total` Z may be, where that is not known exactly: then `doubt` hears of rows for which it
        matters."""
        self.chosen = np.full(self.count, NOT_FINITE, np.int32)

    def choose(self) -> Tokens:
        self.threads.spread(self.find_peaks, self.count)
        finite = self.find_floors()
        alone = finite & (self.of.by_typical | self.of.whole)
        place, ids, logits = self._candidates(alone)
        if place.size:
            lines = np.flatnonzero(np.bincount(place, minlength=self.count))
            self._draw(lines, *_table(np.searchsorted(lines, place), ids, logits))
        singly = np.flatnonzero(alone)
        self.threads.spread(lambda first, last: self._draw_singly(singly[first:last]), singly.size)
        return self.chosen

    # ------------------------------------------------ over the vocabulary

    def find_floors(self) -> Flags:
        """Floors, and Z of the rows that certainly need it. Returns which rows' largest logit is finite."""
        self.top = self.peaks.max(axis=1)
        finite: Flags = np.isfinite(self.top)
        here = finite & ~self.of.by_typical & ~self.of.whole
        best_alone = self.of.by_k & (self.of.top_k == 1)
        floor = np.where(best_alone, self.top, self.top + self.of.log_min_p - MARGIN)
        self.floor[:] = np.where(here, floor, np.nan)
        places = np.flatnonzero(here & self.of.by_k & ~best_alone)
        if places.size:
            self._floor_by_k(places)
        places = np.flatnonzero(finite & self.of.by_p)
        if places.size:
            self._floor_by_p(places)
        return finite

    def find_peaks(self, first: int, last: int) -> None:
        strips, width = self.vocab // self.width, self.width
        rows = self.rows[first:last]
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), rows.size]
        for a, b in pairwise(edges):
            block = self.logits[rows[a] : rows[b - 1] + 1]
            peaks = self.peaks[first + a : first + b]
            np.maximum.reduce(block[:, : strips * width].reshape(b - a, strips, width), axis=1, out=peaks)
            rest = block[:, strips * width :]
            if rest.size:
                np.maximum(peaks[:, : rest.shape[1]], rest, out=peaks[:, : rest.shape[1]])

    def _floor_by_k(self, places: Ids) -> None:
        k = self.of.top_k[places]
        ordered = np.sort(self.peaks[places], axis=1)
        kth = ordered[np.arange(places.size), np.maximum(self.width - k, 0)]
        # Where fewer than k tokens are allowed, a floor under all finite logits keeps the others out.
        self.floor[places] = np.where(k <= self.width, np.maximum(kth, LOWEST), np.float32(-np.inf))

    def _floor_by_p(self, places: Ids) -> None:
        few = np.count_nonzero(self.peaks[places] >= self.floor[places, None], axis=1) <= FEW_COLUMNS
        few &= self.of.log_min_p[places] > -np.inf
        hopeful, places = places[few], places[~few]
        if hopeful.size:
            self.total_min[hopeful] = self._total_at_least(hopeful)
        if not places.size:
            return
        self._weigh_all(places)
        top_p, top, total = self.of.top_p[places], self.top[places].astype(np.float64), self.total[places]
        ordered = np.sort(self.peaks[places], axis=1)[:, ::-1]
        weights = np.exp(ordered - self.top[places, None])
        short = np.count_nonzero(
            np.cumsum(weights, axis=1, dtype=np.float64) < (top_p * total * (1.0 + MARGIN_SUM))[:, None], axis=1
        )
        reached = ordered[np.arange(places.size), np.minimum(short, self.width - 1)]
        certain = top + np.log((1.0 - top_p) * total / self.vocab) - MARGIN
        self.floor[places] = np.maximum(self.floor[places], np.where(short < self.width, reached, certain))

    def _total_at_least(self, places: Ids) -> Doubles:
        """What Z cannot be under, without looking at more than the peaks."""
        least: Doubles = np.exp(self.peaks[places] - self.top[places, None]).sum(axis=1, dtype=np.float64)
        return least

    def _weights(self, places: Ids, room: int, scales: Floats | None = None) -> Floats:
        """(places, room) exp((logit - top) * scale), then zeros: the thread's own, until the next call."""
        weights = _scratch.weights(places.size * room).reshape(places.size, room)
        weights[:, self.vocab :] = 0.0
        own = weights[:, : self.vocab]
        for line, place in enumerate(places.tolist()):
            np.subtract(self.logits[self.rows[place]], self.top[place], out=own[line])
        if scales is not None:
            np.multiply(own, scales[:, None], out=own)
        np.exp(own, out=own)
        return weights

    def _weigh_all(self, places: Ids) -> None:
        """Those that have not been weighed yet."""
        places = places[np.isnan(self.total[places])]

        def part(first: int, last: int) -> None:
            with np.errstate(all="ignore"):
                for place in range(first, last):
                    one = places[place : place + 1]
                    self.total[one] = np.add.reduce(self._weights(one, self.vocab)[0])

        self.threads.spread(part, places.size)

    # ------------------------------------------------ few tokens of many rows

    def _candidates(self, alone: Flags) -> tuple[Ids, Ids, Floats]:
        """(place, token, logit) of what reaches the floors, by place and token. Crowded rows become `alone`."""
        above = np.flatnonzero(self.peaks >= self.floor[:, None])
        place = above // self.width
        crowded = np.bincount(place, minlength=self.count) > CROWD_COLUMNS
        if crowded.any():
            alone |= crowded
            fine = ~crowded[place]
            above, place = above[fine], place[fine]
        place, ids, logits = self._reaching(place, above - place * self.width)
        found = place * self.vocab + ids
        order = found.argsort()
        place, found, logits = place[order], found[order], logits[order]
        crowded = np.bincount(place, minlength=self.count) > CROWD_TOKENS
        if crowded.any():
            alone |= crowded
            fine = ~crowded[place]
            found, place, logits = found[fine], place[fine], logits[fine]
        return place, found - place * self.vocab, logits

    def _reaching(self, place: Ids, column: Ids) -> tuple[Ids, Ids, Floats]:
        """(place, token, logit) of the tokens in these columns that reach the floors of their rows."""
        ids = column[:, None] + np.arange(0, self.vocab, self.width)
        where = (self.rows[place] * self.vocab)[:, None] + np.minimum(ids, self.vocab - 1)
        logits = self.logits.reshape(-1).take(where)
        reach = np.flatnonzero((logits >= self.floor[place, None]) & (ids < self.vocab))
        return place[reach // ids.shape[1]], ids.reshape(-1)[reach], logits.reshape(-1)[reach]

    def _draw(self, lines: Ids, ids: Ids, logits: Floats, size: Ids) -> None:
        """Cut a table (see `_table`) to what the filters keep and draw from it. `lines`: the places of its lines."""
        every, of = np.arange(lines.size), self.of
        top = logits[:, 0].astype(np.float64)
        below = logits.astype(np.float64) - top[:, None]
        mass = np.cumsum(np.exp(below), axis=1)
        by_k, by_p, top_p = of.by_k[lines], of.by_p[lines], of.top_p[lines]
        if by_k.any():
            size = np.where(by_k, np.minimum(size, of.top_k[lines]), size)
        count = np.maximum(1, np.count_nonzero(below >= of.log_min_p[lines, None], axis=1))
        count = np.minimum(count, size)
        # min_p may have decided already (see above).
        before = np.where(count > 1, mass[every, count - 2], 0.0)
        decided = (count == 1) | (before < top_p * self.total_min[lines] * (1.0 - MARGIN_SUM))
        open_ = by_p & ~decided
        needed = open_ | (~by_p & (top_p < 1.0))
        if needed.any():
            self._weigh_all(lines[open_])
            total = np.where(by_p, self.total[lines], mass[every, size - 1])
            target = np.where(needed, top_p * total, np.inf)
            before_cut = count
            count = np.minimum(count, np.count_nonzero(mass < target[:, None], axis=1) + 1)
            if self.slack is not None:
                low = np.where(needed & by_p, target - top_p * self.slack[lines], target)
                least = np.minimum(before_cut, np.count_nonzero(mass < low[:, None], axis=1) + 1)
                self.doubt(lines[least != count])
        edges = np.cumsum(np.exp(below / of.temperature[lines, None]), axis=1)
        # A number of 53 bits under 1 times x is less than x: never past the last kept, nor on what weighs nothing.
        place = np.count_nonzero(edges <= (of.number[lines] * edges[every, count - 1])[:, None], axis=1)
        self.chosen[lines] = ids[every, place]

    def doubt(self, places: Ids) -> None:
        """What is chosen for these rows may be wrong."""

    # ------------------------------------------------ all tokens of one row

    def _draw_singly(self, places: Ids) -> None:
        with np.errstate(all="ignore"):
            whole = self.of.whole[places]
            for place in places[~whole].tolist():
                ids, logits = self._row_candidates(place)
                self._draw(np.array([place]), ids[None], logits[None], np.array([ids.size]))
            if whole.any():
                self._draw_from_all(places[whole])

    def _draw_from_all(self, places: Ids) -> None:
        """At a temperature, without a filter."""
        tokens, temperatures = drawn_group_tokens(self.vocab), self.of.temperature[places]
        room, at_once = -(-self.vocab // tokens) * tokens, max(1, CACHED_TOKENS // self.vocab)
        scales = (1.0 / temperatures).astype(np.float32)
        edges = np.empty((places.size, room // tokens))
        for first in range(0, places.size, at_once):
            some = slice(first, first + at_once)
            weights = self._weights(places[some], room, scales[some])
            np.cumsum(
                weights.reshape(-1, room // tokens, tokens).sum(axis=2), axis=1, dtype=np.float64, out=edges[some]
            )
        start = draw_group(edges, self.of.number[places]) * tokens
        ids = start[:, None] + np.arange(tokens)
        logits = self.logits[self.rows[places][:, None], np.minimum(ids, self.vocab - 1)]
        logits[ids >= self.vocab] = -np.inf
        self.chosen[places] = start + draw_within(logits, temperatures, self.of.within[places])

    def _row_candidates(self, place: int) -> tuple[Ids, Floats]:
        row, k = self.logits[self.rows[place]], int(self.of.top_k[place])
        floor = self.floor[place]
        if self.of.by_k[place] and not floor > -np.inf:
            floor = np.partition(row, row.size - k)[row.size - k]
        ids = np.flatnonzero(row >= floor if floor > -np.inf else row > -np.inf)
        ids = ids[np.argsort(-row[ids], kind="stable")]
        if self.of.by_k[place]:
            ids = ids[:k]
        if self.of.by_typical[place]:
            ids = ids[typical(row[ids], self.of.typical_p[place])]
        return ids, row[ids]


def _table(line: Ids, ids: Ids, logits: Floats) -> tuple[Ids, Floats, Ids]:
    """A table of tokens, one of their logits, and the lines' lengths: largest logit first, ties by smaller token.

    Given are items by line and token; no line is empty. Shorter lines end in logits of -inf.
    """
    size = np.bincount(line)
    column = np.arange(line.size) - (np.cumsum(size) - size)[line]
    shape = (size.size, int(size.max()))
    all_ids, all_logits = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    all_ids[line, column], all_logits[line, column] = ids, logits
    order = np.argsort(-all_logits, axis=1, kind="stable")
    every = np.arange(size.size)[:, None]
    return all_ids[every, order], all_logits[every, order], size
