"""From a session's gathered metrics to what the run directory keeps of them: checked sums, metrics.h5.

metrics.h5 is made of what is in the run directory and of nothing else: rows from the record, rank counters, telemetry
and gaps between tokens from the segments, attributes from run.json. So whoever makes it, and whenever, gets the same.
What the ranks gathered must add up to what the record says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.collect import Gathered
from coordinator.loop import Coordinator
from scheduling.histogram import LogHistogram
from scheduling.ledger import WorkerState
from scheduling.tables import COPY, RANK, REQUEST, TELEMETRY, conformed, finish_number
from storage.files import Disk, OsDisk
from storage.metrics import write_metrics
from storage.recovery import RECORD_NAME
from storage.recovery import rows as record_rows
from storage.rundir import METRICS_NAME, SEGMENTS_NAME, RunDir
from storage.runjson import read_run
from storage.segments import latest, read_segments
from storage.summary import Sums, check_reduced, check_sums, summarise, sums_of
from workers.metrics import HISTOGRAMS, fitted

Rows = npt.NDArray[Any]

TEXT_MAX = 8_192
"""Characters of an attribute's text: HDF5 keeps 64 KiB in one."""
PLACE = ("host", "device")
NO_COLLECTIVES = "none for the last session: made from the record and the segments"


class OwnRows:
    """Sums over a session's gathered rows, without those whose answers were dropped as late. Keeps no row."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.sums = Sums()
        self._dropped = coordinator.dropped

    def begin(self) -> None:
        """The rows come again from the first one."""
        self.sums = Sums()

    def __call__(self, rows: Rows) -> None:
        if self._dropped:
            keys = zip(rows["rank"].tolist(), rows["index"].tolist(), rows["attempt"].tolist(), strict=True)
            rows = rows[np.fromiter((key not in self._dropped for key in keys), np.bool_, len(rows))]
        self.sums += sums_of(rows)


def _failed_here(coordinator: Coordinator, session: int) -> Rows:
    """Lines that were no request, and requests that killed too many engines: no worker counts these."""
    nan, error = float("nan"), finish_number("error")
    failures = coordinator.failures
    rows = [
        (index, 0, attempt, session, 0, 0, 0, 0.0, nan, nan, 0.0, nan, -1, error, 0) for index, attempt, *_ in failures
    ]
    return np.array(rows, REQUEST)


def rank_rows(ranks: Rows, coordinator: Coordinator) -> Rows:
    """One row for each worker, with what only rank 0 knows filled in."""
    views = {view.id: view for view in coordinator.plane.workers()}
    ranks = ranks[np.isin(ranks["rank"], list(views))]
    for row in ranks:
        view = views[int(row["rank"])]
        row["stolen_in"], row["stolen_out"] = view.stolen_in, view.stolen_out
        row["engine_restarts"] = view.engine_losses
    return ranks


def copy_rows(coordinator: Coordinator, session: int, welcomed_at: float) -> Rows:
    """A row of COPY for each copy of a straggler that the plane tells of."""
    rows = [
        (
            one.index, one.attempt, session, one.worker, one.source, one.made_at - welcomed_at,
            float("nan") if one.answered_at is None else one.answered_at - welcomed_at,
            -1 if one.won is None else one.won,
        )
        for one in coordinator.plane.copies
    ]  # fmt: skip
    return np.array(rows, COPY)


def workers_lost(coordinator: Coordinator, names: Mapping[int, str]) -> str:
    """Which workers left before the end, each with its reason; empty if none did."""
    gone = [view for view in coordinator.plane.workers() if view.state is WorkerState.GONE]
    return "; ".join(f"{names[view.id]}: {view.reason}" for view in gone)


def check_gathered(
    run: RunDir, gathered: Gathered, own: OwnRows, coordinator: Coordinator, disk: Disk, lost: Collection[int] = ()
) -> None:
    """Compare what was gathered with what the record says of the ranks that were there to be asked. `lost`: the others.

    Raises:
        BugError: reduced counters, gathered rows and the record do not say the same of this session.
    """
    check_reduced(gathered.reduced, gathered.rows)
    recorded = Sums()
    for rows in record_rows(run.record_path, disk, session=run.session):
        recorded += sums_of(rows[~np.isin(rows["rank"], list(lost))] if lost else rows)
    check_sums(recorded, own.sums + sums_of(_failed_here(coordinator, run.session)))


def completed(ranks: Rows, absent: Mapping[int, tuple[str, str]], run: RunDir, disk: Disk) -> Rows:
    """Rows of RANK with one for each worker of `absent` (to its host and device), which was not there to be asked.

    What it counted is what the record has of it. Its times are those that it told last, NaN if it told none.
    """
    if not absent:
        return ranks
    sums = dict.fromkeys(absent, Sums())
    for rows in record_rows(run.record_path, disk, session=run.session):
        for worker in absent:
            sums[worker] += sums_of(rows[rows["rank"] == worker])
    unknown = sorted(absent.keys() - set(ranks["rank"].tolist()))
    new = conformed(np.zeros(len(unknown), [("rank", "<i4")]), RANK)
    for row, worker in zip(new, unknown, strict=True):
        row["rank"], row["session"] = worker, run.session
        row["host"], row["device"] = (
            fitted(text, RANK[name]) for text, name in zip(absent[worker], PLACE, strict=True)
        )
    ranks = np.concatenate([ranks, new])
    ranks = ranks[np.argsort(ranks["rank"], kind="stable")]
    for row in ranks:
        if (counted := sums.get(int(row["rank"]))) is not None:
            for part in fields(Sums):
                row[part.name] = getattr(counted, part.name)
    return ranks


def make_metrics(path: Path, disk: Disk | None = None) -> None:
    """Make metrics.h5 of the run in `path` from its record, its segments and run.json.

    Raises:
        RunDirError: there is no run, or its record is damaged.
        RecordError: it cannot be written.
    """
    disk = disk or OsDisk()
    record, segments = path / RECORD_NAME, path / SEGMENTS_NAME
    histograms = {name: LogHistogram() for name in HISTOGRAMS}
    counters = latest(segments, ("itl", "ranks", "copies"), disk)
    for counts in counters.arrays["itl"]:
        histograms["itl"].counts += counts
    summary = summarise(record_rows(record, disk))
    for name in HISTOGRAMS:
        if name != "itl":
            histograms[name] = summary.histograms[f"{name}_s"]
    attributes = _attributes(read_run(path, disk))
    if summary.ok:
        attributes |= {"e2e_min_s": summary.shortest_s, "e2e_max_s": summary.longest_s}
    if counters.unread_bytes:
        attributes["unread_segment_bytes"] = counters.unread_bytes
    ranks = [conformed(rows, RANK) for rows in counters.arrays["ranks"]]
    copies = [conformed(rows, COPY) for rows in counters.arrays["copies"]]
    telemetry: Iterator[Rows] = (
        segment.array.astype(TELEMETRY) for segment in read_segments(segments, "telemetry", disk)
    )
    write_metrics(
        path / METRICS_NAME, record_rows(record, disk), np.concatenate([np.zeros(0, RANK), *ranks]), histograms,
        telemetry, attributes, disk, copies=np.concatenate([np.zeros(0, COPY), *copies]),
    )  # fmt: skip


def _attributes(state: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of the last session that came to its end."""
    ended = [session for session in state["sessions"] if "wall_s" in session]
    facts = ended[-1] if ended else {}
    plain = {
        name: value[:TEXT_MAX] if isinstance(value, str) else value
        for name, value in facts.items()
        if isinstance(value, int | float | str)
    }
    return {"collectives": NO_COLLECTIVES} | plain
