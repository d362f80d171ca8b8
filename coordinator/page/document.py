"""A report as one HTML page that stands alone: pictures, the sentences that say what they show, and the tables.

Nothing is fetched: style and pictures are in the page, there are no scripts. It follows the reader's light or dark mode
through CSS variables, and is as readable on a phone (wide pictures scroll inside their frame). Every text that comes
from a run is escaped. All figures are those of `report_data`, in the words of the printed tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.durations import duration
from coordinator.page import devices, latencies, overtime, ranks
from coordinator.page.facts import about, config_of, failures
from coordinator.page.parts import table_of, text_of
from coordinator.page.style import STYLE
from coordinator.report import OVER_JOB, figure_text, state_text
from coordinator.runview import RunView
from coordinator.sidebyside import comparison
from coordinator.simulated import WARNING


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
    for part in (latencies.chapter, overtime.chapter, ranks.chapter, devices.chapter, devices.energy):
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
