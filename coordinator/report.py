"""What a run was like, for people and for programs: read from metrics.h5 and printed as tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.durations import duration
from coordinator.sentences import (
    collectives_sentence,
    energy_sentence,
    missing_sentence,
    uncounted_sentence,
    unread_sentence,
)
from coordinator.simulated import WARNING
from coordinator.terminal import NARROW_COLUMNS, console_for
from scheduling.histogram import LogHistogram
from scheduling.recordline import decode_row
from scheduling.vectors import from_base64
from scheduling.wording import counted
from storage.metrics import Metrics, read_summary, read_telemetry
from storage.recovery import RECORD_NAME, whole_lines
from storage.rundir import METRICS_NAME
from storage.summary import Summary, Sums
from storage.usage import energy

ANSWER_CHARACTERS = 300
LATENCY_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "queue_s": "queue", "e2e_s": "end-to-end"}
PERCENTILES = ("p50", "p95", "p99")
OVER_JOB, OVER_RECORD = "wall time of the last job", "until the last recorded request ended"
"""What the rates of a run are over: the second where no job on it has ended in order."""
REASONS = 3
"""Why requests failed: so many reasons are shown, ..."""
REASONS_COUNTED = 10_000
"""... of so many different ones at most."""


def report_data(run_dir: Path, metrics: Metrics | None = None) -> dict[str, Any]:
    """The figures of a run as plain data. Percentiles in seconds with their sample counts.

    `metrics`: its metrics.h5, where that has been read already.

    Raises:
        RunDirError: there is no metrics.h5, or it cannot be read.
    """
    metrics = metrics or read_summary(run_dir / METRICS_NAME)
    summary, attributes = metrics.summary, metrics.attributes
    over_s, over = _over(metrics)
    return {
        "run_dir": str(run_dir),
        "requests": summary.sums.requests,
        "ok": summary.ok,
        "failed": summary.failed,
        "prompt_tokens": summary.prompt_tokens,
        "cached_tokens": summary.cached_tokens,
        "output_tokens": summary.output_tokens,
        "last_session": {name: _plain(value) for name, value in attributes.items()},
        "over_s": _number(over_s),
        "over": OVER_JOB if "wall_s" in attributes else OVER_RECORD,
        "output_tokens_per_s": _number(_per(over.output_tokens, over_s)),
        "prompt_tokens_per_s": _number(_per(over.prompt_tokens, over_s)),
        "requests_per_s": _number(_per(over.requests, over_s)),
        "latencies": latencies_of(summary, metrics.histograms.get("itl")),
        "ranks": [_rank(row) for row in metrics.ranks],
        "uncounted": _uncounted(metrics),
        "record_missing": bool(summary.sums.requests) and not (run_dir / RECORD_NAME).exists(),
        "unread_segment_bytes": int(attributes.get("unread_segment_bytes", 0)),
        "telemetry_samples": metrics.telemetry_samples,
        "energy": _energy(run_dir, metrics) if metrics.telemetry_samples else None,
    }


def latencies_of(summary: Summary, itl: LogHistogram | None) -> dict[str, Any]:
    """Percentiles in seconds with their sample counts, by latency. `itl`: times between tokens."""
    latencies: dict[str, Any] = {
        name: {
            f"p{round(q.q * 100)}": {"value": _number(q.value_s), "samples": q.samples, "supported": q.supported}
            for q in summary.quantiles(name)
        }
        for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s")
    }
    if itl is not None:
        latencies["itl_s"] = {
            f"p{round(q * 100)}": {
                "value": _number(itl.percentile(q)), "samples": itl.count, "supported": itl.count * (1 - q) >= 1,
            }
            for q in (0.5, 0.95, 0.99)
        }  # fmt: skip
    return latencies


def _over(metrics: Metrics) -> tuple[float, Sums]:
    """What rates are of: seconds, and what was done in them. NaN seconds where nothing tells.

    Of the last job that ended in order. If none did, of all that is recorded, until each job's last request ended.
    """
    attributes = metrics.attributes
    if "wall_s" in attributes:
        names = ("requests", "prompt_tokens", "output_tokens")
        return float(attributes["wall_s"]), Sums(**{name: int(attributes.get(name, 0)) for name in names})
    ends_s = metrics.summary.ends_s
    return sum(ends_s.values()) if ends_s else float("nan"), metrics.summary.sums


def _uncounted(metrics: Metrics) -> int:
    """Recorded requests that no counters of ranks have: of jobs killed after the last one that ended in order."""
    ended = metrics.attributes.get("session", -1)
    missing = 0
    for session, recorded in metrics.summary.requests.items():
        if session > ended:
            of_session = metrics.ranks[metrics.ranks["session"] == session]
            missing += max(0, recorded - int(of_session["requests"].sum()))
    return missing


def _energy(run_dir: Path, metrics: Metrics) -> dict[str, Any] | None:
    """Of the GPUs, in the sessions in which it was measured; None if it never was."""
    tokens: Counter[int] = Counter()
    for row in metrics.ranks:
        tokens[int(row["session"])] += int(row["output_tokens"])
    used = energy(read_telemetry(run_dir / METRICS_NAME), metrics.ranks, tokens)
    if used is None:
        return None
    return {
        "joules": _number(used.joules),
        "gpus": used.gpus,
        "output_tokens": used.output_tokens,
        "joules_per_output_token": _number(used.joules_per_output_token),
        "from": "power over time" if used.from_power else "the GPUs' energy counters",
    }


def _rank(row: np.void) -> dict[str, Any]:
    plain = {name: _plain(row[name]) for name in row.dtype.names or ()}
    return plain | {
        "busy_share": _number(_per(float(row["busy_s"]), float(row["wall_s"]))),
        "starved_share": _number(_per(float(row["starved_slot_s"]), float(row["open_slot_s"]))),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return _number(value.item()) if isinstance(value, np.generic) else value


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _per(amount: float, seconds: float) -> float:
    return float(amount) / seconds if seconds > 0 else float("nan")


# ---------------------------------------------------------------- for people


def print_report(data: dict[str, Any], stream: IO[str], run_dir: Path, *, show: int = 0) -> None:
    """Answers (`show` of them), throughput, latencies, ranks, and where everything is."""
    console = console_for(stream)
    if show:
        _print_answers(console, run_dir, show)
    last = data["last_session"]
    earlier = max(0, data["requests"] - last.get("requests", 0))
    took = "an unknown time" if data["over_s"] is None else duration(data["over_s"])
    when = f"{earlier} of them earlier; the last job took" if earlier and data["over"] == OVER_JOB else "in"
    if data["over"] == OVER_RECORD:
        took += f" {OVER_RECORD} (no job on it has ended in order)"
    console.print(
        f"\n{data['ok']} answered, {data['failed']} failed, {when} {took}"
        f" · {figure_text(data['output_tokens_per_s'])} output tokens/s"
        f" · {figure_text(data['prompt_tokens_per_s'])} prompt tokens/s"
        f" · {figure_text(data['requests_per_s'])} requests/s",
        soft_wrap=True,
    )
    if last.get("engine") == "simulated":
        console.print(WARNING, soft_wrap=True)
    if data["cached_tokens"]:
        share = data["cached_tokens"] / data["prompt_tokens"]
        console.print(f"{100 * share:.0f} % of the prompts' tokens were in the cache already", soft_wrap=True)
    console.print()
    console.print(latency_table(data["latencies"]))
    if data["ranks"]:
        console.print()
        ranks = [rank for rank in data["ranks"] if last.get("session") in (None, rank["session"])]
        narrow = console.width < NARROW_COLUMNS
        console.print(_rank_table(ranks, width=console.width))
        # No caption: that would be cut to the width of the table.
        note = "busy: time with a slot in use · starved: free slots, of the slot time in which work waited to start"
        console.print(Text(f"{'in, out: stolen · ' if narrow else ''}{note}", style="dim italic"))
        if last.get("copies"):
            console.print(Text("requests that ran as copies, too, may be counted in two rows", style="dim italic"))
        if who := collectives_sentence(last.get("collectives", "")):
            console.print(f"\n{who}", soft_wrap=True)
        _print_speculation(console, ranks)
        _print_copies(console, last)
    if data["record_missing"]:
        console.print(f"\n{missing_sentence()}", soft_wrap=True)
    if data["uncounted"]:
        console.print(f"\n{uncounted_sentence(data)}", soft_wrap=True)
    if data["unread_segment_bytes"]:
        console.print(f"\n{unread_sentence(data)}", soft_wrap=True)
    if lost := last.get("workers_lost"):
        console.print(Text.assemble("\n", ("left before the end", "bold"), f": {lost}"), soft_wrap=True)
    if data["energy"]:
        console.print(f"\n{energy_sentence(data['energy'])}", soft_wrap=True)
    if data["failed"]:
        _print_failures(console, run_dir, data["failed"])
    console.print(f"\nrun directory: {run_dir}", soft_wrap=True, markup=False)


def failure_reasons(run_dir: Path) -> list[tuple[int, str, str]]:
    """Why requests failed, the commonest REASONS reasons: how many, the custom_id of one, the reason, cut if long."""
    if not (run_dir / RECORD_NAME).exists():
        return []
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for line in whole_lines(run_dir / RECORD_NAME):
        row = decode_row(line)
        if row.error is not None and (row.error.message in counts or len(counts) < REASONS_COUNTED):
            counts[row.error.message] += 1
            example.setdefault(row.error.message, row.custom_id)
    return [(count, example[reason], _cut(reason)) for reason, count in counts.most_common(REASONS)]


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else text[:ANSWER_CHARACTERS] + "…"


def _print_failures(console: Console, run_dir: Path, failed: int) -> None:
    """Why requests failed: the commonest reasons, each with one of its requests."""
    if not (run_dir / RECORD_NAME).exists():
        return
    reasons = failure_reasons(run_dir)
    console.print()
    for count, custom_id, reason in reasons:
        console.print(Text.assemble((f"{count} failed", "bold"), f" ({custom_id}): {reason}"), soft_wrap=True)
    others = failed - sum(count for count, _, _ in reasons)
    if others > 0:
        console.print(f"{others} failed for other reasons: see error in {RECORD_NAME}", soft_wrap=True, markup=False)


def _print_speculation(console: Console, ranks: list[dict[str, Any]]) -> None:
    # Older versions did not count them: then they are not there, or -1.
    drafted, accepted = (sum(max(0, row.get(f"{name}_tokens", 0)) for row in ranks) for name in ("drafted", "accepted"))
    if drafted:
        share = percent_text(accepted / drafted)
        console.print(f"\nspeculation: {accepted:,} of {drafted:,} drafted tokens were right ({share})")


def _print_copies(console: Console, last: dict[str, Any]) -> None:
    if last.get("copies"):
        won, wasted = last["copies_won"], last["wasted_tokens"]
        console.print(
            f"\ncopies: {counted(last['copies'], 'request')} of slow ranks started again on idle ones, {won:,} of them "
            f"answered there first · {counted(wasted, 'output token')} made in vain",
            soft_wrap=True,
        )


def _print_answers(console: Console, run_dir: Path, count: int) -> None:
    for line in whole_lines(run_dir / RECORD_NAME):
        if count == 0:
            return
        entry = json.loads(line)
        if entry["error"] is not None:
            continue
        text = " ".join(_answer_text(entry["response"]["body"]).split())
        if len(text) > ANSWER_CHARACTERS:
            text = text[:ANSWER_CHARACTERS] + "…"
        # As `Text`: answers are full of brackets and backslashes, which would be read as markup.
        console.print(Text.assemble((entry["custom_id"], "bold"), "  ", text))
        count -= 1


def _answer_text(body: dict[str, Any]) -> str:
    """What to show of an answer: its first choice, each continuation with what its tokens' log-probabilities add up to,
    or the beginning of its first embedding.
    """
    if "choices" not in body:
        first = body["data"][0]["embedding"]
        vector = from_base64(first).tolist() if isinstance(first, str) else first
        begin = ", ".join(f"{value:.4f}" for value in vector[:4])
        others = f" and {len(body['data']) - 1} more" if len(body["data"]) > 1 else ""
        return f"[{begin}, …] of {len(vector)} numbers{others}"
    choice = body["choices"][0]
    if "llmpi" in choice:
        return " · ".join(f"{one['text'].strip()} {one['llmpi']['logprob']:.2f}" for one in body["choices"])
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def latency_table(latencies: dict[str, Any]) -> Table:
    """Of what `latencies_of` gives."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("latency")
    for title in ("P50", "P95", "P99", "samples"):
        table.add_column(title, justify="right")
    for key, title in LATENCY_NAMES.items():
        values = latencies.get(key)
        if values is None:
            continue
        cells = [time_cell(values, p) for p in PERCENTILES]
        table.add_row(title, *cells, str(values["p50"]["samples"]))
    if any(values["p99"]["samples"] and not values["p99"]["supported"] for values in latencies.values()):
        table.caption = "* too few samples to support this percentile"
        table.caption_justify = "left"
    return table


