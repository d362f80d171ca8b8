"""When each rank was busy: a lane each, as a picture, sentences and a table of counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.page.parts import figure_of, sentence_of, table_of, text_of, untimed
from coordinator.page.svg import INK, MUTED, PAPER, WIDTH, breaks, colour, new_figure, set_margins, svg_of, time_axis
from coordinator.report import percent_text, share_text
from coordinator.runview import RunView
from coordinator.sentences import missing_sentence, uncounted_sentence, unread_sentence
from storage.timeline import BINS, Lane, Timeline, coarser

LANES_MAX = 64
"""Ranks that are drawn; of more, as many that lie evenly among them."""
MARKS_MAX = 1500
RANKS_MAX = 512
"""Rows of the table of ranks."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a kind of mark looks. Hollow: only its edge is coloured."""

    name: str
    shape: str
    size: float = 1.0
    hollow: bool = False


STOLEN = Look("stolen requests came", "v")
WON = Look("copy, answered first", "D", 0.8)
IN_VAIN = Look("copy, in vain", "D", 0.8, hollow=True)
LOOKS = (STOLEN, WON, IN_VAIN)


@dataclass(frozen=True, slots=True)
class Mark:
    at: float
    look: Look


def shown_ranks(line: Timeline) -> list[int]:
    """The ranks that a Gantt chart has room for."""
    ranks = list(line.lanes)
    if len(ranks) <= LANES_MAX:
        return ranks
    return [ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, LANES_MAX)]


def gantt(run: RunView, name: str, length_s: float) -> str | None:
    """A lane for each rank: filled as high as requests run, tinted where any does, marked where stolen work came and
    where copies of stragglers were started.

    `length_s`: of the axis of time, which runs that stand side by side share.
    """
    line = run.timeline
    if line is None or not line.running.any():
        return None
    ranks = shown_ranks(line)
    each = 44 if len(ranks) <= 6 else 28 if len(ranks) <= 16 else 13
    marked = any(lane.steals or lane.copies for lane in line.lanes.values())
    top = 18 + (22 if marked else 0)
    right = 190 if any(lane.stolen_in and lane.copied_in for lane in line.lanes.values()) else 128
    width, height = WIDTH, 48 + top + each * len(ranks)
    figure, [axes] = new_figure(width, height)
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
        for of_rank, mark in _marks(lane, line.length_s, min(steps, 110)):
            _draw(axes, mark, base + 0.86, colour(ranks.index(of_rank)) if of_rank in ranks else MUTED, small=each < 20)
        axes.annotate(_lane_text(counters.get(rank), lane), (1, base + 0.37), xycoords=("axes fraction", "data"),
                      xytext=(8, 0), textcoords="offset points", va="center", fontsize=11 if each > 20 else 9,
                      color=INK, annotation_clip=False)  # fmt: skip
    axes.grid(visible=False)
    axes.set_ylim(-0.05, len(ranks) + 0.02)
    at = [len(ranks) - 1 - place + 0.37 for place in range(len(ranks))]
    axes.set_yticks(at, [f"rank {rank}" for rank in ranks])
    axes.tick_params(axis="y", labelsize=12 if each > 20 else 9, labelcolor=INK)
    breaks(axes, line, told_over_s=length_s)
    time_axis(axes, length_s)
    used = [mark.look for lane in line.lanes.values() for _, mark in _marks(lane, line.length_s, 1)]
    _legend(axes, [look for look in LOOKS if look in used], above=bool(line.breaks_s))
    set_margins(figure, width, height, 60, right, top, 40)
    return svg_of(figure, name)


def _lane_text(counters: dict[str, Any] | None, lane: Lane) -> str:
    share = None if counters is None else counters["busy_share"]
    parts = [f"{lane.requests:,} done" if share is None else f"busy {100 * share:.0f} %"]
    if lane.stolen_in:
        parts.append(f"{lane.stolen_in:,} stolen")
    if lane.copied_in:
        parts.append(f"{lane.copied_in:,} {'copy' if lane.copied_in == 1 else 'copies'}")
    return " · ".join(parts)


def _spans(on: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of True."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(np.int8), [0]])))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _marks(lane: Lane, length_s: float, steps: int) -> Iterator[tuple[int, Mark]]:
    """Marks, and the ranks whose colours they have: one for all of a kind that came within one step."""
    found = [(at, STOLEN, victim) for at, victim in lane.steals]
    found += [(at, WON if won else IN_VAIN, source) for at, source, won in lane.copies]
    seen: dict[tuple[Look, int], tuple[int, Mark]] = {}
    for at, look, rank in found:
        seen.setdefault((look, int(at / length_s * max(steps, 1))), (rank, Mark(at, look)))
    yield from seen.values()


def _draw(axes: Any, mark: Mark, height: float, of: str, *, small: bool) -> None:
    look = mark.look
    axes.plot([mark.at], [height], look.shape, color=PAPER if look.hollow else of,
              markersize=(4.0 if small else 6.0) * look.size, markeredgecolor=of if look.hollow else PAPER,
              markeredgewidth=1.2 if look.hollow else 0.4, clip_on=False, zorder=5)  # fmt: skip


def _legend(axes: Any, looks: Sequence[Look], *, above: bool) -> None:
    """What the marks are, over the lanes. `above`: names of jobs stand right over these."""
    from matplotlib.lines import Line2D

    if looks:
        handles = [
            Line2D([], [], linestyle="", marker=look.shape, color=PAPER if look.hollow else MUTED,
                   markersize=6.0 * look.size, markeredgecolor=MUTED if look.hollow else PAPER,
                   markeredgewidth=1.2 if look.hollow else 0.4, label=look.name)
            for look in looks
        ]  # fmt: skip
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=1.4 if above else 0.5,
            ncols=len(looks), frameon=False, fontsize=11, labelcolor=INK, borderpad=0, handletextpad=0.1,
            columnspacing=1.2,
        )  # fmt: skip


