"""From rows to the figures that people read: counts, sums and percentiles, from merged histograms only.

Failed requests count as failed and are in no latency. A percentile comes with the number of samples it rests on,
and says whether that number can carry it. Formulas: docs/metrics.md. Knows arrays, not files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from scheduling.errors import BugError
from scheduling.histogram import LogHistogram

QUANTILES = (0.50, 0.95, 0.99)
LATENCIES = ("queue_s", "ttft_s", "tpot_s", "e2e_s")

Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Quantile:
    """One percentile of one latency. `supported`: at least one sample is expected to lie beyond it."""

    q: float
    value_s: float
    samples: int

    @property
    def supported(self) -> bool:
        return self.samples * (1.0 - self.q) >= 1.0 - 1e-9


@dataclass(frozen=True)
class Sums:
    """What the record and the ranks' counters must agree on."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Sums)))


@dataclass
class Summary:
    """Sums over requests, and a histogram of each latency in LATENCIES over those that were answered."""

    sums: Sums = field(default_factory=Sums)
    shortest_s: float = math.nan
    """Smallest end-to-end time; NaN if nothing was answered."""
    longest_s: float = math.nan
    histograms: dict[str, LogHistogram] = field(default_factory=lambda: {name: LogHistogram() for name in LATENCIES})
    ends_s: dict[int, float] = field(default_factory=dict)
    """By session: when its last request ended, since rank 0's welcome. Of sessions that have noted it."""
    requests: dict[int, int] = field(default_factory=dict)
    """By session: how many, failed ones too."""

    def add(self, rows: Rows) -> None:
        """Count one chunk of `scheduling.tables.REQUEST` rows."""
        self.sums += sums_of(rows)
        answered = rows[rows["ok"] == 1]
        for name, histogram in self.histograms.items():
            values = answered[name]
            histogram.add(values[~np.isnan(values)])
        if len(answered):
            # fmin and fmax: a number against NaN is the number.
            self.shortest_s = float(np.fmin(self.shortest_s, answered["e2e_s"].min()))
            self.longest_s = float(np.fmax(self.longest_s, answered["e2e_s"].max()))
        for session, count in enumerate(np.bincount(rows["session"]).tolist()):
            if count:
                self.requests[session] = self.requests.get(session, 0) + count
        for session, end_s in last_ends_s(rows).items():
            self.ends_s[session] = max(self.ends_s.get(session, 0.0), end_s)

    @property
    def failed(self) -> int:
        return self.sums.failed

    @property
    def ok(self) -> int:
        return self.sums.requests - self.sums.failed

    @property
    def prompt_tokens(self) -> int:
        """Of all requests, failed ones too."""
        return self.sums.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Those of `prompt_tokens` that were in the cache, and not computed."""
        return self.sums.cached_tokens

    @property
    def output_tokens(self) -> int:
        """Of all requests, failed ones too."""
        return self.sums.output_tokens

    def quantiles(self, latency: str) -> tuple[Quantile, ...]:
        """P50, P95 and P99 of one of LATENCIES; NaN with 0 samples if nothing was measured."""
        histogram = self.histograms[latency]
        return tuple(Quantile(q, histogram.percentile(q), histogram.count) for q in QUANTILES)

    def mean_s(self, latency: str) -> float:
        """Mean in seconds; NaN if nothing was measured."""
        histogram = self.histograms[latency]
        return histogram.sum_s / histogram.count if histogram.count else math.nan


def summarise(rows_iter: Iterable[Rows]) -> Summary:
    """The summary of chunks of `scheduling.tables.REQUEST` rows. Takes one chunk of memory."""
    summary = Summary()
    for rows in rows_iter:
        summary.add(rows)
    return summary


def last_ends_s(rows: Rows) -> dict[int, float]:
    """By session: the latest `end_s` of one chunk of `REQUEST` rows; {} where none has one."""
    if "end_s" not in (rows.dtype.names or ()):
        return {}  # of an older version
    timed = rows[~np.isnan(rows["end_s"])]
    sessions = np.unique(timed["session"]).tolist()
    return {session: float(timed["end_s"][timed["session"] == session].max()) for session in sessions}


def sums_of(rows: Rows) -> Sums:
    """Sums over one chunk of `REQUEST` rows."""
    return Sums(
        len(rows),
        int((rows["ok"] == 0).sum()),
        int(rows["prompt_tokens"].sum(dtype=np.int64)),
        int(rows["cached_tokens"].sum(dtype=np.int64)),
        int(rows["output_tokens"].sum(dtype=np.int64)),
    )


def check_sums(recorded: Sums, gathered: Sums) -> None:
    """Raise BugError, with both figures, unless the record and what MPI gathered say the same."""
    _refuse_differences(
        "the record and the ranks' rows", _figures(recorded), "recorded", _figures(gathered), "gathered"
    )


def check_reduced(reduced: Summary, rows: Summary) -> None:
    """Raise BugError, with both figures, unless what MPI reduced is the summary of the rows that it gathered.

    Workers count as requests end, and keep rows apart from that; extremes and samples are of these rows. A row lost or
    doubled on its way shows here.
    """
    _refuse_differences("the ranks' counters and their rows", _all(reduced), "reduced", _all(rows), "gathered")


def _figures(sums: Sums) -> dict[str, object]:
    return {part.name: getattr(sums, part.name) for part in fields(Sums)}


def _all(summary: Summary) -> dict[str, object]:
    extremes = {"shortest_s": repr(summary.shortest_s), "longest_s": repr(summary.longest_s)}  # NaN equals no NaN
    # Not bucket by bucket: another processor may round a value that lies on an edge to its other side.
    samples = {f"samples of {name}": summary.histograms[name].count for name in LATENCIES}
    return _figures(summary.sums) | extremes | samples


def _refuse_differences(what: str, a: dict[str, object], a_is: str, b: dict[str, object], b_is: str) -> None:
    differences = [f"{name}: {a[name]} {a_is}, {b[name]} {b_is}" for name in a if a[name] != b[name]]
    if differences:
        raise BugError(
            f"{what} differ ({'; '.join(differences)}). The answers in the record are whole; the metrics of this "
            "session are not to be trusted."
        )
