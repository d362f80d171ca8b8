"""The pictures of a report, as SVG texts that stand in a page: drawn with matplotlib, coloured by the page.

Colours are placeholders that become CSS variables, so that a picture follows the page into the dark; texts stay texts,
in the page's font. One unit of a picture is one pixel of the page at its natural width. Nothing here
grows with the number of requests. matplotlib is imported when a picture is made.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.report import time_cell
from coordinator.runview import RunView
from coordinator.ticks import duration_ticks, log_ticks, time_text
from storage.timeline import BINS, Lane, Timeline, coarser
from storage.usage import Device

INK, MUTED, GRID, PAPER = "#000101", "#000202", "#000303", "#000404"
COLOURS = 8
WIDTH = 680
ECDF_WIDTH = 400
LANES_MAX = 64
"""Ranks that are drawn; of more, as many that lie evenly among them."""
LINES_MAX = 16
"""Devices that are drawn a line each; of more, the mean and the range."""
MARKS_MAX = 1500
NAME_MAX = 22
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

Floats = npt.NDArray[np.float64]

_PRECISE = re.compile(r"\d+\.\d\d+")


def available() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def colour(place: int) -> str:
    """The placeholder of the colour of a rank, run or device; they repeat after COLOURS."""
    return f"#00{place % COLOURS + 16:02x}05"


def dash(place: int) -> Any:
    """The dashes of a line: runs can be told apart without their colours."""
    return DASHES[place % len(DASHES)]


# ---------------------------------------------------------------- from a figure to a piece of a page


def _new(width: float, height: float, rows: int = 1, ratios: Sequence[float] | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0].tolist()
    for one in axes:
        one.set_facecolor("none")
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        one.spines["bottom"].set_color(MUTED)
        one.tick_params(colors=MUTED, labelsize=11, length=3, width=0.8, color=MUTED, which="both")
        one.tick_params(axis="y", length=0)
        one.grid(axis="y", color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _placed(figure: Any, width: float, height: float, left: float, right: float, top: float, bottom: float) -> None:
    """Margins in units, so that they are the same whatever the figure's size."""
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=0.32)


def _svg(figure: Any, name: str) -> str:
    """The figure's SVG element alone, its ids its own (`name`), its colours the page's."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 0.2}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _PRECISE.sub(_short, found[0]), text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font: (\d+|bold) ([\d.]+px) [^;\"]*", r"font: \1 \2 var(--font)", text)
    for placeholder, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        text = text.replace(placeholder, f"var(--{variable})")
    for place in range(COLOURS):
        text = text.replace(colour(place), f"var(--c{place})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _short(found: re.Match[str]) -> str:
    """A coordinate to a tenth of a pixel: half the page's bytes."""
    return f"{float(found[0]):.1f}"


# ---------------------------------------------------------------- latencies