def chapter(runs: Sequence[RunView]) -> list[str]:
    out = [f"<h2>{sentence_of(_rank_finding(runs))}</h2>"]
    length_s = max((run.timeline.length_s for run in runs if run.timeline is not None), default=0.0)
    for place, run in enumerate(runs):
        name = f"gantt-{place}"
        if len(runs) > 1:
            out.append(f"<h3>{text_of(run.name)}</h3>")
        svg = gantt(run, name, length_s)
        out.append(figure_of(svg, name, _gantt_sentence(run), " ".join(untimed([run])) or "No request ran in a slot."))
        ranks = run.last_ranks()
        if len(runs) == 1 and ranks:
            out.append(_rank_table(ranks))
        if not ranks:
            out.append(
                '<p class="absent">Busy shares and counters of ranks: not measured. Ranks hand these over when their '
                "job ends in order, and none has.</p>"
            )
        elif run.data["uncounted"]:
            out.append(f'<p class="absent">{text_of(uncounted_sentence(run.data))}.</p>')
        if run.data["record_missing"]:
            out.append(f'<p class="absent">{text_of(missing_sentence())}.</p>')
        if run.data["unread_segment_bytes"]:
            out.append(f'<p class="absent">{text_of(unread_sentence(run.data))}.</p>')
    return out


def _rank_finding(runs: Sequence[RunView]) -> str:
    if len(runs) > 1:
        return "Ranks: when each was busy"
    shares = [rank["busy_share"] for rank in runs[0].last_ranks() if rank["busy_share"] is not None]
    stolen = runs[0].data["last_session"].get("stolen")
    if not shares:
        return "Ranks: when each was busy"
    least, most = percent_text(min(shares)), percent_text(max(shares))
    said = f"Ranks were busy {least} of the time" if least == most else f"Ranks were busy {least} to {most} of the time"
    if stolen is None:
        return said
    whom = "nothing was" if not stolen else "one request was" if stolen == 1 else f"{stolen:,} requests were"
    copies = runs[0].data["last_session"].get("copies")
    return f"{said}; {whom} stolen" + (f", {copies:,} copied" if copies else "")


def _gantt_sentence(run: RunView) -> str:
    line = run.timeline
    if line is None:
        return ""
    shown, full = shown_ranks(line), max(lane.full for lane in line.lanes.values())
    counters = {rank["rank"]: rank for rank in run.last_ranks()}
    parts = []
    for rank in shown[:8]:
        lane = line.lanes[rank]
        busy = counters.get(rank, {}).get("busy_share")
        share = "" if busy is None else f"busy {percent_text(busy)}, "
        told = f"rank {rank}: {share}{lane.requests:,} requests, {lane.stolen_in:,} of them stolen"
        if lane.copied_in:
            copies = "copy" if lane.copied_in == 1 else "copies"
            told += f", {lane.copied_in:,} {copies} of stragglers started, {lane.copies_won:,} answered first"
        parts.append(told)
    told = "; ".join(parts) + (f"; and {len(line.lanes) - 8} more." if len(shown) > 8 else ".")
    if len(shown) < len(line.lanes):
        told += f" {len(shown)} of {len(line.lanes)} ranks are drawn."
    told += (
        f" A lane is tinted while the rank has a request in a slot, and filled as high as the number of these (full: "
        f"{full:,.0f}); it is empty while the rank is idle, as while it loads its model."
    )
    if any(lane.stolen_in for lane in line.lanes.values()):
        told += " A triangle is where stolen requests arrived, in the colour of the rank they were taken from."
    if any(lane.copied_in for lane in line.lanes.values()):
        told += (
            " A diamond is where a copy of a straggler was started, in the colour of the rank that this ran on: filled "
            "where the copy answered first, hollow where it was in vain."
        )
    return told + " Times of each rank count from rank 0's welcome, on its own clock."


def _rank_table(ranks: list[dict[str, Any]]) -> str:
    jobs = len({row["session"] for row in ranks}) > 1
    head = (
        *(("job",) if jobs else ()), "rank", "host", "device", "requests", "failed", "output tokens", "busy", "starved",
        "stolen in", "out",
    )  # fmt: skip
    rows = [
        (
            *((f"{row['session'] + 1}",) if jobs else ()),
            str(row["rank"]), row["host"], row["device"], f"{row['requests']:,}", f"{row['failed']:,}",
            f"{row['output_tokens']:,}", percent_text(row["busy_share"]), share_text(row["starved_share"]),
            f"{row['stolen_in']:,}", f"{row['stolen_out']:,}",
        )
        for row in ranks[:RANKS_MAX]
    ]  # fmt: skip
    more = f" {len(ranks) - RANKS_MAX} more rows are in metrics.h5." if len(ranks) > RANKS_MAX else ""
    caption = "busy: time with a slot in use. starved: free slots, of the slot time in which work waited to start."
    return table_of(head, rows, caption=caption + more, left=3 + jobs)
