"""A report as one HTML page that stands alone: pictures, the sentences that say what they show, and the tables.

Nothing is fetched: style and pictures are in the page, there are no scripts. It follows the reader's light or dark mode
through CSS variables, and is as readable on a phone (wide pictures scroll inside their frame). Every text that comes
from a run is escaped. All figures are those of `report_data`, in the words of the printed tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator import figures
from coordinator.durations import duration
from coordinator.pagefacts import about, config_of, failures
from coordinator.pageparts import figure_of, named, table_of, text_of
from coordinator.report import (
    LATENCY_NAMES,
    OVER_JOB,
    energy_sentence,
    figure_text,
    percent_text,
    share_text,
    state_text,
    time_cell,
)
from coordinator.runview import RunView
from coordinator.sidebyside import comparison
from coordinator.simulated import WARNING
from coordinator.style import STYLE
from coordinator.ticks import time_text
from storage.timeline import BINS, Timeline, coarser

RUNS_MAX = 8
"""Runs beside each other: as many as there are colours."""
RANKS_MAX = 512
"""Rows of the table of ranks."""

_WHAT = {
    "queue_s": "waiting at the engine until first scheduled",
    "ttft_s": "time to the first token, waiting included",
    "tpot_s": "time per output token after the first",
    "itl_s": "gaps between consecutive tokens",
    "e2e_s": "from the engine's receiving a request to its end",
}


def page(runs: Sequence[RunView], reasons: Sequence[Sequence[tuple[int, str, str]]]) -> str:
    """The page for one run, or for several beside each other, ratios to the first.

    `reasons`: for each run why requests failed, as (how many, custom_id of one, message).
    """
    title = f"llmpi: {runs[0].name}" if len(runs) == 1 else f"llmpi: {len(runs)} runs compared"
    body = [f"<h1>{text_of(title)}</h1>"]
    body += _summary(runs)
    if len(runs) > 1:
        body += _keys(runs)
        body += _comparison(runs)
    for part in (_latencies, _over_time, _ranks, _devices, _energy):
        body += part(runs)
    body += failures(runs, reasons)
    body += about(runs)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text_of(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- what came of it


def _summary(runs: Sequence[RunView]) -> list[str]:
    out = []
    for run in runs if len(runs) == 1 else ():
        data = run.data
        state = state_text(run.status.complete, run.status.running, data["failed"])
        out.append(f'<p class="state {"good" if run.status.exit_code == 0 else "bad"}">{text_of(state)}</p>')
        wall = "unknown" if data["over_s"] is None else duration(data["over_s"])
        jobs = "wall time" if len(run.state["sessions"]) < 2 else "last job's wall time"
        total = "" if run.status.total is None else f" of {run.status.total:,}"
        tiles = [
            (f"{data['ok']:,}", f"answered{total}"), (f"{data['failed']:,}", "failed"),
            (wall, jobs if data["over"] == OVER_JOB else data["over"]),
            (figure_text(data["output_tokens_per_s"]), "output tokens/s"),
            (figure_text(data["prompt_tokens_per_s"]), "prompt tokens/s"),
            (figure_text(data["requests_per_s"]), "requests/s"),
        ]  # fmt: skip
        made = (f"<div><dt>{text_of(what)}</dt><dd>{text_of(value)}</dd></div>" for value, what in tiles)
        out.append(f'<dl class="tiles">{"".join(made)}</dl>')
    simulated = [run.name for run in runs if config_of(run).get("engine") == "simulated"]
    if simulated:
        which = "" if len(runs) == 1 else f"{', '.join(simulated)}: "
        out.append(f'<p class="warning">{text_of(which + WARNING)}</p>')
    return out


def _keys(runs: Sequence[RunView]) -> list[str]:
    """Which colour and which dashes a run has; also the first run, which ratios refer to."""
    dashes = ("", "5 2", "2 2", "6 2 2 2")
    items = []
    for place, run in enumerate(runs):
        line = (
            f'<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" stroke="var(--c{place % 8})" '
            f'stroke-width="3" stroke-dasharray="{dashes[place % 4]}"/></svg>'
        )
        state = state_text(run.status.complete, run.status.running, run.data["failed"])
        items.append(f"<li>{line} <b>{text_of(run.name)}</b> {text_of(state)}</li>")
    return [f'<ul class="keys">{"".join(items)}</ul>']


def _comparison(runs: Sequence[RunView]) -> list[str]:
    head, rows = comparison([(run.name, run.data) for run in runs])
    return ["<h2>Side by side</h2>", table_of(head, rows, caption="× : ratio to the first run. * : too few samples.")]


# ---------------------------------------------------------------- latencies


def _latencies(runs: Sequence[RunView]) -> list[str]:
    out = ["<h2>Latencies</h2>"]
    if not any(_known(run, latency) for run in runs for latency in LATENCY_NAMES):
        return [*out, '<p class="absent">Not measured: no request was answered.</p>']
    made = []
    for latency, title in LATENCY_NAMES.items():
        name = f"ecdf-{latency.removesuffix('_s')}"
        sentences = "\n".join(_latency_sentence(runs, run, latency) for run in runs)
        svg = figures.ecdf(runs, latency, name)
        drawn = figure_of(svg, name, sentences, f"{title}: not measured, no request has one.", kind="small")
        finding = _latency_finding(runs, latency, title)
        made.append(f"<section><h3>{text_of(finding)}</h3><p class=what>{text_of(_WHAT[latency])}</p>{drawn}</section>")
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


# ---------------------------------------------------------------- over time


def _untimed(runs: Sequence[RunView]) -> list[str]:
    """What cannot be drawn, and why."""
    parts = []
    for run in runs:
        if run.timeline is None:
            why = "nothing has been recorded" if not run.data["requests"] else "no request has a point in time"
            parts.append(f"{named(runs, run)}{'not' if len(runs) > 1 else 'Not'} measured: {why}.")
        elif run.timeline.untimed:
            parts.append(f"{named(runs, run)}{run.timeline.untimed:,} requests without a point in time are not drawn.")
    return parts


def _over_time(runs: Sequence[RunView]) -> list[str]:
    svg = figures.over_time(runs, "time")
    sentences = []
    for run in runs:
        if run.timeline is not None:
            line = run.timeline
            rate, ran = figures.tokens_in(line, 10), figures.running_in(line, 10)
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
    sentences += [*_untimed(runs), "An answer's tokens are spread evenly from its first token to its end."]
    told, absent = "\n".join(sentences), " ".join(_untimed(runs)) or "No request ran in a slot."
    return [f"<h2>{text_of(_time_finding(runs))}</h2>", figure_of(svg, "time", told, absent)]


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


# ---------------------------------------------------------------- ranks


def _ranks(runs: Sequence[RunView]) -> list[str]:
    out = [f"<h2>{text_of(_rank_finding(runs))}</h2>"]
    length_s = max((run.timeline.length_s for run in runs if run.timeline is not None), default=0.0)
    for place, run in enumerate(runs):
        name = f"gantt-{place}"
        if len(runs) > 1:
            out.append(f"<h3>{text_of(run.name)}</h3>")
        svg = figures.gantt(run, name, length_s)
        out.append(figure_of(svg, name, _gantt_sentence(run), " ".join(_untimed([run])) or "No request ran in a slot."))
        ranks = run.last_ranks()
        if len(runs) == 1 and ranks:
            out.append(_rank_table(ranks))
        if not ranks:
            out.append(
                '<p class="absent">Busy shares and counters of ranks: not measured. Ranks hand these over when their '
                "job ends in order, and none has.</p>"
            )
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
    return f"{said}; {whom} stolen"


def _gantt_sentence(run: RunView) -> str:
    line = run.timeline
    if line is None:
        return ""
    shown, full = figures.shown_ranks(line), max(lane.full for lane in line.lanes.values())
    counters = {rank["rank"]: rank for rank in run.last_ranks()}
    parts = []
    for rank in shown[:8]:
        lane = line.lanes[rank]
        busy = counters.get(rank, {}).get("busy_share")
        share = "" if busy is None else f"busy {percent_text(busy)}, "
        parts.append(f"rank {rank}: {share}{lane.requests:,} requests, {lane.stolen_in:,} of them stolen")
    told = "; ".join(parts) + (f"; and {len(line.lanes) - 8} more." if len(shown) > 8 else ".")
    if len(shown) < len(line.lanes):
        told += f" {len(shown)} of {len(line.lanes)} ranks are drawn."
    told += (
        f" A lane is tinted while the rank has a request in a slot, and filled as high as the number of these (full: "
        f"{full:,.0f}); it is empty while the rank is idle, as while it loads its model."
    )
    if any(lane.stolen_in for lane in line.lanes.values()):
        told += " A mark is where stolen requests arrived, in the colour of the rank they were taken from."
    return told + " Times of each rank count from rank 0's welcome, on its own clock."


def _rank_table(ranks: list[dict[str, Any]]) -> str:
    head = ("rank", "host", "device", "requests", "failed", "output tokens", "busy", "starved", "stolen in", "out")
    rows = [
        (
            str(row["rank"]), row["host"], row["device"], f"{row['requests']:,}", f"{row['failed']:,}",
            f"{row['output_tokens']:,}", percent_text(row["busy_share"]), share_text(row["starved_share"]),
            f"{row['stolen_in']:,}", f"{row['stolen_out']:,}",
        )
        for row in ranks[:RANKS_MAX]
    ]  # fmt: skip
    more = f" {len(ranks) - RANKS_MAX} more ranks are in metrics.h5." if len(ranks) > RANKS_MAX else ""
    caption = "busy: time with a slot in use. starved: free slots, of the slot time in which work waited to start."
    return table_of(head, rows, caption=caption + more, left=3)


# ---------------------------------------------------------------- devices


def _devices(runs: Sequence[RunView]) -> list[str]:
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
        for found, panels, what in ((gpus, figures.PANELS, "gpu"), (ranks, figures.PROCESS_PANELS, "cpu")):
            if not found:
                out.append('<p class="absent">GPU utilisation, memory and power: not measured, no rank had a GPU.</p>')
                continue
            mean = _mean_text(found, "utilization" if what == "gpu" else "cpu_percent")
            heading = f"GPUs: utilisation {mean}" if what == "gpu" else f"Processors: each rank used {mean}"
            name = f"{what}-{place}"
            svg = figures.usage(found, panels, length_s, name)
            out.append(f"<h2>{text_of(title + heading)}</h2>")
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
    if len(found) > figures.LINES_MAX:
        parts.append(f"Of {len(found)} devices the mean is drawn, and the range.")
    return " ".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _energy(runs: Sequence[RunView]) -> list[str]:
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