def ecdf(runs: Sequence[RunView], latency: str, name: str) -> str | None:
    """The share of samples up to a time, on a logarithmic axis, P50, P95 and P99 marked; None if there are none."""
    from scheduling.histogram import edges_s

    curves = []
    middles = np.sqrt(edges_s()[:-1] * edges_s()[1:])
    for place, run in enumerate(runs):
        histogram = run.histogram(latency)
        if histogram is not None and histogram.count:
            used = np.flatnonzero(histogram.counts)
            curves.append((place, run, middles[used], np.cumsum(histogram.counts[used]) / histogram.count))
    if not curves:
        return None
    width, height = ECDF_WIDTH, 250
    figure, [axes] = _new(width, height)
    low, high = _reach([(x, y) for _, _, x, y in curves])
    # Right of the curve is where the percentiles are written.
    high = max(high, low * (max(_quantile(x, y, 0.95) for _, _, x, y in curves) / low) ** (1 / 0.66))
    for place, run, x, y in curves:
        line = colour(place if len(runs) > 1 else 0)
        xs, ys = np.concatenate([[low / 10], x, [high * 10]]), np.concatenate([[0.0], y, [1.0]])
        axes.plot(xs, ys, drawstyle="steps-post", color=line, linewidth=2, linestyle=dash(place), zorder=3)
        for q in ("p50", "p95", "p99"):
            axes.plot([run.data["latencies"][latency][q]["value"]], [int(q[1:]) / 100], "o", color=line, markersize=6,
                      markeredgecolor=PAPER, markeredgewidth=1.2, zorder=4)  # fmt: skip
    if len(runs) == 1:
        _percentile_texts(axes, runs[0].data["latencies"][latency], low, high)
    else:
        _names_below(axes, [(place, run.name) for place, run, _, _ in curves])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.13)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [time_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    _placed(figure, width, height, 46, 14, 6, 26)
    return _svg(figure, name)


def _reach(curves: Sequence[tuple[Floats, Floats]]) -> tuple[float, float]:
    """The part of the time axis in which something happens. Gaps of 0 stand in the first bucket and stretch nothing."""
    lows = [x[1] if len(x) > 1 and x[0] < 2e-6 else x[0] for x, _ in curves]
    low, high = float(min(lows)) * 0.85, float(max(x[-1] for x, _ in curves)) * 1.15
    return low, max(high, low * 4)


def _quantile(x: Floats, y: Floats, q: float) -> float:
    return float(x[min(int(np.searchsorted(y, q)), len(x) - 1)])


def _percentile_texts(axes: Any, values: dict[str, Any], low: float, high: float) -> None:
    for q, offset, side in (("p50", (7, -12), "left"), ("p95", (7, -14), "left"), ("p99", (0, 7), "center")):
        value = values[q]["value"]
        text = f"{q.upper()} {time_cell(values, q)}"
        if q == "p99":
            share = np.log(value / low) / np.log(high / low)
            side = "right" if share > 0.8 else side
            offset = (10, 7) if share > 0.8 else offset
        axes.annotate(text, (value, int(q[1:]) / 100), xytext=offset, textcoords="offset points", ha=side, color=INK,
                      fontsize=12, zorder=5)  # fmt: skip


def _names_below(axes: Any, names: Sequence[tuple[int, str]]) -> None:
    """Names of runs in their colours, in the lower right, where no curve comes: these rise to the left of it."""
    for line, (place, name) in enumerate(reversed(names)):
        axes.annotate(_cut(name), (1, 0), xycoords="axes fraction", xytext=(-2, 6 + 15 * line), fontsize=12,
                      textcoords="offset points", ha="right", color=colour(place), zorder=5)  # fmt: skip


def _names_above(axes: Any, names: Sequence[tuple[int, str]]) -> None:
    """Names of runs in their colours, in the line of the panel's title, from the right."""
    at = 0.0
    for place, name in reversed(names):
        axes.annotate(_cut(name), (1, 1), xycoords="axes fraction", xytext=(-at, 6), textcoords="offset points",
                      ha="right", fontsize=12, color=colour(place))  # fmt: skip
        at += 7.5 * len(_cut(name)) + 14
        if at > WIDTH - 320:
            return


def _cut(name: str) -> str:
    return name if len(name) <= NAME_MAX else name[: NAME_MAX - 1] + "…"


# ---------------------------------------------------------------- over time


def over_time(runs: Sequence[RunView], name: str) -> str | None:
    """Output tokens a second above running requests; None if no run has points in time."""
    lines = [(place, run.timeline) for place, run in enumerate(runs) if run.timeline is not None]
    if not any(line.running.any() for _, line in lines):
        return None
    length_s = max(line.length_s for _, line in lines)
    panels: list[tuple[str, Callable[[Timeline, int], Floats]]] = [("requests running", running_in)]
    if any(line.tokens.any() for _, line in lines):
        panels.insert(0, ("output tokens a second", tokens_in))
    width, height = WIDTH, 54 + 125 * len(panels)
    figure, axes = _new(width, height, len(panels))
    for one, (title, values_of) in zip(axes, panels, strict=True):
        top = 0.0
        for place, line in lines:
            factor = 10
            values = values_of(line, factor)
            top = max(top, float(values.max()))
            edges = np.linspace(0, line.length_s, BINS // factor + 1)
            of = colour(place)
            if len(lines) == 1:
                one.fill_between(edges, np.append(values, values[-1]), step="post", color=of, alpha=0.25, linewidth=0)
            one.step(edges, np.append(values, values[-1]), where="post", color=of, linewidth=1.6, linestyle=dash(place))
        _titled(one, title)
        one.set_ylim(0, top * 1.08 or 1)
        one.yaxis.set_major_locator(_few(integer=values_of is running_in))
        one.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 5 or value == 0 else f"{value:g}")
        if len(lines) == 1:
            _breaks(one, lines[0][1])
    if len(runs) > 1:
        _names_above(axes[0], [(place, runs[place].name) for place, _ in lines])
    _time_axis(axes[-1], length_s)
    _placed(figure, width, height, 52, 16, 22, 40)
    return _svg(figure, name)


def tokens_in(line: Timeline, factor: int) -> Floats:
    """Output tokens a second, `factor` bins each."""
    rates: Floats = coarser(line.tokens, factor) / (factor * line.bin_s)
    return rates


def running_in(line: Timeline, factor: int) -> Floats:
    """Requests running on average, `factor` bins each."""
    means: Floats = coarser(line.running, factor) / factor
    return means


def _few(*, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, steps=[1, 2, 5, 10], integer=integer)


def _titled(axes: Any, title: str) -> None:
    axes.annotate(title, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=12,
                  color=INK)  # fmt: skip


def _breaks(axes: Any, line: Timeline, *, told: bool = False) -> None:
    for session, at in line.breaks_s.items():
        axes.axvline(at, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        if told:
            axes.annotate(f"job {session + 1}", (at, 1), xycoords=("data", "axes fraction"), xytext=(4, 4),
                          textcoords="offset points", fontsize=11, color=MUTED)  # fmt: skip


def _time_axis(axes: Any, length_s: float) -> None:
    axes.set_xlim(0, length_s)
    ticks, texts, unit = duration_ticks(length_s)
    axes.set_xticks(ticks, texts)
    axes.set_xlabel(f"time since the start, {unit}", fontsize=11, color=MUTED)


# ---------------------------------------------------------------- ranks


def shown_ranks(line: Timeline) -> list[int]:
    """The ranks that a Gantt chart has room for."""
    ranks = list(line.lanes)
    if len(ranks) <= LANES_MAX:
        return ranks
    return [ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, LANES_MAX)]


def gantt(run: RunView, name: str, length_s: float) -> str | None:
    """A lane for each rank: filled as high as requests run, tinted where any does, marked where stolen work came.

    `length_s`: of the axis of time, which runs that stand side by side share.
    """
    line = run.timeline
    if line is None or not line.running.any():
        return None
    ranks = shown_ranks(line)
    each = 44 if len(ranks) <= 6 else 28 if len(ranks) <= 16 else 13
    width, height = WIDTH, 66 + each * len(ranks)
    figure, [axes] = _new(width, height)
    full = max(lane.full for lane in line.lanes.values())
    factor = 4 if len(ranks) <= 16 else 10
    edges = np.linspace(0, line.length_s, BINS // factor + 1)
    counters = {rank["rank"]: rank for rank in run.last_ranks()}
    steps = MARKS_MAX // len(ranks)
    for place, rank in enumerate(ranks):
        lane, base = line.lanes[rank], float(len(ranks) - 1 - place)
        of = colour(place)
        busy = coarser(lane.running, factor) / factor
        spans = [(edges[a], edges[b] - edges[a]) for a, b in _spans(busy > 0)]
        axes.broken_barh(spans, (base, 0.74), color=of, alpha=0.22, linewidth=0)
        heights = base + 0.74 * np.minimum(np.append(busy, busy[-1]) / full, 1.0)
        axes.fill_between(edges, base, heights, step="post", color=of, alpha=0.9, linewidth=0)
        axes.plot([0, length_s], [base, base], color=MUTED, linewidth=0.6)
        _steal_marks(axes, lane, base + 0.80, line.length_s, ranks, min(steps, 110), small=each < 20)
        axes.annotate(_lane_text(counters.get(rank), lane), (1, base + 0.37), xycoords=("axes fraction", "data"),
                      xytext=(8, 0), textcoords="offset points", va="center", fontsize=11 if each > 20 else 9,
                      color=INK, annotation_clip=False)  # fmt: skip
    axes.grid(visible=False)
    axes.set_ylim(-0.05, len(ranks) + 0.02)
    at = [len(ranks) - 1 - place + 0.37 for place in range(len(ranks))]
    axes.set_yticks(at, [f"rank {rank}" for rank in ranks])
    axes.tick_params(axis="y", labelsize=12 if each > 20 else 9, labelcolor=INK)
    _breaks(axes, line, told=True)
    _time_axis(axes, length_s)
    _placed(figure, width, height, 60, 128, 18, 40)
    return _svg(figure, name)


def _lane_text(counters: dict[str, Any] | None, lane: Lane) -> str:
    share = None if counters is None else counters["busy_share"]
    parts = [f"{lane.requests:,} done" if share is None else f"busy {100 * share:.0f} %"]
    if lane.stolen_in:
        parts.append(f"{lane.stolen_in:,} stolen")
    return " · ".join(parts)


def _spans(on: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of True."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(np.int8), [0]])))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _steal_marks(
    axes: Any, lane: Lane, height: float, length_s: float, ranks: list[int], steps: int, *, small: bool
) -> None:
    """A mark for all that came within one step, in the colour of the first victim."""
    seen: dict[int, tuple[float, int]] = {}
    for at, victim in lane.steals:
        seen.setdefault(int(at / length_s * max(steps, 1)), (at, victim))
    for at, victim in seen.values():
        of = colour(ranks.index(victim)) if victim in ranks else MUTED
        axes.plot([at], [height + 0.06], "v", color=of, markersize=3 if small else 6, markeredgecolor=PAPER,
                  markeredgewidth=0.4, clip_on=False, zorder=5)  # fmt: skip


# ---------------------------------------------------------------- devices

PANELS: tuple[tuple[str, str, float], ...] = (
    ("utilization", "GPU utilisation, %", 1.0),
    ("memory_used_bytes", "GPU memory used, GiB", 2.0**-30),
    ("power_w", "GPU power, W", 1.0),
)
PROCESS_PANELS: tuple[tuple[str, str, float], ...] = (
    ("cpu_percent", "processors used by rank and engine, % of one core", 1.0),
    ("rss_bytes", "memory of rank and engine, GiB", 2.0**-30),
)


def usage(found: Sequence[Device], panels: Sequence[tuple[str, str, float]], length_s: float, name: str) -> str | None:
    """A panel for each field that any device has, a line for each device; None if none has any."""
    shown = [panel for panel in panels if any(device.has(panel[0]) for device in found)]
    if not shown:
        return None
    width, height = WIDTH, 54 + 112 * len(shown)
    figure, axes = _new(width, height, len(shown))
    for one, (field, title, scale) in zip(axes, shown, strict=True):
        having = [device for device in found if device.has(field)]
        tops = [scale * device.most(field) for device in having]
        if len(having) <= LINES_MAX:
            for device in having:
                place = found.index(device)
                few = len(device.t_s) <= 60
                one.plot(device.t_s, scale * device.series[field], color=colour(place), linewidth=1.6,
                         marker="o" if few else None, markersize=2.5, linestyle=dash(place // COLOURS))  # fmt: skip
            _end_texts(
                one, [(d.name, scale * _last(d.series[field]), found.index(d)) for d in having], max(tops) * 1.12
            )
        else:
            _range(one, having, field, scale, length_s)
        _titled(one, title)
        one.set_ylim(0, max(tops) * 1.12 or 1)
        one.yaxis.set_major_locator(_few())
        one.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    _time_axis(axes[-1], length_s)
    _placed(figure, width, height, 52, 100, 22, 40)
    return _svg(figure, name)


def _last(values: Floats) -> float:
    return float(values[np.flatnonzero(np.isfinite(values))[-1]])


def _end_texts(axes: Any, ends: list[tuple[str, float, int]], top: float) -> None:
    """Names at the lines' right ends, moved apart where these lie on each other; of many, none."""
    if len(ends) > COLOURS:
        return
    least = 0.17  # of the panel's height: a line of text
    at = -1.0
    placed = []
    for name, value, place in sorted(ends, key=lambda end: end[1]):
        at = max(at + least, value / top if top > 0 else 0.0)
        placed.append((name, at, place))
    over = max(0.0, placed[-1][1] - 1.0) if placed else 0.0
    for name, height, place in placed:
        axes.annotate(name, (1, height - over), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=11, color=colour(place), annotation_clip=False)  # fmt: skip


def _range(axes: Any, having: Sequence[Device], field: str, scale: float, length_s: float) -> None:
    grid = np.linspace(0, length_s, 200)
    values = []
    for device in having:
        known = np.isfinite(device.series[field])
        t_s, of = device.t_s[known], scale * device.series[field][known]
        values.append(np.interp(grid, t_s, of, left=np.nan, right=np.nan))
    table = np.array(values)
    table = table[:, np.isfinite(table).any(axis=0)]
    grid = grid[np.isfinite(np.array(values)).any(axis=0)]
    axes.fill_between(
        grid, np.nanmin(table, axis=0), np.nanmax(table, axis=0), color=colour(0), alpha=0.22, linewidth=0
    )
    axes.plot(grid, np.nanmean(table, axis=0), color=colour(0), linewidth=1.8)