def _rank_table(ranks: list[dict[str, Any]], *, width: int) -> Table:
    """In `width` columns: on a narrow terminal words are shorter, a host that is everybody's is left out, and long
    devices are cut."""
    narrow = width < NARROW_COLUMNS
    with_host = not narrow or len({row["host"] for row in ranks}) > 1
    tokens, stolen = ("tokens", "in") if narrow else ("output tokens", "stolen in")
    jobs = len({row["session"] for row in ranks}) > 1
    titles = [*(["job"] if jobs else []), "rank", *(["host"] if with_host else []), "device"]
    at, left = len(titles) - 1, {"host", "device"}
    titles += ["requests", "failed", tokens, "busy", "starved", stolen, "out"]
    cells = [
        [
            *([str(row["session"] + 1)] if jobs else []),
            str(row["rank"]), *([row["host"]] if with_host else []), row["device"], str(row["requests"]),
            str(row["failed"]), str(row["output_tokens"]), percent_text(row["busy_share"]),
            share_text(row["starved_share"]), str(row["stolen_in"]), str(row["stolen_out"]),
        ]
        for row in ranks
    ]  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold")
    taken = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    room = width - (sum(taken) - taken[at]) - 2 * (len(titles) - 1)
    for place, title in enumerate(titles):
        most = max(len(title), room) if place == at else None
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True, max_width=most)
    for row in cells:
        table.add_row(*row)
    return table


def figure_text(value: float | None) -> str:
    """A rate: whole from 100 on, else with one decimal; below 1 with two digits that say something (0.028)."""
    if value is None:
        return "?"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.95 or value < 0.0001 else f"{float(f'{value:.2g}'):.6f}".rstrip("0")


def time_cell(values: dict[str, Any], percentile: str) -> str:
    """One percentile of a latency with its unit; a star says that there are too few samples for it."""
    value_s, supported = values[percentile]["value"], values[percentile]["supported"]
    longest_s = max(values[p]["value"] or 0 for p in PERCENTILES)
    if value_s is None:
        return "-"
    if longest_s < 1:
        text = f"{value_s * 1000:.1f} ms"
    else:
        text = f"{value_s:.1f} s" if longest_s >= 10 else f"{value_s:.2f} s"
    return text if supported else f"{text} *"


def percent_text(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def state_text(complete: bool, running: bool, failed: int) -> str:
    """How a run ended, or that it has not."""
    if complete:
        return "complete, all answered" if not failed else f"complete, {failed:,} failed"
    return "still running" if running else "not complete: the same command resumes it"
