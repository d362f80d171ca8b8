"""What a device leaves of rows of logits: enough to choose from them as from the whole, nearly always.

A row is cut into groups of neighbouring tokens. The groups with the largest logits are listed, with all their tokens:
no token of another group has a logit over the *bound*, the smallest of the listed groups' largest. Together with Z, the
sum of exp(logit - top) over all tokens, this says which tokens top_k, top_p and min_p keep, if the last one kept is not
under the bound, and which token is drawn with temperature alone, if that is not under it. Where it is, as with flat
logits, the row is *undecided* and needs all its logits.

Z is known nearly: a GPU sums with 32 bits, tokens that may not come (`ignore_eos`) and are not listed are in it, and at
another temperature than 1 what is not listed is known between bounds only. A row for which that could matter is
undecided, too. So the choice is the one that is made from all logits (`workers.choosing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from workers.choosing import MARGIN_SUM, Step
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
COUNTS = (range(1024, 4 * GROUPS - 1, -1), range(1025, 4097))
"""Numbers of groups, best first. Up to 1,024 a GPU sorts in one go; with few groups lists are long."""


def group_tokens(vocab_tokens: int) -> int:
    """Tokens in a group, all groups being equal; 0 if there is no number that is of use."""
    for count in chain(*COUNTS):
        if vocab_tokens % count == 0 and count < vocab_tokens:
            return vocab_tokens // count
    return 0


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
            quiet = np.flatnonzero(silenced)
            if quiet.size and eog_ids.size:
                step.silence(quiet, eog_ids)
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

    def silence(self, places: Ids, eog_ids: Ids) -> None:
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
        whole = np.flatnonzero(self.of.whole & np.isfinite(top))
        self._warm(whole[self.of.temperature[whole] != 1.0], top)
        finite = super().find_floors()
        self._lower_floors(whole[self.floor[whole] < self.bound[whole]], top)
        certain = self.of.by_k & (self.of.top_k <= self.above_bound) & np.isfinite(self.bound)
        self.floor[certain] = np.maximum(self.floor, self.bound)[certain]
        self.undecided = finite & ~(self.floor >= self.bound)
        self.floor[self.undecided] = np.nan
        return finite & ~self.undecided

    def _warm(self, places: Ids, top: Doubles) -> None:
        """Z of `places` at their temperatures: of what is listed exactly, of the tail from its sum at temperature 1."""
        if not places.size:
            return
        assert self.slack is not None
        below, scale = self._below(places, top), 1.0 / self.of.temperature[places]
        tail = np.maximum(0.0, self.total[places] - np.exp(below).sum(axis=1)) + self.slack[places]
        # None is over the bound: colder, a tail weighs no more than if all of it were there.
        tail *= np.exp(np.minimum(0.0, self.bound[places] - top[places])) ** (scale - 1.0)
        listed = np.exp(below * scale[:, None].astype(np.float32)).sum(axis=1)
        self.total[places] = listed + tail
        self.slack[places] = tail + ROUNDING * listed

    def _lower_floors(self, places: Ids, top: Doubles) -> None:
        """The bound is floor enough where all listed tokens that reach it weigh as much as is needed."""
        if not places.size:
            return
        below, bound = self._below(places, top), (self.bound[places] - top[places]).astype(np.float32)
        below[below < bound[:, None]] = -np.inf
        weights = np.exp(below / self.of.temperature[places, None].astype(np.float32)).sum(axis=1)
        enough = weights > self.of.number[places] * self.total[places] * (1.0 + MARGIN_SUM)
        self.floor[places[enough]] = self.bound[places[enough]]

    def _below(self, places: Ids, top: Doubles) -> Floats:
        """(places, listed tokens) how much less than the largest logit theirs are: at most 0."""
        listed = self.short.listed_logits[self.rows[places]]
        listed -= top[places, None].astype(np.float32)
        return listed

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
        """Rows with too many candidates for a table."""
        self.undecided[places] = True
