"""The tables of a study for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.table import Table
from rich.text import Text

from coordinator.report import figure_text, percent_text
from coordinator.study.summary import Scaling
from coordinator.terminal import NARROW_COLUMNS, console_for


def print_scaling(stream: IO[str], rows: Sequence[Scaling], base: int, notes: Sequence[str], path: Path) -> None:
    console = console_for(stream)
    console.print()
    console.print(scaling_table(rows, narrow=console.width < NARROW_COLUMNS))
    against = "1 worker" if base == 1 else f"{base} workers, the fewest measured"
    console.print(
        Text(
            f"medians; speed-up against {against}, its range from the worst pair of runs to the best · serial: "
            "Karp-Flatt · idle: slot time without a request · starved: the part of it in which work waited to start",
            style="dim italic",
        ),
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"\n{note}", soft_wrap=True, markup=False)
    console.print(f"\nstudy directory: {path}", soft_wrap=True, markup=False)


def scaling_table(rows: Sequence[Scaling], *, narrow: bool = False) -> Table:
    """A row for each number of workers. Energy is shown where it was measured, ranges where there is room."""
    powered = any(not math.isnan(row.energy_j) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [_cells(row, narrow=narrow, powered=powered) for row in rows]
    for title in cells[0]:
        table.add_column(title.strip(), justify="right", no_wrap=True)
    for one in cells:
        table.add_row(*one.values())
    return table


def _cells(row: Scaling, *, narrow: bool, powered: bool) -> dict[str, str]:
    """By title; the two ranges differ by a space. Energy takes the room of the first."""
    found = {"workers": str(row.workers), "runs": str(row.repeats), "time": f"{_seconds(row.median_s)} s"}
    if not narrow and not powered:
        found["range"] = f"{_seconds(row.min_s)} to {_seconds(row.max_s)}"
    found["speed-up"] = _number(row.speedup)
    if not narrow:
        found["range "] = "-" if math.isnan(row.speedup) else f"{row.speedup_min:.2f} to {row.speedup_max:.2f}"
    found |= {
        "efficiency": _percent(row.efficiency), "serial": _percent(row.serial_fraction),
        "tokens/s": figure_text(row.output_tokens_per_s), "idle": _percent(row.idle_share),
        "starved": _percent(row.starved_share),
    }  # fmt: skip
    return found | ({"energy": "-" if math.isnan(row.energy_j) else f"{row.energy_j:,.0f} J"} if powered else {})


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _percent(share: float) -> str:
    return percent_text(None if math.isnan(share) else share)
