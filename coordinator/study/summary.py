"""From measured cells to speed-up. Pure arithmetic; times in seconds, nothing is fitted.

speed-up S = T_b / T_k, medians over repeats; b is the fewest workers measured, 1 if that is among them
efficiency   = S / (k / b)
Karp-Flatt   = (1 / S - 1 / k) / (1 - 1 / k), for b = 1 and k > 1: the serial share of the work that Amdahl's law would
need to explain S (Karp and Flatt, Communications of the ACM 33(5), 1990). Where it grows with k it is overhead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OTHER_WORK = 0.01
"""Cells whose output tokens differ by more than this share did other work, and their times do not compare well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one cell was like. NaN: not known. `start_unix_s`: when it began, loading included.

    `wall_s`: from the first assignment, which waits until all engines are loaded, to the end of the last answer.
    `load_s`: from the ranks' welcome to the first assignment. `idle_share`: slot time without a request, of all slot
    time in `wall_s`; `starved_share`: the part of it in which work waited to start.
    """

    name: str
    workers: int
    repeat: int
    order: int
    start_unix_s: float
    wall_s: float
    load_s: float
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    slots: int
    idle_share: float
    starved_share: float
    energy_j: float

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s

    @property
    def total_tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.wall_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """All cells of one number of workers. `speedup_min`: the fastest base over the slowest here; `speedup_max` the
    reverse."""

    workers: int
    repeats: int
    median_s: float
    min_s: float
    max_s: float
    speedup: float
    speedup_min: float
    speedup_max: float
    efficiency: float
    serial_fraction: float
    output_tokens_per_s: float
    load_s: float
    idle_share: float
    starved_share: float
    energy_j: float


def summarise(cells: Sequence[Measured], base: int) -> list[Scaling]:
    """A row for each number of workers that was measured, fewest first. Speed-ups are NaN without a base."""
    times = {k: [cell.wall_s for cell in cells if cell.workers == k] for k in sorted({cell.workers for cell in cells})}
    base_s = times.get(base)
    rows = []
    for k, walls in times.items():
        same = [cell for cell in cells if cell.workers == k]
        speedup, low, high = (math.nan,) * 3
        if base_s:
            speedup = median(base_s) / median(walls)
            low, high = min(base_s) / max(walls), max(base_s) / min(walls)
        rows.append(
            Scaling(
                workers=k, repeats=len(walls), median_s=median(walls), min_s=min(walls), max_s=max(walls),
                speedup=speedup, speedup_min=low, speedup_max=high, efficiency=speedup * base / k,
                serial_fraction=karp_flatt(speedup, k) if base == 1 else math.nan,
                output_tokens_per_s=median(cell.output_tokens_per_s for cell in same),
                load_s=_median(cell.load_s for cell in same),
                idle_share=_median(cell.idle_share for cell in same),
                starved_share=_median(cell.starved_share for cell in same),
                energy_j=_median(cell.energy_j for cell in same),
            )
        )  # fmt: skip
    return rows


def karp_flatt(speedup: float, workers: int) -> float:
    """NaN for one worker. Below 0: more than linear."""
    if workers <= 1:
        return math.nan
    return (1 / speedup - 1 / workers) / (1 - 1 / workers)


def doubts(cells: Sequence[Measured]) -> list[str]:
    """Why figures of a study may not compare, for people."""
    found = []
    tokens = [cell.output_tokens for cell in cells]
    if tokens and max(tokens) - min(tokens) > OTHER_WORK * max(tokens):
        found.append(f"cells made between {min(tokens):,} and {max(tokens):,} output tokens: not all did the same work")
    if failed := sum(cell.failed for cell in cells):
        found.append(f"{failed:,} requests failed in all cells together: see error in their results.jsonl")
    return found


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """For JSON: None for what is not known."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _median(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
