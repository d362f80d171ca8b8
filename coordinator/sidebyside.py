"""Several runs side by side: a row for each figure, a column for each run, ratios to the first run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any

from rich.table import Table
from rich.text import Text

from coordinator.durations import duration
from coordinator.report import LATENCY_NAMES, figure_text, percent_text, time_cell
from coordinator.terminal import console_for

Named = Sequence[tuple[str, dict[str, Any]]]


def comparison(runs: Named) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the table. `runs`: names, and what `report_data` says of each."""
    rows = [
        _row("answered", runs, lambda data: data["ok"], lambda value: f"{value:,}", ratio=False),
        _row("failed", runs, lambda data: data["failed"], lambda value: f"{value:,}", ratio=False),
        _row(_over(runs), runs, lambda data: data["over_s"], duration),
        _row("output tokens/s", runs, lambda data: data["output_tokens_per_s"], figure_text),
        _row("prompt tokens/s", runs, lambda data: data["prompt_tokens_per_s"], figure_text),
        _row("requests/s", runs, lambda data: data["requests_per_s"], figure_text),
    ]
    for latency, title in LATENCY_NAMES.items():
        rows += [_latency_row(f"{title} {q.upper()}", runs, latency, q) for q in ("p50", "p95", "p99")]
        rows.append(_row(f"{title} samples", runs, partial(_samples, latency=latency), lambda n: f"{n:,}",
                         ratio=False))  # fmt: skip
    rows += [
        _row("busy, all ranks", runs, _busy, percent_text, ratio=False),
        _row("stolen", runs, lambda data: data["last_session"].get("stolen"), lambda value: f"{value:,}", ratio=False),
        _row("copied", runs, lambda data: data["last_session"].get("copies"), lambda value: f"{value:,}", ratio=False),
        _row("J an output token", runs, _joules, lambda value: f"{value:.3g}"),
    ]
    return ("", *(name for name, _ in runs)), rows


def print_comparison(runs: Named, stream: IO[str]) -> None:
    head, rows = comparison(runs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in head[1:]:
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    table.caption = "×: ratio to the first run · *: too few samples to support this percentile"
    table.caption_justify = "left"
    console_for(stream).print(table)


def _over(runs: Named) -> str:
    """What the rates of `runs` are over."""
    return ", or ".join(dict.fromkeys(data["over"] for _, data in runs))


def _row(
    title: str, runs: Named, of: Callable[[dict[str, Any]], Any], shown: Callable[[Any], str], *, ratio: bool = True
) -> tuple[str, ...]:
    values = [of(data) for _, data in runs]
    return (title, *_cells(values, ["-" if value is None else shown(value) for value in values], ratio))


def _latency_row(title: str, runs: Named, latency: str, q: str) -> tuple[str, ...]:
    found = [data["latencies"].get(latency) for _, data in runs]
    values = [None if of_run is None else of_run[q]["value"] for of_run in found]
    return (title, *_cells(values, ["-" if of_run is None else time_cell(of_run, q) for of_run in found], True))


def _cells(values: Sequence[Any], texts: Sequence[str], ratio: bool) -> list[str]:
    first = values[0]
    return [
        f"{text} (×{value / first:.2f})" if ratio and place and value is not None and first else text
        for place, (value, text) in enumerate(zip(values, texts, strict=True))
    ]


def _samples(data: dict[str, Any], latency: str) -> int | None:
    values = data["latencies"].get(latency)
    return None if values is None else int(values["p50"]["samples"])


def _busy(data: dict[str, Any]) -> float | None:
    """Busy time over wall time of all ranks of the last job."""
    session = data["last_session"].get("session")
    ranks = [rank for rank in data["ranks"] if session in (None, rank["session"])]
    wall_s = sum(rank["wall_s"] or 0.0 for rank in ranks)
    return sum(rank["busy_s"] or 0.0 for rank in ranks) / wall_s if wall_s else None


def _joules(data: dict[str, Any]) -> float | None:
    value: float | None = (data["energy"] or {}).get("joules_per_output_token")
    return value
