"""What a device leaves of rows of logits: enough to choose from them as from the whole, nearly always.

A row is cut into groups of neighbouring tokens. The groups with the largest logits are listed, with all their tokens:
no token of another group has a logit over the *bound*, the smallest of the listed groups' largest. Together with Z, the
sum of exp(logit - top) over all tokens, this says which tokens top_k, top_p and min_p keep, if the last one kept is not
under the bound. Where it is, as with flat logits, the row is *undecided* and needs all its logits.

With temperature alone the sums of all groups come too, at one temperature for all rows: the token is of the group that
they say (`workers.groups`), whose logits are listed, or fetched. Rows at another temperature are undecided.

Sums are known nearly: a GPU has 32 bits, and tokens that may not come (`ignore_eos`) and are not listed are in Z. A row
for which that could matter is undecided, too. So the choice is the one that is made from all logits
(`workers.choosing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.choosing import Step
from workers.groups import draw_group, draw_within
from workers.parameters import Parameters
from workers.sampling import Doubles, Flags, Floats, Ids, Tokens
from workers.threads import ALONE

Ints = npt.NDArray[np.int32]

GROUPS = 64
"""Groups that are listed. So many tokens are certainly among the largest: enough for the usual top_k of 40."""
LEFT_MIN = 0.01
"""Of the sum over all tokens, what must be left without those that may not come."""
ROUNDING = 1e-5
"""Of Z, what its sum may be wrong by."""


@dataclass(frozen=True)
class Sums:
    """What temperature alone needs, of all rows of a pass. at: the temperature. weights: (rows, groups) the sum of
    exp((logit - top) / at) of each group. ends: (rows, ids) the logits of the tokens that may end a text, in the order
    of their ids. fetch: a row's logits of a group, (tokens,)."""

    at: float
    weights: Floats
    ends: Floats
    fetch: Callable[[int, int], Floats]


@dataclass(frozen=True)
class Shortlist:
    """Lists of all rows of a pass, largest group first. groups: (rows, listed). peaks: (rows, listed) their largest
    logits. logits: (rows, vocab_tokens), of which the first listed * tokens are those of their tokens. tokens: in a
    group. top, total (Z): (rows,)."""

    groups: Ints
    peaks: Floats
    logits: Floats
    tokens: int
    top: Floats
    total: Doubles
    sums: Sums

    @property
    def listed(self) -> tuple[Ids, Floats]:
        """(rows, listed * tokens) which tokens are listed, and their logits."""
        rows = len(self.groups)
        ids: Ids = (self.groups[:, :, None].astype(np.int64) * self.tokens + np.arange(self.tokens)).reshape(rows, -1)
        return ids, self.listed_logits

    @property
    def listed_logits(self) -> Floats:
        return self.logits[:, : self.groups.shape[1] * self.tokens]

    def choose(self, rows: Ids, parameters: Parameters, silenced: Flags, eog_ids: Ids) -> tuple[Tokens, Flags]:
        """The token of each of `rows` (ascending), and which of them are undecided.

        `silenced`: in which of them tokens `eog_ids` may not come. Logits are changed in place.
        """
        with np.errstate(all="ignore"):
            step = _ListedStep(self, rows, parameters)
            step.keep_ends(silenced, eog_ids)
            return step.choose(), step.undecided


