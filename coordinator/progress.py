"""What a person sees while a job runs: a live line on a terminal, a plain line now and then otherwise.

Fed with `Snapshot`s four times a second. Rates are over the last ten seconds, so that a change shows; that of requests
is over the whole run where too few ended in these, and so is the ETA. Nothing else may write to the same stream while
it is live: what there is to say goes through `note` and `warn`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import IO

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from coordinator.callbacks import Snapshot
from coordinator.durations import duration
from coordinator.terminal import NARROW_COLUMNS, console_for

PLAIN_FIRST_S = 10.0
PLAIN_EVERY_S = 30.0
RATE_WINDOW_S = 10.0
RATE_REQUESTS = 5
"""Fewer that ended in the last seconds make no rate: that of the whole run is shown."""


class ProgressView:
    """Shows snapshots on `stream`. `close` leaves the last state standing. `quiet`: only warnings are shown."""

    def __init__(self, stream: IO[str], *, quiet: bool = False) -> None:
        self._console = console_for(stream, live=True)
        terminal = self._console.is_terminal
        self._narrow = terminal and self._console.width < NARROW_COLUMNS
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._quiet = quiet
        self._over = False
        self._said_plain = False
        self._plain_at = time.monotonic() + PLAIN_FIRST_S
        self._window: deque[tuple[float, int, int]] = deque()
        if terminal and not quiet:
            begin = [] if self._narrow else [TextColumn("{task.description}")]
            self._live = Progress(
                *begin,
                BarColumn(bar_width=10 if self._narrow else 24),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                transient=False,
                refresh_per_second=8,
            )

    def show(self, snapshot: Snapshot) -> None:
        if self._quiet:
            return
        numbers = self._numbers(snapshot)
        if self._live is None:
            now = time.monotonic()
            if now >= self._plain_at:
                self._plain_at = now + PLAIN_EVERY_S
                self._said_plain = True
                self._console.print(numbers, soft_wrap=True)
            return
        ended = snapshot.earlier + snapshot.done + snapshot.failed
        if self._task is None:
            self._task = self._live.add_task("loading", total=snapshot.total, numbers="")
            self._live.start()
        loading = snapshot.workers_ready == 0
        self._live.update(
            self._task, description="loading model" if loading else "requests", completed=ended,
            total=snapshot.total, numbers="loading model" if loading and self._narrow else numbers,
        )  # fmt: skip

    def note(self, text: str) -> None:
        """A line for people, above the live one: what goes on, as it should."""
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """The same of what is not as it should be, or not as was asked for."""
        self._console.print(text, soft_wrap=True, markup=False)

    def close(self, snapshot: Snapshot | None = None) -> None:
        self._over = True
        if self._live is not None and self._task is not None:
            if snapshot is not None:
                self.show(snapshot)
            self._live.stop()
            self._live = None
        elif self._said_plain and snapshot is not None:
            self._console.print(self._numbers(snapshot), soft_wrap=True)
            self._said_plain = False

    def _numbers(self, s: Snapshot) -> str:
        ended = s.done + s.failed
        # Where nothing is generated what is read counts.
        self._window.append((s.elapsed_s, ended, s.made_tokens or s.prompt_tokens))
        while len(self._window) > 2 and s.elapsed_s - self._window[0][0] > RATE_WINDOW_S:
            self._window.popleft()
        since_s, ended_then, tokens_then = self._window[0]
        span_s = max(1e-9, s.elapsed_s - since_s)
        tokens_s = max(0, self._window[-1][2] - tokens_then) / span_s if span_s >= 0.5 else 0.0
        recent = ended - ended_then
        rate = recent / span_s if span_s >= 0.5 and recent >= RATE_REQUESTS else ended / max(0.5, s.elapsed_s)
        total = f"/{s.total}" if s.total is not None else ""
        parts = [f"{s.earlier + ended}{total} done"]
        if s.failed:
            parts.append(f"{s.failed} failed")
        left = s.queued if s.total is None else max(0, s.total - s.earlier - ended - s.running)
        run, wait, requests, tokens = _NARROW if self._narrow else _WIDE
        parts += [f"{s.running} {run}", f"{left} {wait}"]
        if ended:
            parts.append(rate_text(rate, requests))
        parts.append(f"{tokens_s:.{0 if tokens_s >= 10 or not tokens_s else 1}f} {tokens}/s")
        if not self._over:
            parts.append("draining" if s.draining else f"ETA {duration(self._eta_s(s, ended))}")
        return " · ".join(parts)

    @staticmethod
    def _eta_s(s: Snapshot, ended: int) -> float | None:
        if s.total is None or not ended or s.elapsed_s <= 0:
            return None
        return (s.total - s.earlier - ended) * s.elapsed_s / ended


_WIDE = ("running", "queued", "requests", "tokens")
_NARROW = ("run", "wait", "req", "tok")


def rate_text(per_s: float, what: str) -> str:
    """In the unit of time that leaves a figure before the point: slow models end some requests an hour."""
    for unit, seconds in (("s", 1.0), ("min", 60.0)):
        if per_s * seconds >= 1:
            return f"{per_s * seconds:.1f} {what}/{unit}"
    return f"{per_s * 3600:.1f} {what}/h"
