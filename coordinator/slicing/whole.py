"""Status, stop and report over all slices of one input together.

What is said of the whole comes from the slices' own records: counts are added, latencies are merged as histograms.
Rates are each slice's own, for their jobs need not have run at the same time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from coordinator.report import figure_text, latencies_of, latency_table, report_data, state_text
from coordinator.statusline import state_line, status_data
from coordinator.terminal import console_for
from coordinator.values import print_json
from scheduling.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_SOME_FAILED, RunDirError
from scheduling.histogram import LogHistogram
from storage.metrics import read_requests, read_summary
from storage.rundir import METRICS_NAME
from storage.runjson import RUN_NAME
from storage.runstatus import Status, request_stop
from storage.runstatus import status as run_status
from storage.summary import Summary


def states_of(dirs: Sequence[Path]) -> list[Status | None]:
    """How far each slice is; None for those that no job has begun."""
    return [run_status(path) if (path / RUN_NAME).exists() else None for path in dirs]


def exit_code(states: Sequence[Status | None]) -> int:
    """0 if all slices are complete and all is answered; 1 if some requests failed; else 3."""
    if not all(found is not None and found.complete for found in states):
        return EXIT_RESUMABLE
    return EXIT_SOME_FAILED if any(found is not None and found.failed for found in states) else EXIT_OK


def show_status(run_dir: Path, dirs: Sequence[Path], as_json: bool) -> int:
    """Print how far the whole is, and each slice that is not complete."""
    states = states_of(dirs)
    begun = [found for found in states if found is not None]
    code = exit_code(states)
    total = sum(found.total or 0 for found in begun)
    counted = len(begun) == len(dirs) and all(found.total is not None for found in begun)
    done, ok = sum(found.done for found in begun), sum(found.ok for found in begun)
    complete, running = sum(found.complete for found in begun), sum(found.running for found in begun)
    if as_json:
        slices = [None if found is None else status_data(found) for found in states]
        print_json(
            {
                "run_dir": str(run_dir), "ok": ok, "failed": done - ok, "done": done,
                "total": total if counted else None, "complete": code != EXIT_RESUMABLE, "running": running > 0,
                "slices": slices, "exit_code": code,
            }
        )  # fmt: skip
        return code
    for path, found in zip(dirs, states, strict=True):
        if found is None:
            print(f"{path}: not begun")
        elif not found.complete:
            print(state_line(found))
    what = f"{complete} of {len(dirs)} slices complete" + (f", {running} running" if running else "")
    print(f"{run_dir}: {done} of {total if counted else '?'} done ({ok} answered, {done - ok} failed), {what}")
    return code


def stop_all(run_dir: Path, dirs: Sequence[Path]) -> list[Path]:
    """Ask every job that works on a slice to drain; returns whose. Raises RunDirError where none does."""
    asked = []
    for path, found in zip(dirs, states_of(dirs), strict=True):
        if found is not None and found.running:
            request_stop(path)
            asked.append(path)
    if not asked:
        raise RunDirError(f"no job is running on a slice of {run_dir}: there is nothing to stop.")
    return asked


def show_report(run_dir: Path, dirs: Sequence[Path], as_json: bool) -> None:
    """A line for each slice, and the latencies of all together. Their metrics.h5 are there."""
    states = states_of(dirs)
    begun = {path: found for path, found in zip(dirs, states, strict=True) if found is not None}
    summary, itl = Summary(), LogHistogram()
    data: dict[Path, dict[str, Any]] = {}
    for path in begun:
        metrics = read_summary(path / METRICS_NAME)
        data[path] = report_data(path, metrics)
        for rows in read_requests(path / METRICS_NAME):
            summary.add(rows)
        if (own := metrics.histograms.get("itl")) is not None:
            itl = LogHistogram(itl.counts + own.counts, itl.sum_s + own.sum_s)
    sums: Counter[str] = Counter()
    for one in data.values():
        sums.update({name: one[name] for name in ("requests", "ok", "failed", "prompt_tokens", "output_tokens")})
    latencies = latencies_of(summary, itl if itl.count else None)
    if as_json:
        print_json({"run_dir": str(run_dir), "slices": list(data.values()), "latencies": latencies, **sums})
        return
    console = console_for(sys.stdout)
    console.print(_slice_table(begun, data))
    missing = len(dirs) - len(begun)
    not_begun = f", {missing} slices not begun" if missing else ""
    console.print(
        f"\n{sums['ok']} answered, {sums['failed']} failed{not_begun} · {sums['output_tokens']:,} output tokens · "
        f"{sums['prompt_tokens']:,} prompt tokens\n",
        soft_wrap=True,
    )
    console.print(latency_table(latencies))
    console.print(f"\nrun directory: {run_dir}", soft_wrap=True, markup=False)


def _slice_table(begun: Mapping[Path, Status], data: Mapping[Path, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("slice")
    for title in ("answered", "failed", "of", "output tokens", "output tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for path, found in begun.items():
        one = data[path]
        total = "?" if found.total is None else str(found.total)
        table.add_row(
            path.name, str(one["ok"]), str(one["failed"]), total, str(one["output_tokens"]),
            figure_text(one["output_tokens_per_s"]), state_text(found.complete, found.running, found.failed),
        )  # fmt: skip
    return table
