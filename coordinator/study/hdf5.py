"""study.h5: the cells of a study and their summary as tables, for h5py, pandas or MATLAB (docs/studies.md).

Plain numbers and texts of fixed length in chunked datasets; units are attributes. Missing is NaN.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from coordinator.study.summary import Measured, Scaling

STUDY_H5_NAME = "study.h5"
FORMAT_VERSION = 1
CHUNK_ROWS = 256

CELL = np.dtype(
    [
        ("name", "S32"),
        ("workers", "<i4"),
        ("repeat", "<i4"),
        ("order", "<i4"),
        ("start_unix_s", "<f8"),
        ("wall_s", "<f8"),
        ("load_s", "<f8"),
        ("requests", "<i8"),
        ("failed", "<i8"),
        ("prompt_tokens", "<i8"),
        ("output_tokens", "<i8"),
        ("output_tokens_per_s", "<f8"),
        ("total_tokens_per_s", "<f8"),
        ("slots", "<i8"),
        ("idle_share", "<f8"),
        ("starved_share", "<f8"),
        ("energy_j", "<f8"),
    ]
)
SUMMARY = np.dtype(
    [
        ("workers", "<i4"),
        ("repeats", "<i4"),
        ("median_s", "<f8"),
        ("min_s", "<f8"),
        ("max_s", "<f8"),
        ("speedup", "<f8"),
        ("speedup_min", "<f8"),
        ("speedup_max", "<f8"),
        ("efficiency", "<f8"),
        ("serial_fraction", "<f8"),
        ("output_tokens_per_s", "<f8"),
        ("load_s", "<f8"),
        ("idle_share", "<f8"),
        ("starved_share", "<f8"),
        ("energy_j", "<f8"),
    ]
)
UNITS = {
    "start_unix_s": "s since 1970-01-01 UTC", "wall_s": "s", "load_s": "s", "median_s": "s", "min_s": "s", "max_s": "s",
    "output_tokens_per_s": "tokens/s", "total_tokens_per_s": "tokens/s", "energy_j": "J",
}  # fmt: skip
FORMULAS = {
    "wall_s": "from the first assignment, all engines loaded, to the end of the last answer",
    "load_s": "from the welcome of the ranks to the first assignment",
    "idle_share": "slot time without a request / (slots * wall_s)",
    "starved_share": "slot time without a request while work waited to start / (slots * wall_s)",
    "speedup": "median wall_s of base_workers / median wall_s",
    "speedup_min": "shortest wall_s of base_workers / longest wall_s",
    "speedup_max": "longest wall_s of base_workers / shortest wall_s",
    "efficiency": "speedup / (workers / base_workers)",
    "serial_fraction": "(1 / speedup - 1 / workers) / (1 - 1 / workers); NaN for one worker, or without a base of one",
}


def study_h5(cells: Sequence[Measured], rows: Sequence[Scaling], attributes: Mapping[str, Any]) -> bytes:
    """The content of study.h5. `attributes`: numbers, texts and lists of them, stored at the root."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = "llmpi-study", FORMAT_VERSION
        for name, value in attributes.items():
            if isinstance(value, list):
                value = ", ".join(value) if value and isinstance(value[0], str) else value
            if value != []:
                file.attrs[name] = int(value) if isinstance(value, bool) else value
        _table(file, "cells", CELL, cells)
        _table(file, "summary", SUMMARY, rows)
    return buffer.getvalue()


def _table(file: h5py.File, name: str, dtype: np.dtype[np.void], rows: Sequence[Measured] | Sequence[Scaling]) -> None:
    fields = dtype.names or ()
    data = np.array([tuple(getattr(row, field) for field in fields) for row in rows], dtype)
    table = file.create_dataset(
        name, data=data, maxshape=(None,), chunks=(CHUNK_ROWS,), compression="gzip", shuffle=True, track_times=False
    )
    for field in fields:
        for kind, said in (("unit", UNITS), ("formula", FORMULAS)):
            if field in said:
                table.attrs[f"{field}_{kind}"] = said[field]
