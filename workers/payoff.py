"""What drafting tokens is likely to bring: how often drafts are right, and what passes with more rows cost.

Both are measured as they happen. Nothing is assumed of the hardware: a GPU reads its weights for sixteen rows in
hardly more time than for one, on most CPUs each row costs nearly as much as the first. Nor of the text: what repeats
its input accepts nearly all, a text made up freely nearly nothing. Only numbers are known here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PRIOR_TOKENS = 4.0
"""As many checked tokens count as much as what was known before them."""
FADE = 0.95
FADE_UNUSED = 0.98
"""What earlier counts are multiplied by when a draft has been checked, and when one was not thought worth it: so what
did not pay is tried again now and then."""
GAIN_MIN = 1.05
"""Drafting must promise so many times the tokens a second: what it goes by is measured, and never quite right."""
SAMPLES = 9
AGE_MAX = 500
"""A shape whose time was measured so many passes ago is measured anew."""
AGE_PLAIN_MAX = 50
"""A plain pass is, so much sooner: all others are compared with it, and how busy a machine is changes."""


@dataclass(slots=True)
class Tally:
    """Drafted tokens that were looked at, and how many of them were right. Older ones count less."""

    right: float = 0.0
    seen: float = 0.0

    def chance(self, prior: float) -> float:
        return (self.right + PRIOR_TOKENS * prior) / (self.seen + PRIOR_TOKENS)

    def add(self, right: int, seen: int) -> None:
        self.right = FADE * self.right + right
        self.seen = FADE * self.seen + seen

    def fade(self) -> None:
        self.right *= FADE_UNUSED
        self.seen *= FADE_UNUSED


class Odds:
    """How likely a drafted token is right if those before it were, for each kind of draft and each request. A request
    begins with what is true of all of them."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior`: for each kind of draft."""
        self._prior = tuple(prior)
        self._all = [Tally() for _ in prior]
        self._requests: dict[int, list[Tally]] = {}

    def chance(self, request: int, kind: int) -> float:
        return self._of(request)[kind].chance(self._all[kind].chance(self._prior[kind]))

    def checked(self, request: int, kind: int, right: int, drafted: int) -> None:
        """The first `right` of `drafted` tokens were right. Of those after the first wrong one nothing is known."""
        seen = right + (right < drafted)
        for tally in (self._of(request)[kind], self._all[kind]):
            tally.add(right, seen)

    def unused(self, request: int, kind: int) -> None:
        """There was a draft, and it was not worth a try."""
        for tally in (self._of(request)[kind], self._all[kind]):
            tally.fade()

    def keep(self, requests: Sequence[int]) -> None:
        """Forget all requests but these."""
        if len(self._requests) > len(requests):
            self._requests = {request: self._of(request) for request in requests}

    def _of(self, request: int) -> list[Tally]:
        tallies = self._requests.get(request)
        if tallies is None:
            tallies = self._requests[request] = [Tally() for _ in self._prior]
        return tallies


class PassTimes:
    """How long a pass takes, choosing tokens included, by the sequences in it and its *extra* rows: those beyond the
    one of each sequence that there would be without drafts. Medians, so that a pass that was held up changes nothing.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._times: dict[int, dict[int, deque[float]]] = {}
        self._measured: dict[tuple[int, int], int] = {}

    def add(self, sequences: int, extra: int, seconds: float) -> None:
        self._passes += 1
        shape = (sequences, extra)
        if self._passes - self._measured.get(shape, -AGE_MAX) >= AGE_MAX:
            # The first pass of a shape is no measure of the others: a GPU is told each kernel anew.
            self._times.setdefault(sequences, {})[extra] = deque(maxlen=SAMPLES)
        else:
            self._times[sequences][extra].append(seconds)
        self._measured[shape] = self._passes

    def known(self, sequences: int) -> list[tuple[int, float]]:
        """(extra rows, seconds) of what has been measured lately, fewest rows first."""
        return [
            (extra, sorted(times)[len(times) // 2])
            for extra, times in sorted(self._times.get(sequences, {}).items())
            if times and self._passes - self._measured[sequences, extra] < (AGE_MAX if extra else AGE_PLAIN_MAX)
        ]


def seconds_of(extra: int, known: list[tuple[int, float]]) -> float:
    """What a pass with `extra` rows takes: between two that are `known` in proportion, beyond them like the last."""
    place = bisect_left(known, (extra, 0.0))
    if place == len(known):
        return known[-1][1]
    above, seconds_above = known[place]
    if above == extra or place == 0:
        return seconds_above
    below, seconds_below = known[place - 1]
    return seconds_below + (seconds_above - seconds_below) * (extra - below) / (above - below)


def expected_tokens(chance: float, length: int) -> float:
    """Tokens that a sequence puts out in a pass with a draft of `length`: 1 + chance + chance^2 + ... (Leviathan et
    al. 2023, formula 1)."""
    return length + 1.0 if chance >= 1.0 else (1.0 - chance ** (length + 1)) / (1.0 - chance)


def best_length(
    lengths: Sequence[int],
    chances: Sequence[float],
    rooms: Sequence[int],
    extra_of: Callable[[int], int],
    known: list[tuple[int, float]],
    drafting_s: Callable[[int], float],
) -> int:
    """The length of draft, of `lengths` (ascending), that promises most tokens a second; 0 if that is none.

    `chances` and `rooms`: for each sequence how likely a drafted token is right, and how long its draft can be at
    most. `extra_of(length)`: the rows that it adds to the pass. `known`: see `PassTimes`. `drafting_s(length)`: what
    making the drafts takes. Of the lengths with more rows than were ever measured only the first is considered:
    it is taken to be as fast as what is known, so that it is tried, and then known.
    """
    if not known or known[0][0]:
        return 0  # A pass without drafts is to be measured first.
    best, best_rate = 0, GAIN_MIN * len(chances) / known[0][1]
    for length in lengths:
        extra = extra_of(length)
        tokens = sum(expected_tokens(chance, min(length, room)) for chance, room in zip(chances, rooms, strict=True))
        rate = tokens / (seconds_of(extra, known) + drafting_s(length))
        if rate > best_rate:
            best, best_rate = length, rate
        if extra > known[-1][0]:
            break
    return best
