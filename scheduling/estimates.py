"""How long a request will be, before it has run: learnt from those that have.

The output of a request is guessed as its limit times the mean share of the limit that finished requests have
used. That share starts from a prior worth a few requests, so that the first answers move it without throwing it
about. Of a request that has run for a while the mean says nothing any more: there the `Tail` of the shares that were
seen last does. Prompts are not learnt here: a request arrives with an estimate of its prompt, from its size in bytes
alone (`estimate_tokens`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

PRIOR_WEIGHT = 8.0
"""The prior counts as this many finished requests of the default limit."""

PRIOR_OUTPUT_SHARE = 0.6
"""The share of its limit that a request uses, before any has been seen."""


TAIL_REQUESTS = 256
"""The tail is that of so many requests that ended last."""


class LengthEstimator:
    """A running mean over everything observed. `default_limit` stands in for requests without a limit."""

    __slots__ = ("default_limit", "_limit_sum", "_output_sum", "_shares")

    def __init__(self, default_limit: int = 512) -> None:
        self.default_limit = default_limit
        self._limit_sum = PRIOR_WEIGHT * default_limit
        self._output_sum = PRIOR_WEIGHT * default_limit * PRIOR_OUTPUT_SHARE
        self._shares: deque[float] = deque(maxlen=TAIL_REQUESTS)

    def output_tokens(self, limit: int | None) -> float:
        """Expected output of a request with this limit, in tokens; at least 1."""
        return max(1.0, self.ceiling(limit) * (self._output_sum / self._limit_sum))

    def observe(self, limit: int | None, output_tokens: int) -> None:
        """A request with this limit has ended after `output_tokens`."""
        ceiling = self.ceiling(limit)
        self._limit_sum += ceiling
        self._output_sum += output_tokens
        if ceiling:
            self._shares.append(output_tokens / ceiling)

    def ceiling(self, limit: int | None) -> int:
        """Most output tokens of a choice of a request with this limit."""
        return self.default_limit if limit is None else limit

    def tail(self) -> Tail:
        """Of the shares of their limits that requests have used lately."""
        return Tail(self._shares or [PRIOR_OUTPUT_SHARE])


class Tail:
    """How long what goes on already will be, in shares of a limit: from a sample of lengths."""

    def __init__(self, shares: Iterable[float]) -> None:
        self._shares = sorted(shares)
        self._sums = [0.0, *accumulate(self._shares)]

    def beyond(self, share: float) -> tuple[int, float]:
        """How many of the sample are longer than `share`, and their sum."""
        first = bisect_right(self._shares, share)
        return len(self._shares) - first, self._sums[-1] - self._sums[first]

    @staticmethod
    def unheard_of(share: float) -> float:
        """What becomes of a share that nothing in the sample exceeds: as much again, but not beyond the limit."""
        return max(share, min(2 * share, 1.0))


def estimate_tokens(line: bytes | int) -> int:
    """About how many tokens the prompt of a line has, from its length in bytes alone: a quarter, at least 1."""
    length = line if isinstance(line, int) else len(line)
    return max(1, length // 4)
