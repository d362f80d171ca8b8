"""The latencies of a report: how they are distributed, as pictures, sentences and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordinator.page.parts import figure_of, named, sentence_of, table_of, text_of
from coordinator.page.svg import INK, PAPER, Floats, colour, dash, names_below, new_figure, set_margins, svg_of
from coordinator.page.ticks import log_ticks, time_text
from coordinator.report import LATENCY_NAMES, time_cell
from coordinator.runview import RunView

ECDF_WIDTH = 400

_WHAT = {
    "queue_s": "waiting at the engine until first scheduled",
    "ttft_s": "time to the first token, waiting included",
    "tpot_s": "time per output token after the first",
    "itl_s": "gaps between consecutive tokens",
    "e2e_s": "from the engine's receiving a request to its end",
}


def _ecdf(runs: Sequence[RunView], latency: str, name: str) -> str | None:
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
    figure, [axes] = new_figure(width, height)
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
        names_below(axes, [(place, run.name) for place, run, _, _ in curves])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.13)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [time_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    set_margins(figure, width, height, 46, 14, 6, 26)
    return svg_of(figure, name)


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


def chapter(runs: Sequence[RunView]) -> list[str]:
    out = ["<h2>Latencies</h2>"]
    if not any(_known(run, latency) for run in runs for latency in LATENCY_NAMES):
        return [*out, '<p class="absent">Not measured: no request was answered.</p>']
    made = []
    for latency, title in LATENCY_NAMES.items():
        name = f"ecdf-{latency.removesuffix('_s')}"
        sentences = "\n".join(_latency_sentence(runs, run, latency) for run in runs)
        svg = _ecdf(runs, latency, name)
        drawn = figure_of(svg, name, sentences, f"{title}: not measured, no request has one.", kind="small")
        finding = _latency_finding(runs, latency, title)
        made.append(
            f"<section><h3>{sentence_of(finding)}</h3><p class=what>{text_of(_WHAT[latency])}</p>{drawn}</section>"
        )
    if len(runs) == 1:
        rows = []
        for latency, title in LATENCY_NAMES.items():
            values = runs[0].data["latencies"].get(latency)
            if values is not None:
                cells = [time_cell(values, q) for q in ("p50", "p95", "p99")]
                rows.append((title, *cells, f"{values['p50']['samples']:,}"))
        starred = any(row[3].endswith("*") or row[2].endswith("*") for row in rows)
        caption = "* too few samples to support this percentile" if starred else ""
        table = table_of(("latency", "P50", "P95", "P99", "samples"), rows, caption=caption)
        made.append(f"<section><h3>In numbers</h3>{table}</section>")
    return [*out, f'<div class="grid">{"".join(made)}</div>']


def _known(run: RunView, latency: str) -> bool:
    values = run.data["latencies"].get(latency)
    return values is not None and values["p50"]["value"] is not None


def _latency_finding(runs: Sequence[RunView], latency: str, title: str) -> str:
    first = runs[0].data["latencies"].get(latency)
    if len(runs) == 1:
        if first is None or not _known(runs[0], latency):
            return f"{title}: not measured"
        return f"{title}: half within {time_cell(first, 'p50')}, 99 % within {time_cell(first, 'p99')}"
    known = [(run.data["latencies"][latency], run.name) for run in runs if _known(run, latency)]
    if not known:
        return f"{title}: not measured"
    best, name = min(known, key=lambda one: float(one[0]["p95"]["value"]))
    if all(values["p95"]["value"] == best["p95"]["value"] for values, _ in known):
        return f"{title}: the same P95, {time_cell(best, 'p95')}"
    return f"{title}: P95 is least with {name}, {time_cell(best, 'p95')}"


def _latency_sentence(runs: Sequence[RunView], run: RunView, latency: str) -> str:
    values = run.data["latencies"].get(latency)
    if values is None or not _known(run, latency):
        return f"{named(runs, run)}not measured."
    told = ", ".join(f"{q.upper()} {time_cell(values, q)}" for q in ("p50", "p95", "p99"))
    said = f"{named(runs, run)}{told}; {values['p50']['samples']:,} samples."
    weak = [q.upper() for q in ("p50", "p95", "p99") if not values[q]["supported"]]
    if weak:
        said += f" * Too few samples to support {' and '.join(weak)}."
    histogram = run.histogram(latency)
    zero = histogram.counts[0] / histogram.count if histogram is not None and histogram.count else 0.0
    if latency == "itl_s" and zero >= 0.0005:  # else it would be told as 0.0 %
        said += f" {100 * zero:.1f} % of the gaps are 0: their tokens came from one step."
    return said
