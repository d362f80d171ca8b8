"""The picture of a study: speed-up against workers with the ideal line, repeats as points; efficiency beside it.

matplotlib is imported when a picture is made.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import median
from typing import Any

from coordinator.page.svg import available as available
from coordinator.study.summary import Measured, Scaling

PICTURE_NAME = "scaling.png"
BLUE, GREY, RED = "#2a6fb0", "#8a8a8a", "#b5472f"
DPI = 150
TICKS_EACH = 16
"""Up to so many times the fewest workers each number has a tick of its own: beyond, they would overlap."""


def picture(cells: Sequence[Measured], rows: Sequence[Scaling], base: int, *, simulated: bool = False) -> bytes:
    """As PNG. Where the base was not measured, times are shown instead of speed-ups."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    workers = [row.workers for row in rows]
    base_s = [cell.wall_s for cell in cells if cell.workers == base]
    if base_s:
        _speedups(left, cells, rows, base, median(base_s))
        _efficiency(right, cells, rows, base, median(base_s))
    else:
        left.plot(workers, [row.median_s for row in rows], "o-", color=BLUE, label="median")
        left.set(ylabel="time from first assignment to last answer (s)", ylim=(0, None))
        _shares(right, rows)
    for axes in (left, right):
        axes.set(xlabel="workers", xlim=(0, 1.06 * max(workers)))
        if max(workers) <= TICKS_EACH * min(workers):
            axes.set_xticks(workers)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if simulated:
        figure.suptitle("simulated engine", fontsize="small", color=GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _speedups(axes: Any, cells: Sequence[Measured], rows: Sequence[Scaling], base: int, base_s: float) -> None:
    most = max(row.workers for row in rows)
    axes.plot([0, most], [0, most / base], "--", color=GREY, linewidth=1, label="ideal")
    axes.plot([row.workers for row in rows], [row.speedup for row in rows], "-", color=BLUE, label="median")
    axes.plot(
        [cell.workers for cell in cells], [base_s / cell.wall_s for cell in cells], "o", color=BLUE, alpha=0.55,
        markersize=5, markeredgewidth=0, label="repeats",
    )  # fmt: skip
    against = "1 worker" if base == 1 else f"{base} workers"
    axes.set(ylabel=f"speed-up (times the speed of {against})", ylim=(0, None))


def _efficiency(axes: Any, cells: Sequence[Measured], rows: Sequence[Scaling], base: int, base_s: float) -> None:
    workers = [row.workers for row in rows]
    axes.plot([0, max(workers)], [100, 100], "--", color=GREY, linewidth=1, label="ideal")
    axes.plot(workers, [100 * row.efficiency for row in rows], "-", color=BLUE, label="efficiency, median")
    axes.plot(
        [cell.workers for cell in cells], [100 * base_s / cell.wall_s * base / cell.workers for cell in cells], "o",
        color=BLUE, alpha=0.55, markersize=5, markeredgewidth=0,
    )  # fmt: skip
    _shares(axes, rows)
    axes.set(ylabel="efficiency, idle slot time (%)")


def _shares(axes: Any, rows: Sequence[Scaling]) -> None:
    axes.plot(
        [row.workers for row in rows], [100 * row.idle_share for row in rows], "s:", color=RED, markersize=4,
        label="idle slot time, median",
    )  # fmt: skip
    axes.set(ylabel="idle slot time (%)", ylim=(0, None))
