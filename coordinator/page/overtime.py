"""A run over time: output tokens a second and running requests, as a picture and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coordinator.page.parts import figure_of, named, sentence_of, untimed
from coordinator.page.svg import (
    WIDTH,
    Floats,
    breaks,
    colour,
    dash,
    few_ticks,
    names_above,
    new_figure,
    set_margins,
    svg_of,
    time_axis,
    titled,
)
from coordinator.page.ticks import time_text
from coordinator.report import OVER_JOB, figure_text
from coordinator.runview import RunView
from storage.timeline import BINS, Timeline, coarser


def _picture(runs: Sequence[RunView], name: str) -> str | None:
    """Output tokens a second above running requests; None if no run has points in time."""
    lines = [(place, run.timeline) for place, run in enumerate(runs) if run.timeline is not None]
    if not any(line.running.any() for _, line in lines):
        return None
    length_s = max(line.length_s for _, line in lines)
    panels: list[tuple[str, Callable[[Timeline, int], Floats]]] = [("requests running", _running_in)]
    if any(line.tokens.any() for _, line in lines):
        panels.insert(0, ("output tokens a second", _tokens_in))
    width, height = WIDTH, 54 + 125 * len(panels)
    figure, axes = new_figure(width, height, len(panels))
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
        titled(one, title)
        one.set_ylim(0, top * 1.08 or 1)
        one.yaxis.set_major_locator(few_ticks(integer=values_of is _running_in))
        one.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 5 or value == 0 else f"{value:g}")
        if len(lines) == 1:
            breaks(one, lines[0][1])
    if len(runs) > 1:
        names_above(axes[0], [(place, runs[place].name) for place, _ in lines])
    time_axis(axes[-1], length_s)
    set_margins(figure, width, height, 52, 16, 22, 40)
    return svg_of(figure, name)


def _tokens_in(line: Timeline, factor: int) -> Floats:
    """Output tokens a second, `factor` bins each."""
    rates: Floats = coarser(line.tokens, factor) / (factor * line.bin_s)
    return rates


def _running_in(line: Timeline, factor: int) -> Floats:
    """Requests running on average, `factor` bins each."""
    means: Floats = coarser(line.running, factor) / factor
    return means


def chapter(runs: Sequence[RunView]) -> list[str]:
    svg = _picture(runs, "time")
    sentences = []
    for run in runs:
        if run.timeline is not None:
            line = run.timeline
            rate, ran = _tokens_in(line, 10), _running_in(line, 10)
            average = figure_text(run.data["output_tokens_per_s"])
            sentences.append(
                f"{named(runs, run)}{time_text(line.length_s)} until the last request ended, at most "
                f"{ran.max():,.0f} requests at once, {ran.mean():,.1f} on average; at most {rate.max():,.0f} output "
                f"tokens/s, {average} over the last job's wall time."
                if run.data["over"] == OVER_JOB else
                f"{named(runs, run)}{time_text(line.length_s)} until the last recorded request ended, at most "
                f"{ran.max():,.0f} requests at once, {ran.mean():,.1f} on average; at most {rate.max():,.0f} output "
                "tokens/s. What ran when the job died is in no record."
            )  # fmt: skip
    sentences += [
        *_lost_engines(runs),
        *untimed(runs),
        "An answer's tokens are spread evenly from its first token to its end.",
    ]
    told, absent = "\n".join(sentences), " ".join(untimed(runs)) or "No request ran in a slot."
    return [f"<h2>{sentence_of(_time_finding(runs))}</h2>", figure_of(svg, "time", told, absent)]


def _lost_engines(runs: Sequence[RunView]) -> list[str]:
    """What looks like idle slots before an engine died was work that was done again."""
    parts = []
    for run in runs:
        if lost := sum(rank["engine_restarts"] for rank in run.data["ranks"]):
            engines = "1 engine was" if lost == 1 else f"{lost:,} engines were"
            parts.append(f"{named(runs, run)}{engines} lost: what ran then is drawn where it was answered, not before.")
    return parts


def _time_finding(runs: Sequence[RunView]) -> str:
    rates = [(run.data["output_tokens_per_s"], run.name) for run in runs if run.data["output_tokens_per_s"]]
    if len(runs) > 1 and rates:
        best = max(rates)
        return f"Throughput: {best[1]} made the most, {figure_text(best[0])} output tokens/s"
    line = runs[0].timeline
    if line is None:
        return "Throughput over time: not measured"
    if not line.running.any():
        return "Throughput: no request ran in a slot"
    rate = f"{figure_text(runs[0].data['output_tokens_per_s'])} output tokens/s"
    if runs[0].data["over"] != OVER_JOB:
        return f"Throughput: {rate} over the {time_text(line.length_s)} in the record"
    tail = _tail_share(line)
    if tail >= 0.1:
        return f"Throughput: {rate}; the last {100 * tail:.0f} % of the time ran with less than half the requests"
    return f"Throughput: {rate}, without a long tail at the end"


def _tail_share(line: Timeline) -> float:
    """Share of the time after which no more than half of the most running requests were running again."""
    ran = coarser(line.running, 10) / 10
    busy = [place for place, value in enumerate(ran.tolist()) if value >= ran.max() / 2]
    return 1 - (busy[-1] + 1) / (BINS // 10) if busy else 0.0
