"""How long a request will be, before it has run: learnt from those that have.

The output of a request is guessed as its limit times the mean share of the limit that finished requests have
used. That share starts from a prior worth a few requests, so that the first answers move it without throwing it
about. Prompts are not learnt here: a request arrives with an estimate of its prompt, from its size in bytes alone
(`scheduling.requests.estimate_tokens`).
"""

from __future__ import annotations

PRIOR_WEIGHT = 8.0
"""The prior counts as this many finished requests of the default limit."""

PRIOR_OUTPUT_SHARE = 0.6
"""The share of its limit that a request uses, before any has been seen."""


class LengthEstimator:
    """A running mean over everything observed. `default_limit` stands in for requests without a limit."""

    __slots__ = ("default_limit", "_limit_sum", "_output_sum")

    def __init__(self, default_limit: int = 512) -> None:
        self.default_limit = default_limit
        self._limit_sum = PRIOR_WEIGHT * default_limit
        self._output_sum = PRIOR_WEIGHT * default_limit * PRIOR_OUTPUT_SHARE

    def output_tokens(self, limit: int | None) -> float:
        """Expected output of a request with this limit, in tokens; at least 1."""
        ceiling = self.default_limit if limit is None else limit
        return max(1.0, ceiling * (self._output_sum / self._limit_sum))

    def observe(self, limit: int | None, output_tokens: int) -> None:
        """A request with this limit has ended after `output_tokens`."""
        self._limit_sum += self.default_limit if limit is None else limit
        self._output_sum += output_tokens
