"""When a run did what: rows of requests laid out over time, in bins, whatever their number.

A request ran from `end_s - e2e_s + queue_s` to `end_s` on its rank's clock, which counts from rank 0's welcome. Bins
hold integrals, not samples, so that nothing is lost between two of them: a running request adds to a bin the part of it
in which it ran, and an answer's tokens are spread evenly from its first token to its end. Sums over bins are exact.
Sessions (jobs on the same run) stand one behind the other, without the time between them. Memory does not grow with
the requests. Knows arrays, not files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from storage.summary import Rows, last_ends_s

BINS = 2000
"""Finer than the pixels of a picture."""
MARKS_MAX = 2000
"""Steals, and copies, that are kept one by one for a rank; all are counted."""

SHORTEST_S = 1e-9
"""A shorter run has no time to be laid out over: no clock tells its bins apart."""

Floats = npt.NDArray[np.float64]


@dataclass
class Lane:
    """One rank. Arrays have a number per bin."""

    running: Floats
    """Requests in a slot, on average over the bin."""
    tokens: Floats
    """Output tokens made in the bin."""
    requests: int = 0
    steals: list[tuple[float, int]] = field(default_factory=list)
    """When stolen requests came (seconds), and from which rank: the first MARKS_MAX."""
    stolen_in: int = 0
    copies: list[tuple[float, int, bool]] = field(default_factory=list)
    """When copies of stragglers were started here, on which rank these ran, and whether the copy answered first."""
    copied_in: int = 0
    copies_won: int = 0

    @property
    def full(self) -> float:
        """How many requests ran at once when there were many: P98 of the bins in which any did; 0 if none ever did.

        Not the most: a rank that hears late of an end puts a request's time beside that of the next one in its slot.
        """
        some = self.running[self.running > 0]
        return float(np.quantile(some, 0.98)) if some.size else 0.0


@dataclass(frozen=True)
class Timeline:
    """A run over time. `breaks_s`: where a session after the first begins. `untimed`: rows without `end_s`."""

    length_s: float
    breaks_s: dict[int, float]
    lanes: dict[int, Lane]
    untimed: int

    @property
    def bin_s(self) -> float:
        return self.length_s / BINS

    @property
    def running(self) -> Floats:
        """Requests running on all ranks, per bin."""
        return np.sum([lane.running for lane in self.lanes.values()], axis=0) if self.lanes else np.zeros(BINS)

    @property
    def tokens(self) -> Floats:
        """Output tokens of all ranks, per bin."""
        return np.sum([lane.tokens for lane in self.lanes.values()], axis=0) if self.lanes else np.zeros(BINS)


def coarser(values: Floats, factor: int) -> Floats:
    """Sums of `factor` bins each; BINS must be a multiple of it."""
    sums: Floats = values.reshape(-1, factor).sum(axis=1)
    return sums


def timeline(rows_of: Callable[[], Iterable[Rows]], copies: Rows | None = None) -> Timeline | None:
    """The timeline of chunks of `scheduling.tables.REQUEST`, gone through twice, and of rows of `COPY`; None if nothing
    has a time."""
    ends: dict[int, float] = {}
    untimed = 0
    for rows in rows_of():
        timed = "end_s" in (rows.dtype.names or ())
        untimed += int(np.isnan(rows["end_s"]).sum()) if timed else len(rows)
        for session, latest in last_ends_s(rows).items():
            ends[session] = max(ends.get(session, 0.0), latest)
    if not ends:
        return None
    starts_s, length_s = {}, 0.0
    for session in sorted(ends):
        starts_s[session] = length_s
        length_s += ends[session]
    if length_s < SHORTEST_S:
        return None
    drawing = _Drawing(length_s, starts_s)
    for rows in rows_of():
        if "end_s" in (rows.dtype.names or ()):
            drawing.add(rows[~np.isnan(rows["end_s"])])
    if copies is not None:
        drawing.add_copies(copies, ends)
    breaks = {session: at for session, at in starts_s.items() if at > 0}
    return Timeline(length_s, breaks, drawing.lanes(), untimed)


class _Drawing:
    """Adds rows up, a rank at a time."""

    def __init__(self, length_s: float, starts_s: dict[int, float]) -> None:
        self._length_s = length_s
        self._starts_s = starts_s
        self._running: dict[int, Floats] = {}
        self._tokens: dict[int, Floats] = {}
        self._lanes: dict[int, Lane] = {}

    def add(self, rows: Rows) -> None:
        for rank in np.unique(rows["rank"]).tolist():
            self._add(rank, rows[rows["rank"] == rank])

    def _add(self, rank: int, rows: Rows) -> None:
        lane = self._lane(rank)
        first = np.array([self._starts_s[session] for session in rows["session"].tolist()])
        end = first + rows["end_s"]
        # A clock's rounding must not put a beginning before the session.
        received = np.maximum(end - rows["e2e_s"], first)
        start = np.minimum(np.maximum(end - rows["e2e_s"] + rows["queue_s"], first), end)
        self._spread(self._running[rank], start, end, end - start)
        told = rows["output_tokens"] > 0
        ttft = np.nan_to_num(rows["ttft_s"][told], nan=0.0)
        begin = np.minimum(received[told] + ttft, end[told])
        self._spread(self._tokens[rank], begin, end[told], rows["output_tokens"][told].astype(np.float64))
        lane.requests += len(rows)
        stolen = rows["stolen_from"] >= 0
        lane.stolen_in += int(stolen.sum())
        room = MARKS_MAX - len(lane.steals)
        if room > 0 and stolen.any():
            victims = rows["stolen_from"][stolen].tolist()
            lane.steals += list(zip(received[stolen].tolist(), victims, strict=True))[:room]

    def add_copies(self, rows: Rows, ends_s: dict[int, float]) -> None:
        """Copies of sessions that last until `ends_s`: what comes later, in a job that was killed, is counted only."""
        for row in rows[np.argsort(rows["start_s"], kind="stable")]:
            lane, session, won = self._lane(int(row["rank"])), int(row["session"]), bool(row["won"] == 1)
            lane.copied_in += 1
            lane.copies_won += won
            if row["start_s"] <= ends_s.get(session, -1.0) and len(lane.copies) < MARKS_MAX:
                at = self._starts_s[session] + float(row["start_s"])
                lane.copies.append((at, int(row["copied_from"]), won))

    def _lane(self, rank: int) -> Lane:
        if rank not in self._lanes:
            self._lanes[rank] = Lane(np.zeros(BINS), np.zeros(BINS))
            # What is known at each edge: the integral of everything that came before it.
            self._running[rank], self._tokens[rank] = np.zeros((2, BINS + 1)), np.zeros((2, BINS + 1))
        return self._lanes[rank]

    def _spread(self, edges: Floats, start: Floats, end: Floats, amount: Floats) -> None:
        """Spread each `amount` evenly over [start, end]. `edges`: two sums per edge, of which `_per_bin` makes bins.

        An even ramp from start to end is, at edge e: rate * ((e - start)+ - (e - end)+), so it suffices to sum
        the rates and the rates times the times that came before each edge. What takes no time is put
        into its bin whole.
        """
        bin_s = self._length_s / BINS
        short = end - start < 1e-3 * bin_s
        if short.any():
            places = np.clip((end[short] / bin_s).astype(np.int64), 0, BINS - 1)
            edges[1] += np.bincount(places + 1, amount[short], BINS + 1)
        long = ~short
        if not long.any():
            return
        rate = amount[long] / (end[long] - start[long])
        for times, sign in ((start[long], 1.0), (end[long], -1.0)):
            places = np.clip(np.ceil(times / bin_s).astype(np.int64), 0, BINS)
            edges[0] += sign * np.bincount(places, rate, BINS + 1)
            edges[1] -= sign * np.bincount(places, rate * times, BINS + 1)

    def _per_bin(self, edges: Floats) -> Floats:
        at = np.linspace(0.0, self._length_s, BINS + 1)
        integral = np.cumsum(edges[0]) * at + np.cumsum(edges[1])
        bins: Floats = np.maximum(np.diff(integral), 0.0)
        return bins

    def lanes(self) -> dict[int, Lane]:
        bin_s = self._length_s / BINS
        for rank, lane in self._lanes.items():
            lane.running = self._per_bin(self._running[rank]) / bin_s
            lane.running[lane.running < 1e-6] = 0.0
            lane.tokens = self._per_bin(self._tokens[rank])
            lane.steals.sort()
            lane.copies.sort()
        return dict(sorted(self._lanes.items()))
