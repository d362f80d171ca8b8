"""From measured times to `ServiceTimes`: small least-squares fits whose answers make sense as times.

Two kinds of samples come in. A `DecodeSample` is the time between two tokens of `rows` sequences in one context. A
`ReadSample` is the time from the start of a prompt, alone in its context, to its first token of output. Errors count in
proportion to the time, so that short passes matter as much as long ones. No coefficient comes out negative: noise must
not make a pass that takes less time the more it has to do.

Pure arithmetic: what is measured, how often, and which of it counts is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

from scheduling.errors import ConfigError
from scheduling.servicetime import Measured, ServiceTimes

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DecodeSample:
    """A step over `rows` sequences, each looking at `cells` cells, took `step_s`."""

    rows: int
    cells: int
    step_s: float


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A prompt of `tokens`, alone, took `read_s` until its first token of output was there."""

    tokens: int
    read_s: float


@dataclass(frozen=True, slots=True)
class Residual:
    """One sample beside what the fitted times say of it."""

    what: str
    measured_s: float
    fitted_s: float

    @property
    def error(self) -> float:
        """Relative: 0.1 where the fit is 10 % too slow."""
        return self.fitted_s / self.measured_s - 1.0


def fit(
    measured: Measured, decodes: Sequence[DecodeSample], reads: Sequence[ReadSample], choose_row_s: float
) -> ServiceTimes:
    """The times that come nearest to the samples.

    `decodes` must have a sample with one row; those with the same number of rows and other cells tell what a cell
    costs. Raises ConfigError if there are too few samples.
    """
    if not any(sample.rows == 1 for sample in decodes) or len({sample.tokens for sample in reads}) < 2:
        raise ConfigError("too little was measured: a step of one sequence and prompts of two lengths are needed")
    read_pass_s, read_token_s, read_cell_s = _fit_reads(reads, choose_row_s)
    decode_cell_s = _fit_cells(decodes)
    rows = sorted({sample.rows for sample in decodes})
    points = [
        median(
            sample.step_s - sample.rows * (sample.cells * decode_cell_s + choose_row_s)
            for sample in decodes
            if sample.rows == count
        )
        for count in rows
    ]
    return ServiceTimes(
        measured=measured,
        decode_rows=tuple(rows),
        decode_s=tuple(float(value) for value in rising(points)),
        read_pass_s=read_pass_s,
        read_token_s=read_token_s,
        read_cell_s=read_cell_s,
        decode_cell_s=decode_cell_s,
        choose_row_s=choose_row_s,
    )


def residuals(times: ServiceTimes, decodes: Sequence[DecodeSample], reads: Sequence[ReadSample]) -> list[Residual]:
    """Each sample beside what `times` say."""
    found = [Residual(f"prompt of {sample.tokens}", sample.read_s, times.prefill_s(sample.tokens)) for sample in reads]
    return found + [
        Residual(
            f"step of {sample.rows}, {sample.cells} cells each",
            sample.step_s,
            times.decode_step_s(sample.rows, sample.cells),
        )
        for sample in decodes
    ]


def rising(values: Sequence[float]) -> Doubles:
    """The non-decreasing, non-negative sequence nearest to `values`: neighbours in the wrong order share their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, count = max(0.0, value), 1
        while blocks and blocks[-1][0] * count > total * blocks[-1][1]:
            before, others = blocks.pop()
            total, count = total + before, count + others
        blocks.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in blocks])


def not_negative(columns: Doubles, wanted: Doubles) -> Doubles:
    """Coefficients of `columns` (samples, terms), none negative, that come nearest to `wanted` (samples,).

    Every subset of the terms is tried: there are few.
    """
    terms = columns.shape[1]
    best, smallest = np.zeros(terms), float(np.sum(wanted**2))
    for size in range(1, terms + 1):
        for chosen in map(list, combinations(range(terms), size)):
            found = np.linalg.lstsq(columns[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((columns[:, chosen] @ found - wanted) ** 2))
            if (found >= 0.0).all() and error < smallest:
                smallest = error
                best = np.zeros(terms)
                best[chosen] = found
    return best


def _fit_reads(reads: Sequence[ReadSample], choose_row_s: float) -> tuple[float, float, float]:
    """Of a pass that reads: once, for each token, for each cell that a token looks at."""
    tokens = np.array([sample.tokens for sample in reads], np.float64)
    took = np.array([sample.read_s for sample in reads], np.float64)
    columns = np.stack([np.ones_like(tokens), tokens, tokens * (tokens + 1) / 2], axis=1)
    wanted = np.maximum(0.0, took - choose_row_s) / took
    once, token, cell = not_negative(columns / took[:, None], wanted).tolist()
    return once, token, cell


def _fit_cells(decodes: Sequence[DecodeSample]) -> float:
    """What a row pays for each cell, from steps that differ in nothing else."""
    above = below = 0.0
    for count in {sample.rows for sample in decodes}:
        alike = [sample for sample in decodes if sample.rows == count]
        cells = np.array([count * sample.cells for sample in alike], np.float64)
        took = np.array([sample.step_s for sample in alike], np.float64)
        weight = 1.0 / took.mean() ** 2
        above += weight * float(((cells - cells.mean()) * (took - took.mean())).sum())
        below += weight * float(((cells - cells.mean()) ** 2).sum())
    return float(max(0.0, above / below)) if below else 0.0
