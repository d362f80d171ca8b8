"""What devices did over time: telemetry rows as thinned series, and the energy they used. Knows arrays, not files.

Ranks that share a GPU report the same figures, the whole GPU's: a GPU counts once, by its host and number. Energy is
the difference of the GPU's own counter between the first and the last sample of a session, never below 0; where it has
no counter, power over the time between samples. Missing stays missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.summary import Rows

POINTS = 300
"""Most points of a series: samples between are averaged."""

SERIES = ("utilization", "memory_used_bytes", "power_w", "cpu_percent", "rss_bytes")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Device:
    """One GPU (`gpu` >= 0), or one rank's processes. `series`: by field, as long as `t_s`, NaN where missing."""

    name: str
    rank: int
    gpu: int
    t_s: Floats
    series: dict[str, Floats]

    def has(self, field: str) -> bool:
        return bool(np.isfinite(self.series[field]).any())

    def mean(self, field: str) -> float:
        """Mean of what was measured; NaN if nothing was."""
        values = self.series[field]
        return float(np.nanmean(values)) if self.has(field) else float("nan")

    def most(self, field: str) -> float:
        values = self.series[field]
        return float(np.nanmax(values)) if self.has(field) else float("nan")


@dataclass(frozen=True)
class Energy:
    """Energy of the GPUs of some sessions, and the output tokens of these. `from_power`: no counter, power instead."""

    joules: float
    gpus: int
    output_tokens: int
    from_power: bool

    @property
    def joules_per_output_token(self) -> float:
        return self.joules / self.output_tokens if self.output_tokens else float("nan")


def devices(telemetry: Rows, ranks: Rows, begins_s: dict[int, float] | None = None) -> list[Device]:
    """Series of every device, GPUs first. `begins_s`: where each session begins on the run's time line."""
    found = []
    for key, rows in _by_gpu(telemetry, ranks).items():
        found.append(_device(f"{key[0]} GPU {key[1]}".strip(), int(rows["rank"][0]), key[1], rows, begins_s))
    for rank, of_rank in _by_rank(telemetry):
        # One row a sample holds the rank's own figures; those of its other GPUs lack them.
        rows = of_rank[of_rank["rss_bytes"] >= 0]
        if len(rows):
            found.append(_device(f"rank {rank}", rank, -1, rows, begins_s))
    return found


def energy(telemetry: Rows, ranks: Rows, output_tokens: dict[int, int]) -> Energy | None:
    """Energy over all sessions in which it was measured; None if it never was. `output_tokens` by session."""
    joules, gpus, from_power = 0.0, set(), False
    sessions = set()
    for key, rows in _by_gpu(telemetry, ranks).items():
        for session in np.unique(rows["session"]).tolist():
            of_session = _in_order(rows[rows["session"] == session])
            counted = of_session["energy_j"][np.isfinite(of_session["energy_j"])]
            powered = of_session[np.isfinite(of_session["power_w"])]
            if len(counted) >= 2:
                joules += max(0.0, float(counted[-1] - counted[0]))
            elif len(powered) >= 2:
                watts, steps = powered["power_w"].astype(np.float64), np.diff(powered["t_s"])
                joules += float((steps * (watts[1:] + watts[:-1]) / 2).sum())
                from_power = True
            else:
                continue
            gpus.add(key)
            sessions.add(session)
    if not gpus:
        return None
    return Energy(joules, len(gpus), sum(output_tokens.get(session, 0) for session in sessions), from_power)


def _by_gpu(telemetry: Rows, ranks: Rows) -> dict[tuple[str, int], Rows]:
    """Rows of each GPU by host and number; of several ranks on it, those of the first."""
    hosts = {int(row["rank"]): row["host"].decode("utf-8", "replace") for row in ranks}
    several = len(set(hosts.values())) > 1
    found: dict[tuple[str, int], list[Rows]] = {}
    taken: dict[tuple[str, int, int], int] = {}
    for rank, of_rank in _by_rank(telemetry):
        host = hosts.get(rank, f"rank {rank}")
        for gpu in np.unique(of_rank["gpu"][of_rank["gpu"] >= 0]).tolist():
            rows = of_rank[of_rank["gpu"] == gpu]
            for session in np.unique(rows["session"]).tolist():
                if taken.setdefault((host, gpu, session), rank) == rank:
                    name = host if several or rank not in hosts else ""
                    found.setdefault((name, gpu), []).append(rows[rows["session"] == session])
    return {key: np.concatenate(parts) for key, parts in sorted(found.items())}


def _by_rank(telemetry: Rows) -> Iterator[tuple[int, Rows]]:
    """Rows of each rank in their order, from one sorting however many ranks there are."""
    ordered = telemetry[np.argsort(telemetry["rank"], kind="stable")]
    ranks, starts = np.unique(ordered["rank"], return_index=True)
    return zip(ranks.tolist(), np.split(ordered, starts[1:]), strict=False)  # of no rows there is one part


def _in_order(rows: Rows) -> Rows:
    return rows[np.argsort(rows["t_s"], kind="stable")]


def _device(name: str, rank: int, gpu: int, rows: Rows, begins_s: dict[int, float] | None) -> Device:
    begins = np.array([(begins_s or {}).get(session, 0.0) for session in rows["session"].tolist()])
    t_s = rows["t_s"] + begins
    order = np.argsort(t_s, kind="stable")
    rows, t_s = rows[order], t_s[order]
    groups = np.minimum(np.arange(len(rows)) * POINTS // max(len(rows), POINTS), POINTS - 1)
    return Device(
        name, rank, gpu, _means(t_s, groups), {field: _means(_known(rows[field]), groups) for field in SERIES}
    )


def _known(values: npt.NDArray[Any]) -> Floats:
    """As floats, NaN where an integer says missing."""
    floats: Floats = values.astype(np.float64)
    if values.dtype.kind == "i":
        floats[values < 0] = np.nan
    return floats


def _means(values: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Mean of each group of what is known of it."""
    known = np.isfinite(values)
    counts = np.bincount(groups[known], minlength=int(groups.max(initial=0)) + 1)
    sums = np.bincount(groups[known], values[known], minlength=len(counts))
    means: Floats = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return means
