"""Seeds of requests that give none, from the run's seed and the request's index alone."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, made odd: the step of splitmix64."""


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_seed(run_seed: int, index: int) -> int:
    """The seed of request `index` of a run, where the request gives none: 63 bits, 0 <= seed < 2**63.

    It is the index-th output of a splitmix64 whose state starts at mix(run_seed), without its lowest bit. It
    depends on nothing else, so retries, stealing, resuming and the number of ranks leave it as it is.
    """
    return _mix((_mix(run_seed & _MASK) + (index + 1) * _GOLDEN) & _MASK) >> 1
