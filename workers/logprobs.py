"""The log-probabilities of tokens, from rows of logits.

ln p(token) = logit - ln(sum of exp over the row). Differences to the largest logit and their exponentials are taken in
32 bits, the sum in 64, so a result is off by some 1e-7, far less than what llama.cpp's kernels round. Rows must be the
model's own: before bias, penalties, temperature or a silenced end of generation.

The likeliest tokens of a row are found without sorting it: its tokens are dealt out to columns, of which k have a peak
that reaches the k-th largest peak, so that the k likeliest tokens are among those that reach it.

`Noted` keeps what is asked about a run of tokens until it is packed for the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduling.logprobs import TokenLogprobs
from workers.choosing import STRIPS
from workers.sampling import NOT_FINITE, Doubles, Floats, Ids, Tokens
from workers.text import PieceTable
from workers.threads import ALONE, Threads


@dataclass(frozen=True, slots=True)
class Likely:
    """What was found in some rows: one line each, `k` columns for the likeliest tokens, likeliest first.

    log_sum: (n,) ln(sum of exp), NaN for a row that holds NaN or whose largest logit is infinite. best: (n,) the first
    of the largest logits. ids, logprobs: (n, k).
    """

    rows: Ids
    log_sum: Doubles
    best: Tokens
    ids: Tokens
    logprobs: Floats

    @property
    def damaged(self) -> npt.NDArray[np.bool_]:
        return np.isnan(self.log_sum)

    def of(self, logits: Floats, tokens: npt.ArrayLike, places: npt.ArrayLike | None = None) -> Doubles:
        """ln p of `tokens`, one for each line, or for each of `places` among the lines."""
        where = np.arange(self.rows.size) if places is None else np.asarray(places)
        found: Doubles = logits[self.rows[where], np.asarray(tokens)].astype(np.float64) - self.log_sum[where]
        return found


def likely(logits: Floats, rows: Ids, k: int, threads: Threads = ALONE) -> Likely:
    """Look at each of `rows` once. `k`: how many of the likeliest tokens are wanted."""
    k = min(k, logits.shape[1])
    found = Likely(
        rows,
        np.empty(rows.size),
        np.empty(rows.size, np.int32),
        np.empty((rows.size, k), np.int32),
        np.empty((rows.size, k), np.float32),
    )

    def part(first: int, last: int) -> None:
        scratch = np.empty(logits.shape[1], np.float32)
        with np.errstate(all="ignore"):
            for place in range(first, last):
                _look(logits[rows[place]], place, found, scratch)

    threads.spread(part, rows.size)
    return found


def _look(row: Floats, place: int, found: Likely, scratch: Floats) -> None:
    best = int(row.argmax())
    top = row[best]
    found.best[place] = best
    # NaN is what argmax finds first.
    if not np.isfinite(top):
        found.log_sum[place] = np.nan
        return
    np.subtract(row, top, out=scratch)
    np.exp(scratch, out=scratch)
    log_sum = found.log_sum[place] = float(top) + float(np.log(scratch.sum(dtype=np.float64)))
    k = found.ids.shape[1]
    if k:
        ids = np.array([best]) if k == 1 else _largest(row, k)
        found.ids[place] = ids
        found.logprobs[place] = row[ids].astype(np.float64) - log_sum


def _largest(row: Floats, k: int) -> Ids:
    """The `k` largest of a row, largest first, ties by smaller token."""
    columns = row.size // STRIPS
    peaks = row[: columns * STRIPS].reshape(STRIPS, columns).max(axis=0) if columns > k else row
    floor = np.partition(peaks, peaks.size - k)[peaks.size - k]
    ids = np.flatnonzero(row >= floor)
    order = np.argsort(-row[ids], kind="stable")[:k]
    return ids[order]


class Noted:
    """What is known of up to `count` tokens in a row: with `k` alternatives each, NaN where nothing is.

    logprob: (count,). best: (count,), the likeliest token at each place. ids, logprobs: (count, k).
    """

    __slots__ = ("best", "ids", "logprob", "logprobs")

    def __init__(self, count: int, k: int) -> None:
        self.logprob: Doubles = np.full(count, np.nan)
        self.best: Tokens = np.zeros(count, np.int32)
        self.ids: Tokens = np.zeros((count, k), np.int32)
        self.logprobs: Floats = np.zeros((count, k), np.float32)

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    def put(self, first: int, logprob: Doubles, found: Likely, lines: slice) -> None:
        """From place `first` on: tokens whose log-probabilities are given, of `lines` of what was found."""
        last, k = first + logprob.size, self.k
        self.logprob[first:last] = logprob
        self.best[first:last] = found.best[lines]
        self.ids[first:last] = found.ids[lines, :k]
        self.logprobs[first:last] = found.logprobs[lines, :k]

    def copy(self, other: Noted, count: int) -> None:
        """The first `count` places as in `other`, which has as many alternatives or more."""
        for name in ("logprob", "best"):
            getattr(self, name)[:count] = getattr(other, name)[:count]
        for name in ("ids", "logprobs"):
            getattr(self, name)[:count] = getattr(other, name)[:count, : self.k]

    def pack(self, tokens: Tokens, pieces: PieceTable) -> TokenLogprobs:
        """What is known of `tokens`, the first ones, for the rank."""
        count = tokens.size
        known = ~np.isnan(self.logprob[:count])
        everyone = np.concatenate([tokens, self.ids[:count].ravel()])
        distinct, places = np.unique(everyone, return_inverse=True)
        places = places.astype(np.int32)
        shown = [pieces.shown(token) for token in distinct.tolist()]
        return TokenLogprobs(
            texts=[text.encode() if isinstance(text, str) else text for text in shown],
            names=[place for place, text in enumerate(shown) if isinstance(text, str)],
            tokens=places[:count].tobytes(),
            logprobs=self.logprob[:count].astype(np.float32).tobytes(),
            alternatives=self.k,
            top_tokens=places[count:].tobytes(),
            top_logprobs=self.logprobs[:count].tobytes(),
            total=float(self.logprob[:count][known].sum()),
            greedy=bool((self.best[:count] == tokens)[known].all()),
        )


@dataclass(frozen=True, slots=True)
class Asker:
    """Who wants to know the log-probability of the token that is about to be chosen: the `place`-th of the step, and
    the `number`-th of its answer."""

    place: int
    noted: Noted
    number: int


class Look:
    """The rows of `askers` as they were before tokens were chosen from them, which changes them in place.

    `rows`: places in `logits`, one for each token of the step.
    """

    __slots__ = ("_askers", "_found", "_raw")

    def __init__(self, logits: Floats, rows: Ids, askers: list[Asker], threads: Threads = ALONE) -> None:
        self._askers = askers
        self._raw: Floats = logits[rows[[asker.place for asker in askers]]]
        k = max(asker.noted.k for asker in askers)
        self._found = likely(self._raw, np.arange(len(askers)), k, threads)

    def note(self, tokens: Tokens) -> None:
        """`tokens` were chosen, one for each of the step's rows. Damaged rows have none."""
        chosen = tokens[[asker.place for asker in self._askers]]
        logprobs = self._found.of(self._raw, chosen)
        for line, asker in enumerate(self._askers):
            if chosen[line] != NOT_FINITE:
                asker.noted.put(asker.number, logprobs[line : line + 1], self._found, slice(line, line + 1))
