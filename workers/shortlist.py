"""What a device leaves of rows of logits: enough to choose from them as from the whole, nearly always.

A row is cut into groups of neighbouring tokens. The groups with the largest logits are listed, with all their tokens:
no token of another group has a logit over the *bound*, the smallest of the listed groups' largest. Together with Z, the
sum of exp(logit - top) over all tokens, this says which tokens top_k, top_p and min_p keep, if the last one kept is not
under the bound. Where it is, as with flat logits, the row is *undecided* and needs all its logits.

So the choice is the one that is made from all logits (`workers.choosing`); Z is summed in another order, however, and
with tokens that may not come (`ignore_eos`) and are not listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from workers.choosing import Flags, Threads, choose_bounded
from workers.sampling import NOT_FINITE, Doubles, Floats, Ids, RowSampler, Tokens

Ints = npt.NDArray[np.int32]

GROUPS = 64
"""Groups that are listed. So many tokens are certainly among the largest: enough for the usual top_k of 40."""
LEFT_MIN = 0.01
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
    """Lists of all rows of a pass. groups: (rows, listed), ascending. logits: (rows, listed, tokens) those of their
    tokens. bound, top, total (Z): (rows,). vocab_tokens: of the whole."""

    groups: Ints
    logits: Floats
    bound: Floats
    top: Floats
    total: Doubles
    vocab_tokens: int

    @property
    def ids(self) -> Ids:
        """(rows, listed * tokens) which tokens these are."""
        rows, _, tokens = self.logits.shape
        ids: Ids = (self.groups[:, :, None].astype(np.int64) * tokens + np.arange(tokens)).reshape(rows, -1)
        return ids

    def choose(
        self, rows: Ids, samplers: Sequence[RowSampler], steps: Ids, silenced: Flags, eog_ids: Ids, threads: Threads
    ) -> tuple[Tokens, Flags]:
        """The token of each of `rows` (ascending), and which of them are undecided.

        `samplers`, `steps` and `silenced` (tokens `eog_ids` may not come) are one for each of `rows`. Logits are
        changed in place.
        """
        total, bound = self.total[rows], self.bound[rows]
        above_bound = np.full(rows.size, self.groups.shape[1])
        quiet = np.flatnonzero(silenced)
        if quiet.size and eog_ids.size:
            self._silence(rows[quiet], eog_ids, (quiet, total, bound, above_bound))
        places, undecided = choose_bounded(
            self.logits.reshape(len(self.logits), -1), rows, samplers, steps, total=total, bound=bound,
            above_bound=above_bound, vocab=self.vocab_tokens, threads=threads,
        )  # fmt: skip
        group, token = np.divmod(np.maximum(places, 0), self.logits.shape[2])
        ids = self.groups[rows, group] * self.logits.shape[2] + token
        return np.where(places >= 0, ids, NOT_FINITE).astype(np.int32), undecided

    def _silence(self, lines: Ids, eog_ids: Ids, known: tuple[Ids, Doubles, Floats, Ids]) -> None:
        """Take `eog_ids` out of `lines`, and out of what is `known`: which places those are in total, bound, and how
        many are certainly above it."""
        places, total, bound, above_bound = known
        group, token = np.divmod(eog_ids, self.logits.shape[2])
        which, listed, end = np.nonzero(self.groups[lines][:, :, None] == group)
        line, token = lines[which], token[end]
        weights = np.zeros(lines.size)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add.at(weights, which, np.exp((self.logits[line, listed, token] - self.top[line]).astype(np.float64)))
            self.logits[line, listed, token] = -np.inf
            top = self.logits[lines].max(axis=(1, 2))
            left = total[places] - weights
            # Of what is nearly all taken away nothing exact is left.
            bound[places[left < LEFT_MIN * total[places]]] = np.inf
            total[places] = left * np.exp((self.top[lines] - top).astype(np.float64))
        above_bound[places] -= np.bincount(which, minlength=lines.size)
