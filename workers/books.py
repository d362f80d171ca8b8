"""What a step tells the meter and the pace: not when it is over, but while the device computes the next one.

Between two passes a device stands still. Where decoding does not come back before it has computed (on a CPU, also with
some layers on a GPU), nothing would be gained, and a step be told of a whole pass too late: there it is told at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from workers.meter import Meter
from workers.pace import Pace
from workers.speculation import Check


class Made(NamedTuple):
    """What came of a step, and when its parts ended. `output_tokens`: `accepted_tokens` among them were drafted."""

    decoded_s: float
    chosen_s: float
    prompt_tokens: int
    output_tokens: int
    accepted_tokens: int
    gaps_s: npt.NDArray[np.float64]


class Step(NamedTuple):
    """A step that is over. `since_s`: the end of the one before. `used`, `decoding`: slots. `check`: of drafts."""

    since_s: float
    began_s: float
    ended_s: float
    used: int
    decoding: int
    cached_tokens: int
    check: Check | None
    made: Made


class Books:
    """Of one context. `at_once`: steps are told as soon as they are over."""

    def __init__(self, meter: Meter, pace: Pace, *, at_once: bool) -> None:
        self._meter = meter
        self._pace = pace
        self._at_once = at_once
        self._untold: Step | None = None

    def enter(self, step: Step) -> None:
        """A step is over. The one before must have been told."""
        self._untold = step
        if self._at_once:
            self.tell()

    def tell(self) -> None:
        """Of the last step, if that has not been done."""
        step, self._untold = self._untold, None
        if step is None:
            return
        took_s, made = step.ended_s - step.since_s, step.made
        self._meter.step(
            step.ended_s,
            prompt_tokens=made.prompt_tokens,
            cached_tokens=step.cached_tokens,
            output_tokens=made.output_tokens,
            drafted_tokens=step.check.drafted if step.check is not None else 0,
            accepted_tokens=made.accepted_tokens,
            slot_s=step.used * took_s,
            decode_s=made.decoded_s - step.began_s,
            sample_s=made.chosen_s - made.decoded_s,
            gaps_s=made.gaps_s,
        )
        if step.check is None:
            self._pace.observe(step.decoding, made.prompt_tokens, took_s)