class _ListedStep(Step):
    """The groups are the columns, and their peaks are known."""

    def __init__(self, short: Shortlist, rows: Ids, parameters: Parameters) -> None:
        super().__init__(short.logits, rows, parameters, ALONE, width=short.groups.shape[1])
        self.short = short
        self.peaks = short.peaks[rows]
        self.total[:] = short.total[rows]
        self.bound = self.peaks[:, -1].copy()
        """No token that is missing has a larger logit, ..."""
        self.above_bound = np.full(self.count, self.width)
        """... and so many that are there have no smaller one."""
        self.undecided: Flags = np.zeros(self.count, np.bool_)
        self.hidden = np.zeros(self.count)
        """Tokens that may not come and are not listed."""
        self.silenced: Flags = np.zeros(self.count, np.bool_)
        self.eog_ids: Ids = np.empty(0, np.int64)

    def keep_ends(self, silenced: Flags, eog_ids: Ids) -> None:
        """Rows where `eog_ids` may not come."""
        if not eog_ids.size:
            return
        self.silenced, self.eog_ids = silenced, eog_ids
        places = np.flatnonzero(silenced & ~self.of.whole)
        if places.size:
            self._silence(places, eog_ids)

    def _silence(self, places: Ids, eog_ids: Ids) -> None:
        """Take `eog_ids` out of the rows at `places`, and out of what is known of them."""
        size, lines = self.short.tokens, self.rows[places]
        self.hidden[places] = eog_ids.size
        group, offset = np.divmod(eog_ids, size)
        touched: Flags = np.zeros(self.vocab // size, np.bool_)
        touched[group] = True
        listed = self.short.groups[lines]
        some = np.flatnonzero(touched[listed].any(axis=1))
        if not some.size:
            return
        places, lines = places[some], lines[some]
        which, column, end = np.nonzero(listed[some][:, :, None] == group)
        line, start = lines[which], column * size
        gone = self.logits[line, start + offset[end]]
        self.hidden[places] -= np.bincount(which, minlength=places.size)
        weights = np.bincount(which, np.exp((gone - self.short.top[line]).astype(np.float64)))
        self.logits[line, start + offset[end]] = -np.inf
        if (gone < self.bound[places[which]]).all():
            # What is under the bound is not chosen in any case, nor is it the largest of its group.
            self.total[places] -= weights
            return
        self.peaks[places[which], column] = self.logits[line[:, None], start[:, None] + np.arange(size)].max(axis=1)
        left = self.total[places] - weights
        # Of what is nearly all taken away nothing exact is left.
        self.bound[places[left < LEFT_MIN * self.total[places]]] = np.inf
        top = self.peaks[places].max(axis=1)
        self.total[places] = left * np.exp((self.short.top[lines] - top).astype(np.float64))
        self.above_bound[places] -= np.bincount(which, minlength=places.size)

    def find_peaks(self, first: int, last: int) -> None:
        """They are known."""

    def find_floors(self) -> Flags:
        top = self.peaks.max(axis=1).astype(np.float64)
        self.slack = ROUNDING * self.total + self.hidden * np.exp(np.minimum(0.0, self.bound - top))
        finite = super().find_floors()
        certain = self.of.by_k & (self.of.top_k <= self.above_bound) & np.isfinite(self.bound)
        self.floor[certain] = np.maximum(self.floor, self.bound)[certain]
        self.undecided = finite & ~self.of.whole & ~(self.floor >= self.bound)
        self.floor[self.undecided] = np.nan
        return finite & ~self.undecided

    def _total_at_least(self, places: Ids) -> Doubles:
        assert self.slack is not None
        return self.total[places] - self.slack[places]

    def doubt(self, places: Ids) -> None:
        self.undecided[places] = True

    def _reaching(self, place: Ids, column: Ids) -> tuple[Ids, Ids, Floats]:
        size, row = self.short.tokens, self.rows[place]
        logits = self.logits.reshape(len(self.logits), -1, size)[row, column]
        reach = np.flatnonzero(logits >= self.floor[place, None])
        line = reach // size
        first = self.short.groups[row[line], column[line]].astype(np.int64) * size
        return place[line], first + reach - line * size, logits.reshape(-1)[reach]

    def _draw_singly(self, places: Ids) -> None:
        """Rows with temperature alone; others have too many candidates for a table."""
        whole = self.of.whole[places] & (self.of.temperature[places] == self.short.sums.at)
        self.undecided[places[~whole]] = True
        if whole.any():
            self._draw_whole(places[whole])

    def _draw_whole(self, places: Ids) -> None:
        sums, rows, numbers = self.short.sums, self.rows[places], self.of.number[places]
        weights = sums.weights[rows].astype(np.float64)
        near = ROUNDING * weights.sum(axis=1)
        quiet = np.flatnonzero(self.silenced[places])
        if quiet.size:
            if sums.ends.shape[1] != self.eog_ids.size:
                near[quiet] = np.inf
            else:
                gone = np.exp((sums.ends[rows[quiet]] - self.short.top[rows[quiet], None]) / sums.at)
                for group, one in zip(self.eog_ids // self.short.tokens, gone.T, strict=True):
                    weights[quiet, group] -= one
                np.maximum(weights, 0.0, out=weights)
        edges = np.cumsum(weights, axis=1)
        group = np.minimum(draw_group(edges, numbers), edges.shape[1] - 1)
        every, target = np.arange(places.size), numbers * edges[:, -1]
        before = np.where(group, edges[every, group - 1], -np.inf)
        decided = (target - before > near) & (edges[every, group] - target > near)
        self.undecided[places[~decided]] = True
        places, rows, group = places[decided], rows[decided], group[decided]
        if places.size:
            logits = self._of_groups(places, group)
            found = draw_within(logits, self.of.temperature[places], self.of.within[places])
            self.chosen[places] = group * self.short.tokens + found

    def _of_groups(self, places: Ids, group: Ids) -> Floats:
        """(places, tokens) the logits of one group of each row, without tokens that may not come."""
        short, rows = self.short, self.rows[places]
        listed = short.groups[rows] == group[:, None]
        first = listed.argmax(axis=1) * short.tokens
        logits: Floats = short.logits[rows[:, None], first[:, None] + np.arange(short.tokens)]
        for place in np.flatnonzero(~listed.any(axis=1)).tolist():
            logits[place] = short.sums.fetch(int(rows[place]), int(group[place]))
        ends, offsets = np.divmod(self.eog_ids, short.tokens)
        which, end = np.nonzero((ends == group[:, None]) & self.silenced[places, None])
        logits[which, offsets[end]] = -np.inf
        return logits
