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
from workers.protocol import Stats

HISTOGRAMS = ("queue", "ttft", "tpot", "itl", "e2e")
_BLOCK_ROWS = 4096


class RowBuffer:
    """Rows of one record type, appended as tuples and kept packed, in blocks: they are never copied as a whole."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._blocks: list[npt.NDArray[Any]] = []
        self._recent: list[tuple[Any, ...]] = []

    def append(self, row: tuple[Any, ...]) -> None:
        self._recent.append(row)
        if len(self._recent) >= _BLOCK_ROWS:
            self._pack()

    def extend(self, rows: npt.NDArray[Any]) -> None:
        """Append rows that are packed already; they are kept, not copied."""
        self._pack()
        self._blocks.append(rows)

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._recent)

    def blocks(self) -> list[npt.NDArray[Any]]:
        """All rows so far, in order, each block of shape (n,)."""
        recent = [np.array(self._recent, self._dtype)] if self._recent else []
        return self._blocks + recent

    def rows(self) -> npt.NDArray[Any]:
        """All rows so far, copied, shape (n,)."""
        return np.concatenate([np.zeros(0, self._dtype), *self.blocks()])

    def clear(self) -> None:
        self._blocks, self._recent = [], []

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

    def count_steps(self, stats: Stats) -> None:
        """What the engine has counted since it last said so."""
        self.steps += stats.steps
        self.busy_s += stats.busy_s
        self.slot_s += stats.slot_s
        self.drafted_tokens += stats.drafted_tokens
        self.accepted_tokens += stats.accepted_tokens
        self.itl.add_sparse(stats.itl_buckets, stats.itl_counts)

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
        merged = {name: LogHistogram() for name in HISTOGRAMS if name != "itl"}
        for rows in self.requests.blocks():
            for name, histogram in merged.items():
                values = rows[f"{name}_s"]
                histogram.add(values[(rows["ok"] == 1) & ~np.isnan(values)])
        return np.stack([(merged.get(name) or self.itl).counts for name in HISTOGRAMS])

    def extremes_s(self) -> tuple[float, float]:
        """Smallest and largest end-to-end time of requests that ended well; inf and -inf without any."""
        shortest_s, longest_s = np.inf, -np.inf
        for rows in self.requests.blocks():
            ended_well = rows["e2e_s"][rows["ok"] == 1]
            if ended_well.size:
                shortest_s = min(shortest_s, float(ended_well.min()))
                longest_s = max(longest_s, float(ended_well.max()))
        return shortest_s, longest_s


def fitted(text: str, dtype: np.dtype[Any]) -> bytes:
    """`text` in UTF-8, cut to the field's bytes without breaking a character."""
    return text.encode("utf-8", "replace")[: dtype.itemsize].decode("utf-8", "ignore").encode()
