"""How the next token is chosen from a row of logits.

Order of work, as in llama.cpp's default chain: logit bias, penalties, top_k, typical_p, top_p, min_p, temperature,
then one draw. Each filter works on what the one before it left, with probabilities made anew from that.
Temperature 0 takes the largest logit after bias and penalties.

Penalties look at the last `repeat_last_n` tokens of prompt and output together (-1: all of them), for all three
kinds, as llama.cpp does; OpenAI describes presence and frequency over the output alone.

The draw uses one number from a counter-based generator (SplitMix64) keyed by seed and choice and counted by the
output token: the same seed, step and logits give the same token, whatever runs beside it.

Speed: a vocabulary of 128,000 is never sorted unless a filter needs all of it. top_k is a partition; for top_p and
min_p a threshold is known beforehand that certainly keeps every token the filters could keep, and only what
passes it is sorted. Ties go to the smaller token id.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from scheduling.requests import Sampling

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

NOT_FINITE = -1
"""Returned instead of a token when a row's largest logit is NaN or infinite."""

LOGIT_BIAS_LIMIT = 100.0

BLOCK = 256
"""Tokens that are summed together first when a token is drawn from the whole vocabulary."""

TEMPERATURE_MIN = 1e-6
"""Below it a temperature means 0: dividing by it would leave the range of 32 bits."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit key of one choice's random numbers. Choice 0 of many is what the seed alone would give."""
    return _mix64((_mix64((seed + _GOLDEN) & _MASK) + choice * 0xD1B54A32D192ED03) & _MASK)


