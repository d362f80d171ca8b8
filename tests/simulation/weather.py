"""What goes wrong in a seed, and how often. Quiet seeds and stormy ones both occur.

Everything is drawn when the seed begins, from a stream of random numbers of its own, so that a change in one place
leaves the others as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

RATES_PER_S: dict[str, tuple[float, float]] = {
    "engine killed": (0.03, 0.6),
    "engine hangs": (0.03, 0.5),
    "engine stalls in part": (0.03, 0.5),
    "engine slows down": (0.03, 0.3),
    "rank killed": (0.01, 0.2),
    "rank vanishes": (0.01, 0.1),
    "rank stopped": (0.03, 0.5),
    "rank raises": (0.01, 0.15),
    "rank 0 killed": (0.02, 0.3),
    "rank 0 stopped": (0.03, 0.3),
    "machine loses power": (0.01, 0.2),
    "link cut": (0.02, 0.3),
    "disk fails for a while": (0.02, 0.3),
    "disk fails for good": (0.01, 0.1),
    "disk slows down": (0.02, 0.3),
    "asked to stop": (0.01, 0.15),
    "signal": (0.01, 0.2),
    "clock jumps": (0.02, 0.3),
}
"""Of each kind of fault that comes at any time: how often, at least and at most, in a seed that has it."""

CHANCES: dict[str, float] = {
    "message delayed": 0.3,
    "message duplicated": 0.2,
    "engine refuses to start": 0.3,
    "engine fails while it loads": 0.5,
    "crash at a write": 0.8,
    "disk error at a write": 0.8,
    "rank dies in a collective": 0.6,
    "time limit": 0.4,
}
"""Of each kind of fault that comes with something else: most that its chance can be, each time."""


@dataclass(frozen=True)
class Weather:
    """One seed's. `rates_per_s` and `chances` by kind; a kind that is not there does not happen."""

    calm_at_s: float
    """From here on nothing new goes wrong, and what can heal has healed."""
    rates_per_s: dict[str, float] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)
    latency_s: float = 1e-3
    late_s: float = 1.0
    """How late a message is that is delayed, at most."""
    slow_ranks: frozenset[int] = frozenset()

    def chance(self, kind: str) -> float:
        return self.chances.get(kind, 0.0)


def _a_few_often(dice: Random) -> tuple[dict[str, float], dict[str, float]]:
    kinds = dice.sample([*RATES_PER_S, *CHANCES], dice.randint(1, 6))
    rates = {kind: RATES_PER_S[kind][1] for kind in kinds if kind in RATES_PER_S}
    return rates, {kind: CHANCES[kind] for kind in kinds if kind in CHANCES}


def _many_now_and_then(dice: Random) -> tuple[dict[str, float], dict[str, float]]:
    stormy = dice.choice((0.1, 0.25, 0.4, 0.6))
    rates = {
        kind: math.exp(dice.uniform(math.log(least), math.log(most)))
        for kind, (least, most) in RATES_PER_S.items()
        if dice.random() < stormy
    }
    return rates, {kind: most * dice.random() for kind, most in CHANCES.items() if dice.random() < stormy}


def draw(dice: Random, ranks: int) -> Weather:
    """The weather of a job of `ranks` ranks."""
    rates: dict[str, float] = {}
    chances: dict[str, float] = {}
    style = dice.random()
    if 0.1 < style < 0.55:
        rates, chances = _a_few_often(dice)
    elif style >= 0.55:
        rates, chances = _many_now_and_then(dice)
    return Weather(
        calm_at_s=dice.uniform(2.0, 25.0),
        rates_per_s=rates,
        chances=chances,
        latency_s=math.exp(dice.uniform(math.log(1e-4), math.log(2e-2))),
        late_s=dice.choice((0.2, 1.0, 4.0, 4.0)),
        slow_ranks=frozenset(rank for rank in range(ranks) if dice.random() < 0.15),
    )
