"""The shapes of the numbers that ranks gather and the run directory keeps: numpy record types, one per table.

A row of `REQUEST` is one finished request, of `RANK` one rank's counters, of `TELEMETRY` one sample of one GPU
(or of one host's process where there is no GPU), of `COPY` one copy of a straggler. They travel through MPI as raw
bytes and are stored as they are, so a change here is a change of the metrics' format (`docs/metrics.md`). Missing is
NaN for floats and -1 for integers, never 0. This module knows neither MPI nor files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FINISH_REASONS = {"stop": 0, "length": 1, "error": 2, "cancelled": 3, "other": 4}
"""Numbers of the finish reasons in tables; `other` is what a newer writer may add."""

REQUEST = np.dtype(
    [
        ("index", "<i8"),
        ("rank", "<i4"),
        ("attempt", "<i4"),
        ("session", "<i4"),
        ("prompt_tokens", "<i4"),
        ("cached_tokens", "<i4"),
        ("output_tokens", "<i4"),
        ("queue_s", "<f8"),
        ("ttft_s", "<f8"),
        ("tpot_s", "<f8"),
        ("e2e_s", "<f8"),
        ("end_s", "<f8"),
        ("stolen_from", "<i4"),
        ("finish_reason", "u1"),
        ("ok", "u1"),
    ]
)
"""`end_s`: when it ended, since rank 0 welcomed its rank, on that rank's clock; NaN where no rank had it.
`stolen_from`: the rank it was taken from, -1 if from none."""

RANK = np.dtype(
    [
        ("rank", "<i4"),
        ("session", "<i4"),
        ("host", "S64"),
        ("device", "S96"),
        ("requests", "<i8"),
        ("failed", "<i8"),
        ("prompt_tokens", "<i8"),
        ("cached_tokens", "<i8"),
        ("output_tokens", "<i8"),
        ("busy_s", "<f8"),
        ("slot_s", "<f8"),
        ("starved_slot_s", "<f8"),
        ("open_slot_s", "<f8"),
        ("wall_s", "<f8"),
        ("stolen_in", "<i8"),
        ("stolen_out", "<i8"),
        ("engine_restarts", "<i8"),
        ("steps", "<i8"),
        ("drafted_tokens", "<i8"),
        ("accepted_tokens", "<i8"),
    ]
)
"""`requests` counts all that ended on the rank, `failed` those of them that failed. Tokens of a prompt that were in the
cache, and not computed, are in `prompt_tokens` and in `cached_tokens`."""

TELEMETRY = np.dtype(
    [
        ("t_s", "<f8"),
        ("rank", "<i4"),
        ("session", "<i4"),
        ("gpu", "<i4"),
        ("utilization", "<f4"),
        ("memory_used_bytes", "<i8"),
        ("power_w", "<f4"),
        ("temperature_c", "<f4"),
        ("energy_j", "<f8"),
        ("cpu_percent", "<f4"),
        ("rss_bytes", "<i8"),
    ]
)

COPY = np.dtype(
    [
        ("index", "<i8"),
        ("attempt", "<i4"),
        ("session", "<i4"),
        ("rank", "<i4"),
        ("copied_from", "<i4"),
        ("start_s", "<f8"),
        ("answered_s", "<f8"),
        ("won", "i1"),
    ]
)
"""A copy of a straggler, made at `rank` of what ran on `copied_from`. Times in seconds since rank 0 welcomed the ranks,
on its own clock; `answered_s`: when the first of the two had answered. `won`: 1 the copy was first, 0 it was in vain,
-1 neither was."""


def conformed(rows: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Rows of an older version as rows of `dtype`: fields that it did not have are missing (-1, NaN, no text)."""
    if rows.dtype == dtype:
        return rows
    new = np.zeros(rows.shape, dtype)
    for name in dtype.names or ():
        if name in (rows.dtype.names or ()):
            new[name] = rows[name]
        elif dtype[name].kind in "if":
            new[name] = -1 if dtype[name].kind == "i" else np.nan
    return new


def finish_number(reason: str) -> int:
    """The number that stands for a finish reason in `REQUEST` rows."""
    return FINISH_REASONS.get(reason, FINISH_REASONS["other"])
