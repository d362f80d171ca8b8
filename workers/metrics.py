"""What a rank counts and keeps until the collectives fetch it: rows, histograms, counters, telemetry.

Everything here is about this rank only and adds up over ranks: counters and histogram counts by summation, rows by
concatenation. Starved slots are slots that were free, with nothing assigned to fill them, while unstarted work
existed anywhere: the price of a slow control plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scheduling.histogram import LogHistogram
from scheduling.tables import RANK, REQUEST, TELEMETRY

HISTOGRAMS = ("queue", "ttft", "tpot", "itl", "e2e")
_BLOCK_ROWS = 4096


class RowBuffer:
    """Rows of one record type, appended as tuples and kept packed."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._blocks: list[npt.NDArray[Any]] = []
        self._recent: list[tuple[Any, ...]] = []

    def append(self, row: tuple[Any, ...]) -> None:
        self._recent.append(row)
        if len(self._recent) >= _BLOCK_ROWS:
            self._pack()

    def rows(self) -> npt.NDArray[Any]:
        """All rows so far, shape (n,)."""
        self._pack()
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0] if self._blocks else np.zeros(0, self._dtype)

    def _pack(self) -> None:
        if self._recent:
            self._blocks.append(np.array(self._recent, self._dtype))
            self._recent = []


class RankMetrics:
    """Counters of one rank for one session."""

    def __init__(self, rank: int, session: int, host: str) -> None:
        self.rank = rank
        self.session = session
        self.host = host
        self.device = ""
        self.requests = RowBuffer(REQUEST)
        self.telemetry = RowBuffer(TELEMETRY)
        self.itl = LogHistogram()
        self.finished = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.busy_s = 0.0
        self.slot_s = 0.0
        self.starved_slot_s = 0.0
        self.open_slot_s = 0.0
        self.steps = 0
        self.decode_s = 0.0
        self.sample_s = 0.0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.ready_at: float | None = None
        self._slots = 0
        self._since = 0.0

    def engine_ready(self, slots: int, now: float) -> None:
        if self.ready_at is None:
            self.ready_at = now
        self._slots = slots
        self._since = now

    def engine_gone(self, held: int, work_exists: bool, now: float) -> None:
        """From now on there are no slots, until the engine is ready again."""
        self.pass_time(held, work_exists, now)
        self._slots = 0

    def pass_time(self, held: int, work_exists: bool, now: float) -> None:
        """Account for the slots since the last call; `held` requests were with this rank all the while."""
        elapsed_s = now - self._since
        if elapsed_s <= 0:  # an event within the turn was accounted for already
            return
        if self._slots and work_exists:
            self.open_slot_s += self._slots * elapsed_s
            if held < self._slots:
                self.starved_slot_s += (self._slots - held) * elapsed_s
        self._since = now

    def rank_row(self, now: float) -> npt.NDArray[Any]:
        """This rank's row of the rank table, shape (1,). Steals and restarts are filled in by rank 0."""
        row = np.zeros(1, RANK)
        row["rank"], row["session"] = self.rank, self.session
        row["host"], row["device"] = fitted(self.host, RANK["host"]), fitted(self.device, RANK["device"])
        row["requests"], row["failed"] = self.finished, self.failed
        row["prompt_tokens"], row["cached_tokens"] = self.prompt_tokens, self.cached_tokens
        row["output_tokens"] = self.output_tokens
        row["busy_s"], row["slot_s"], row["starved_slot_s"] = self.busy_s, self.slot_s, self.starved_slot_s
        row["open_slot_s"] = self.open_slot_s
        row["wall_s"] = 0.0 if self.ready_at is None else now - self.ready_at
        row["steps"] = self.steps
        row["drafted_tokens"], row["accepted_tokens"] = self.drafted_tokens, self.accepted_tokens
        return row

    def histograms(self) -> npt.NDArray[np.int64]:
        """Counts of this rank, shape (len(HISTOGRAMS), BUCKETS), in the order of HISTOGRAMS. Ended well only."""
        rows = self.requests.rows()
        rows = rows[rows["ok"] == 1]
        counts = []
        for name in HISTOGRAMS:
            if name == "itl":
                counts.append(self.itl.counts)
                continue
            histogram = LogHistogram()
            values = rows[f"{name}_s"]
            histogram.add(values[~np.isnan(values)])
            counts.append(histogram.counts)
        return np.stack(counts)


def fitted(text: str, dtype: np.dtype[Any]) -> bytes:
    """`text` in UTF-8, cut to the field's bytes without breaking a character."""
    return text.encode("utf-8", "replace")[: dtype.itemsize].decode("utf-8", "ignore").encode()
