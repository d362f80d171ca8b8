"""Drawing with matplotlib for a page: figures as SVG texts that stand in it, coloured by the page.

Colours are placeholders that become CSS variables, so that a picture follows the page into the dark; texts stay texts,
in the page's font. One unit of a picture is one pixel of the page at its natural width. Nothing here
grows with the number of requests. matplotlib is imported when a picture is made.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.page.ticks import duration_ticks
from scheduling.wording import printable
from storage.timeline import Timeline

INK, MUTED, GRID, PAPER = "#000101", "#000202", "#000303", "#000404"
COLOURS = 8
WIDTH = 680
NAME_MAX = 22
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

Floats = npt.NDArray[np.float64]

_PRECISE = re.compile(r"\d+\.\d\d+")


def available() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def colour(place: int) -> str:
    """The placeholder of the colour of a rank, run or device; they repeat after COLOURS."""
    return f"#00{place % COLOURS + 16:02x}05"


def dash(place: int) -> Any:
    """The dashes of a line: runs can be told apart without their colours."""
    return DASHES[place % len(DASHES)]


# ---------------------------------------------------------------- from a figure to a piece of a page


def new_figure(
    width: float, height: float, rows: int = 1, ratios: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0].tolist()
    for one in axes:
        one.set_facecolor("none")
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        one.spines["bottom"].set_color(MUTED)
        one.tick_params(colors=MUTED, labelsize=11, length=3, width=0.8, color=MUTED, which="both")
        one.tick_params(axis="y", length=0)
        one.grid(axis="y", color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def set_margins(figure: Any, width: float, height: float, left: float, right: float, top: float, bottom: float) -> None:
    """Margins in units, so that they are the same whatever the figure's size."""
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=0.32)


def svg_of(figure: Any, name: str) -> str:
    """The figure's SVG element alone, its ids its own (`name`), its colours the page's."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 0.2}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _PRECISE.sub(_short, found[0]), text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font: (\d+|bold) ([\d.]+px) [^;\"]*", r"font: \1 \2 var(--font)", text)
    for placeholder, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        text = text.replace(placeholder, f"var(--{variable})")
    for place in range(COLOURS):
        text = text.replace(colour(place), f"var(--c{place})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _short(found: re.Match[str]) -> str:
    """A coordinate to a tenth of a pixel: half the page's bytes."""
    return f"{float(found[0]):.1f}"


# ---------------------------------------------------------------- what panels share


def write_name(axes: Any, name: str, where: tuple[float, float], **options: Any) -> None:
    """At `where` of the panel, in shares of it. Whatever a folder or a host is called stands there as it is: dollars
    begin no formula, and what is no character has a sign of its own."""
    axes.annotate(
        printable(name), where, xycoords="axes fraction", textcoords="offset points", parse_math=False, **options
    )


def names_below(axes: Any, names: Sequence[tuple[int, str]]) -> None:
    """Names of runs in their colours, in the lower right, where no curve comes: these rise to the left of it."""
    for line, (place, name) in enumerate(reversed(names)):
        write_name(axes, _cut(name), (1, 0), xytext=(-2, 6 + 15 * line), fontsize=12, ha="right", color=colour(place),
                   zorder=5)  # fmt: skip


def names_above(axes: Any, names: Sequence[tuple[int, str]]) -> None:
    """Names of runs in their colours, in the line of the panel's title, from the right."""
    at = 0.0
    for place, name in reversed(names):
        write_name(axes, _cut(name), (1, 1), xytext=(-at, 6), fontsize=12, ha="right", color=colour(place))
        at += 7.5 * len(_cut(name)) + 14
        if at > WIDTH - 320:
            return


def _cut(name: str) -> str:
    return name if len(name) <= NAME_MAX else name[: NAME_MAX - 1] + "…"


def few_ticks(*, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, steps=[1, 2, 5, 10], integer=integer)


def titled(axes: Any, title: str) -> None:
    axes.annotate(title, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=12,
                  color=INK)  # fmt: skip


def breaks(axes: Any, line: Timeline, *, told_over_s: float | None = None) -> None:
    """Where jobs begin. `told_over_s`: the axis's length, where they are to be named; those without room are not."""
    free_s = 0.0
    for session, at in line.breaks_s.items():
        axes.axvline(at, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        if told_over_s is not None and at >= free_s:
            text = f"job {session + 1}"
            axes.annotate(text, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, 4),
                          textcoords="offset points", fontsize=11, color=MUTED)  # fmt: skip
            free_s = at + (7 * len(text) + 6) * told_over_s / (WIDTH - 160)


def time_axis(axes: Any, length_s: float) -> None:
    axes.set_xlim(0, length_s)
    ticks, texts, unit = duration_ticks(length_s)
    axes.set_xticks(ticks, texts)
    axes.set_xlabel(f"time since the start, {unit}", fontsize=11, color=MUTED)
