"""How many bytes of a long job are done, on stderr: one live line on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_EVERY_S = 30.0


class BytesDone:
    """Progress in bytes on stderr: a bar on a terminal, a line now and then otherwise. Any thread may tell it."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done, self._said_s = what, total, 0, time.monotonic()
        self._lock = threading.Lock()
        from coordinator.terminal import console_for  # no worker rank shows anything: it is spared loading rich

        console = console_for(sys.stderr, live=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> BytesDone:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def more(self, count: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += count
            self._show()

    def at(self, done: int, total: int | None) -> None:
        """So many bytes are done."""
        with self._lock:
            self._done, self._total = done, total
            self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, total=self._total)
        elif time.monotonic() - self._said_s >= PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            of = "" if self._total is None else f" of {self._total / 1e9:,.1f}"
            print(f"llmpi: {self._what}: {self._done / 1e9:,.1f}{of} GB", file=sys.stderr, flush=True)