def uniform(key: int, step: int) -> float:
    """The number in [0, 1) that output token `step` (from 0) of this key draws with."""
    return (_mix64((key + (step + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


class RowSampler:
    """One choice's way of choosing, compiled from its request. Holds no state: `choose` may be repeated."""

    __slots__ = ("greedy", "window", "_bias_ids", "_bias", "_banned", "_key", "_log_min_p", "_s")

    def __init__(self, sampling: Sampling, seed: int, choice: int, banned: Ids, vocab_tokens: int) -> None:
        """`banned` tokens are never chosen (end of generation under ignore_eos); may be empty."""
        self._s = sampling
        self._banned = banned
        self._key = stream_key(seed, choice)
        self.greedy = sampling.temperature < TEMPERATURE_MIN
        penalised = (
            sampling.repeat_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        self.window = sampling.repeat_last_n if penalised else 0
        bias = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < vocab_tokens}
        self._bias_ids = np.array(list(bias), np.int64)
        self._bias = np.clip(np.array(list(bias.values()), np.float32), -LOGIT_BIAS_LIMIT, LOGIT_BIAS_LIMIT)
        self._log_min_p = math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf

    @property
    def plain(self) -> bool:
        """Whether this is argmax over the untouched row (banned tokens aside)."""
        return self.greedy and self.window == 0 and self._bias_ids.size == 0

    def choose(self, row: Floats, history: Tokens, step: int) -> int:
        """The token for output number `step` (from 0), or `NOT_FINITE`.

        `row`: logits of the whole vocabulary, changed in place by bias and penalties. `history`: tokens of
        prompt and output so far.
        """
        self._adjust(row, history)
        best = int(row.argmax())
        top = float(row[best])
        if not math.isfinite(top):
            return NOT_FINITE
        if self.greedy:
            return best
        ids, logits = self._candidates(row, top)
        if ids is None:
            return draw_from_all(row, top, self._s.temperature, uniform(self._key, step))
        if ids.size == 1:
            return int(ids[0])
        weights = np.exp((logits.astype(np.float64) - top) / self._s.temperature)
        return int(ids[draw(weights, uniform(self._key, step))])

    def _adjust(self, row: Floats, history: Tokens) -> None:
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if self.window:
            recent = history if self.window < 0 else history[-self.window :]
            penalise(row, recent, self._s)
        if self._banned.size:
            row[self._banned] = -np.inf

    def _candidates(self, row: Floats, top: float) -> tuple[Ids | None, Floats]:
        """Tokens that the filters leave, with their logits. Ids None: all tokens, in the row's order."""
        s = self._s
        by_k = 0 < s.top_k < row.size
        if not by_k and s.typical_p >= 1.0:
            return self._by_threshold(row, top)
        ids = _largest(row, s.top_k) if by_k else _sorted(row, np.flatnonzero(row > -np.inf))
        logits = row[ids]
        if s.typical_p < 1.0:
            kept = typical(logits, s.typical_p)
            ids, logits = ids[kept], logits[kept]
        count = logits.size
        if s.top_p < 1.0:
            weights = _weights(logits, float(logits[0]))
            count = _nucleus(weights, s.top_p, float(weights.sum()))
        if s.min_p > 0.0:
            count = min(count, max(1, int(np.count_nonzero(logits >= float(logits[0]) + self._log_min_p))))
        return ids[:count], logits[:count]

    def _by_threshold(self, row: Floats, top: float) -> tuple[Ids | None, Floats]:
        """top_p and min_p over the whole vocabulary: both keep a beginning of the sorted row.

        min_p keeps logits of at least top + ln(min_p). With Z the sum of exp(logit - top), tokens under
        top + ln((1 - top_p) * Z / V) weigh less than (1 - top_p) * Z together, so top_p is reached above it.
        """
        s = self._s
        floor = top + self._log_min_p
        if s.top_p >= 1.0:
            if s.min_p <= 0.0:
                return None, row
            ids = np.flatnonzero(row >= floor)
            return ids, row[ids]
        if s.min_p > 0.0:
            ids = np.flatnonzero(row >= floor)
            if ids.size <= 1:
                return np.array([int(row.argmax())]), np.array([top], np.float32)
        weights = np.exp(row - np.float32(top))
        total = float(weights.sum(dtype=np.float64))
        ids = _sorted(row, self._nucleus_ids(row, weights, top, total, floor))
        logits = row[ids]
        count = _nucleus(_weights(logits, top), s.top_p, total)
        return ids[:count], logits[:count]

    def _nucleus_ids(self, row: Floats, weights: Floats, top: float, total: float, min_p_floor: float) -> Ids:
        """Some tokens that hold all that top_p and min_p keep. A few guesses first: the certain floor is low."""
        top_p = self._s.top_p
        share = (1.0 - top_p) * total / row.size
        # Margins, here and below: the weights have 32 bits.
        certain = top + math.log(share) - 1e-3 if share > 0.0 else -math.inf
        for guess in (top - 3.0, top - 6.0):
            if guess <= max(min_p_floor, certain):
                break
            ids = np.flatnonzero(row >= guess)
            if float(weights[ids].sum(dtype=np.float64)) >= top_p * total * (1.0 + 1e-4):
                return ids
        return np.flatnonzero(row >= max(min_p_floor, certain))


def draw_from_all(row: Floats, top: float, temperature: float, number: float) -> int:
    """The token that `number` in [0, 1) falls on among all of `row`: first a block of tokens, then one of it."""
    weights = np.exp((row - np.float32(top)) * np.float32(1.0 / temperature))
    blocks = np.add.reduceat(weights, np.arange(0, row.size, BLOCK), dtype=np.float64)
    edges = np.cumsum(blocks)
    target = number * edges[-1]
    # Rounding can put the target a hair behind the end; the last with any weight is meant then.
    block = min(int(np.searchsorted(edges, target, side="right")), _last_weight(blocks))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    place = int(np.searchsorted(inside, target - (edges[block] - blocks[block]), side="right"))
    return block * BLOCK + min(place, _last_weight(np.diff(inside, prepend=0.0)))


def _last_weight(weights: Doubles) -> int:
    return int(np.flatnonzero(weights)[-1])


def draw(weights: Doubles, number: float) -> int:
    """The place that `number` in [0, 1) falls on when [0, 1) is divided in proportion to `weights`."""
    edges = np.cumsum(weights)
    return min(int(np.searchsorted(edges, number * edges[-1], side="right")), weights.size - 1)


def penalise(row: Floats, recent: Tokens, sampling: Sampling) -> None:
    """Repeat, frequency and presence penalties for the tokens in `recent`, in place.

    As llama.cpp: a repeated token's logit is divided by `repeat_penalty` if positive, else multiplied by it; then
    count * frequency_penalty + presence_penalty is taken off.
    """
    tokens, counts = np.unique(recent, return_counts=True)
    if not tokens.size:
        return
    logits = row[tokens]
    factor = np.float32(sampling.repeat_penalty)
    logits = np.where(logits <= 0, logits * factor, logits / factor)
    logits -= (counts * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
    row[tokens] = logits


def typical(logits: Floats, typical_p: float) -> Ids:
    """Places kept by locally typical sampling (Meister et al. 2022), in ascending order.

    Those whose surprise -ln p is nearest to the entropy, until their sum is over `typical_p`.
    `logits` are sorted, largest first.
    """
    weights = _weights(logits, float(logits[0]))
    p = weights / weights.sum()
    surprise = -np.log(np.maximum(p, np.finfo(np.float64).tiny))
    entropy = float((p * surprise).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    over = np.flatnonzero(np.cumsum(p[order]) > typical_p)
    count = int(over[0]) + 1 if over.size else order.size
    kept: Ids = np.sort(order[:count])
    return kept


def _weights(logits: Floats, top: float) -> Doubles:
    weights: Doubles = np.exp(logits.astype(np.float64) - top)
    return weights


def _nucleus(weights: Doubles, top_p: float, total: float) -> int:
    """How many of the sorted weights reach the share `top_p` of `total`; all if none does, at least 1."""
    reached = np.flatnonzero(np.cumsum(weights) >= top_p * total)
    return int(reached[0]) + 1 if reached.size else int(weights.size)


def _sorted(row: Floats, ids: Ids) -> Ids:
    """`ids` (ascending) ordered by logit, largest first, ties by smaller id."""
    ordered: Ids = ids[np.argsort(-row[ids], kind="stable")]
    return ordered


def _largest(row: Floats, k: int) -> Ids:
    """The `k` largest, sorted, ties by smaller id."""
    kth = np.partition(row, row.size - k)[row.size - k]
    return _sorted(row, np.flatnonzero(row >= kth))[:k]
