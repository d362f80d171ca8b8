"""What GPUs and processors did, and the energy it took, as pictures and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordinator.page.parts import figure_of, named, sentence_of, text_of
from coordinator.page.svg import (
    COLOURS,
    WIDTH,
    Floats,
    colour,
    dash,
    few_ticks,
    new_figure,
    set_margins,
    svg_of,
    time_axis,
    titled,
    write_name,
)
from coordinator.runview import RunView
from coordinator.sentences import energy_sentence
from storage.usage import Device

LINES_MAX = 16
"""Devices that are drawn a line each; of more, the mean and the range."""

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
    figure, axes = new_figure(width, height, len(shown))
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
        titled(one, title)
        one.set_ylim(0, max(tops) * 1.12 or 1)
        one.yaxis.set_major_locator(few_ticks())
        one.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    time_axis(axes[-1], length_s)
    set_margins(figure, width, height, 52, 100, 22, 40)
    return svg_of(figure, name)


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
        write_name(axes, name, (1, height - over), xytext=(6, 0), va="center", fontsize=11, color=colour(place),
                   annotation_clip=False)  # fmt: skip


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


def chapter(runs: Sequence[RunView]) -> list[str]:
    out = []
    for place, run in enumerate(runs):
        gpus = [device for device in run.devices if device.gpu >= 0]
        ranks = [device for device in run.devices if device.gpu < 0]
        title = "" if len(runs) == 1 else f"{run.name}: "
        if not run.devices:
            out.append(f"<h2>{text_of(title)}GPUs and processors</h2>")
            why = "no sample of this run was kept" if run.data["requests"] else "nothing ran"
            out.append(f'<p class="absent">Utilisation, memory and power: not measured, {why}.</p>')
            continue
        length_s = max(run.timeline.length_s if run.timeline else 0.0, *(float(d.t_s.max()) for d in run.devices), 1e-3)
        for found, panels, what in ((gpus, PANELS, "gpu"), (ranks, PROCESS_PANELS, "cpu")):
            if not found:
                out.append('<p class="absent">GPU utilisation, memory and power: not measured, no rank had a GPU.</p>')
                continue
            mean = _mean_text(found, "utilization" if what == "gpu" else "cpu_percent")
            heading = f"GPUs: utilisation {mean}" if what == "gpu" else f"Processors: each rank used {mean}"
            name = f"{what}-{place}"
            svg = usage(found, panels, length_s, name)
            out.append(f"<h2>{sentence_of(title + heading)}</h2>")
            out.append(figure_of(svg, name, _device_sentence(found, panels), "Not measured: the driver does not say."))
    return out


def _mean_text(found: Sequence[Any], field: str) -> str:
    means = [device.mean(field) for device in found if device.has(field)]
    if not means:
        return "an unknown share: too few samples" if field == "cpu_percent" else "not measured"
    low, high = f"{min(means):.0f}", f"{max(means):.0f}"
    of = "of one core on average" if field == "cpu_percent" else "on average"
    return f"{low} % {of}" if low == high else f"{low} to {high} % {of}"


def _device_sentence(found: Sequence[Any], panels: Sequence[tuple[str, str, float]]) -> str:
    parts = []
    for field, title, scale in panels:
        having = [device for device in found if device.has(field)]
        if not having:
            parts.append(f"{title}: not measured.")
            continue
        told = "; ".join(
            f"{device.name}: {_short(scale * device.mean(field))} on average, "
            f"at most {_short(scale * device.most(field))}"
            for device in having[:8]
        )
        parts.append(f"{title}: {told}{f'; and {len(having) - 8} more' if len(having) > 8 else ''}.")
    if len(found) > LINES_MAX:
        parts.append(f"Of {len(found)} devices the mean is drawn, and the range.")
    return " ".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def energy(runs: Sequence[RunView]) -> list[str]:
    out = ["<h2>Energy</h2>"] if len(runs) > 1 else []
    for run in runs:
        used = run.data["energy"]
        if used is None:
            absent = f"{named(runs, run)}energy an output token: not measured, no GPU has told its power."
            out.append(f'<p class="absent">{text_of(absent[0].upper() + absent[1:] if len(runs) == 1 else absent)}</p>')
            continue
        if len(runs) == 1:
            each = used["joules_per_output_token"]
            out.append(f"<h2>{text_of('Energy' if each is None else f'Energy: {each:.3g} J an output token')}</h2>")
        said = energy_sentence(used)
        out.append(f"<p>{text_of(named(runs, run) + said)}. From the first to the last sample of each job.</p>")
    return out
