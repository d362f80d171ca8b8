"""How the time between the last answer and the exit is spent, where it is bounded.

Metrics take as long as there are answers, and a run may have tens of millions. They can be made from the run directory
at any time (`llmpi report`), so what does not fit into the time that is left is left out, and said.
"""

from __future__ import annotations

from typing import NamedTuple

GOODBYE_S = 4.0
"""For all that does not depend on the run's size: engines end, ranks are let go, the launcher leaves."""
ENGINE_S = 2.0
"""How long an engine may take to end when time is short; then it is killed."""
# Measured: 15 to 40 us a line to read the record, and 100 us to make metrics.h5 of it and to read that for the tables.
CHECK_ROW_S = 40e-6
METRICS_ROW_S = 150e-6
# The same for what is in a line: its checksum is taken in each of three passes.
BYTE_S = 3e-9


class Size(NamedTuple):
    """Of a record: lines, and bytes."""

    rows: int
    bytes: int


class Closing(NamedTuple):
    """What there is time for. `gather`: counters and rows of all ranks, checked; `metrics`: metrics.h5 and tables."""

    gather: bool
    metrics: bool


def metrics_s(size: Size) -> float:
    """How long metrics.h5 and the tables take, about."""
    return METRICS_ROW_S * size.rows + 2 * BYTE_S * size.bytes


def gather_s(size: Size) -> float:
    """How long it takes to gather rows and to check them against the record, about."""
    return CHECK_ROW_S * size.rows + BYTE_S * size.bytes


def reserve_s(bound_s: float, size: Size) -> float:
    """How much of the time from a request to stop to the exit is kept for the end. At most half of it."""
    for wanted_s in (GOODBYE_S + gather_s(size) + metrics_s(size), GOODBYE_S + metrics_s(size)):
        if wanted_s <= bound_s / 2:
            return wanted_s
    return min(GOODBYE_S, bound_s / 2)


def closing_in(left_s: float, size: Size) -> Closing:
    """What there is time for if the process is to be gone in `left_s`. Half of it is for all the rest."""
    metrics = metrics_s(size) <= left_s / 2
    return Closing(metrics and gather_s(size) + metrics_s(size) <= left_s / 2, metrics)
