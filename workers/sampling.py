"""What a request's sampling parameters mean, and the numbers that draws are made with.

Order of work, as in llama.cpp's default chain: logit bias, penalties, top_k, typical_p, top_p, min_p, temperature,
then one draw. Each filter works on what the one before it left, with probabilities made anew from that.
Temperature 0 takes the largest logit after bias and penalties. Ties go to the smaller token id.

Penalties look at the last `repeat_last_n` tokens of prompt and output together, for all three kinds, as llama.cpp
does; OpenAI describes presence and frequency over the output alone.

The draw uses one number from a counter-based generator (SplitMix64) keyed by seed and choice and counted by the
output token: the same seed, step and logits give the same token, whatever runs beside it. It falls on the tokens
that are left, largest first. Where a temperature is all there is, every token is left: then it falls on groups of
neighbouring tokens, by their ids, and a second number on the tokens of one (`workers.groups`).

Here is what a row needs, one by one; `workers.choosing` chooses for all rows of a step at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduling.requests import Sampling

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

NOT_FINITE = -1
"""Stands for a token where a row's largest logit is NaN or infinite."""

LOGIT_BIAS_LIMIT = 100.0

TEMPERATURE_MIN = 1e-6
"""Below it a temperature means 0: dividing by it would leave the range of 32 bits."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters 64 bits."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit key of one choice's random numbers. Choice 0 of many is what the seed alone would give."""
    return _mix64((_mix64((seed + _GOLDEN) & _MASK) + choice * 0xD1B54A32D192ED03) & _MASK)


def uniforms(keys: Keys, steps: npt.NDArray[np.int64]) -> Doubles:
    """The numbers in [0, 1) that output tokens `steps` (from 0) of these keys draw with: SplitMix64, in arrays."""
    value = keys + (steps.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    value ^= value >> np.uint64(31)
    numbers: Doubles = (value >> np.uint64(11)) * 2.0**-53
    return numbers


class RowSampler:
    """One choice's way of choosing, compiled from its request. Holds no state.

    key: of its random numbers. window: how many of the last tokens penalties look at; 0 without penalties.
    penalties: repeat, frequency, presence. numbers: temperature, top_p, ln(min_p), typical_p, top_k.
    """

    __slots__ = ("plain", "listable", "whole_at", "key", "window", "penalties", "bias_ids", "bias", "numbers")

    def __init__(self, sampling: Sampling, seed: int, choice: int, vocab_tokens: int) -> None:
        s = sampling
        self.key = stream_key(seed, choice)
        penalised = s.repeat_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0
        self.window = s.repeat_last_n if penalised else 0
        self.penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        bias = {token: value for token, value in s.logit_bias.items() if 0 <= token < vocab_tokens}
        self.bias_ids: Ids = np.array(list(bias), np.int64)
        self.bias: Floats = np.clip(np.array(list(bias.values()), np.float32), -LOGIT_BIAS_LIMIT, LOGIT_BIAS_LIMIT)
        greedy = s.temperature < TEMPERATURE_MIN
        log_min_p = math.log(s.min_p) if s.min_p > 0.0 else -math.inf
        self.numbers = (
            (1.0, 1.0, -math.inf, 1.0, 1.0)
            if greedy
            else (s.temperature, s.top_p, log_min_p, s.typical_p, float(s.top_k))
        )
        self.plain = greedy and self.window == 0 and self.bias_ids.size == 0
        """Whether this is argmax over the untouched row."""
        untouched = self.window == 0 and self.bias_ids.size == 0
        self.listable = untouched and not greedy and s.typical_p >= 1.0
        """Whether what a device leaves of the untouched row is enough, most of the time."""
        whole = s.top_k <= 0 and s.top_p >= 1.0 and s.min_p <= 0.0
        self.whole_at = s.temperature if self.listable and whole else 0.0
        """The temperature, if it is all that matters; else 0."""


def penalise(logits: Floats, rows: Ids, recent: Sequence[Tokens], penalties: Doubles) -> None:
    """Repeat, frequency and presence penalties (columns of `penalties`) for the tokens in `recent`, in place.

    `rows`: places in `logits`, one for each item of `recent` and line of `penalties`. As llama.cpp: a repeated
    token's logit is divided by the repeat penalty if positive, else multiplied by it; then
    count * frequency + presence is taken off.
    """
    vocab = logits.shape[1]
    lines = np.repeat(np.arange(rows.size), [tokens.size for tokens in recent])
    found, counts = np.unique(lines * vocab + np.concatenate(recent), return_counts=True)
    line = found // vocab
    row, token = rows[line], found - line * vocab
    values = logits[row, token]
    repeat, frequency, presence = penalties[line].T
    factor = repeat.astype(np.float32)
    values = np.where(values <= 0, values * factor, values / factor)
    values -= (counts * frequency + presence).astype(np.float32)
    logits[row, token] = values


def typical(logits: Floats, typical_p: float) -> Ids:
    """Places kept by locally typical sampling (Meister et al. 2022), in ascending order.

    Those whose surprise -ln p is nearest to the entropy, until their sum is over `typical_p`.
    `logits` are sorted, largest first.
    """
    weights = np.exp(logits.astype(np.float64) - float(logits[0]))
    p = weights / weights.sum()
    surprise = -np.log(np.maximum(p, np.finfo(np.float64).tiny))
    entropy = float((p * surprise).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    over = np.flatnonzero(np.cumsum(p[order]) > typical_p)
    count = int(over[0]) + 1 if over.size else order.size
    kept: Ids = np.sort(order[:count])
    return kept
