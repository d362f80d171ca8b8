"""What the page of a report is put together from: escaped texts, tables, pictures with their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from coordinator.runview import RunView
from scheduling.wording import printable

TEXT_MAX = 4000
_WITH_UNIT = re.compile(r"(?<=\d) (?:ms|s|%)(?: \*)?(?!\w)")


def text_of(value: object) -> str:
    text = str(value)
    text = text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "…"
    return escape(printable(text, "\n\t"))


def sentence_of(value: object) -> str:
    """A text of ours, in which no line ends between a figure and its unit."""
    return _WITH_UNIT.sub(lambda unit: unit[0].replace(" ", "\N{NO-BREAK SPACE}"), text_of(value))


def named(runs: Sequence[RunView], run: RunView) -> str:
    """Whose sentence it is, where there are several runs."""
    return "" if len(runs) == 1 else f"{run.name}: "


def figure_of(svg: str | None, name: str, sentences: str, absent: str, *, kind: str = "wide") -> str:
    """A picture over the sentences that say what it shows; these alone where there is nothing to draw."""
    if svg is None:
        return f'<p class="absent">{text_of(absent)}</p>'
    svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-says"', 1)
    return (
        f'<figure class="{kind}"><div class="frame" tabindex="0">{svg}</div>'
        f'<figcaption id="{name}-says">{sentence_of(sentences)}</figcaption></figure>'
    )


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", left: int = 1) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        made = []
        for place, cell in enumerate(cells):
            kind = ' class="left"' if place < left else ""
            scope = ' scope="col"' if tag == "th" else ' scope="row"' if place == 0 else ""
            name = "th" if place == 0 else tag
            made.append(f"<{name}{kind}{scope}>{text_of(cell)}</{name}>")
        return f"<tr>{''.join(made)}</tr>"

    said = f"<caption>{text_of(caption)}</caption>" if caption else ""
    lines = "\n".join(row(cells, "td") for cells in rows)
    table = f"<table>{said}<thead>{row(head, 'th')}</thead><tbody>\n{lines}\n</tbody></table>"
    return f'<div class="frame" tabindex="0">{table}</div>'


def untimed(runs: Sequence[RunView]) -> list[str]:
    """What cannot be drawn, and why."""
    parts = []
    for run in runs:
        if run.timeline is None:
            why = "nothing has been recorded" if not run.data["requests"] else "no request has a point in time"
            parts.append(f"{named(runs, run)}{'not' if len(runs) > 1 else 'Not'} measured: {why}.")
        elif run.timeline.untimed:
            parts.append(f"{named(runs, run)}{run.timeline.untimed:,} requests without a point in time are not drawn.")
    return parts
