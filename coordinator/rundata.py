"""From a session's gathered metrics to what the run directory keeps of them: segments, metrics.h5, checked sums.

Rows of this session come from the collectives, those of earlier sessions from the record; rank counters and telemetry
of earlier sessions from their segments. What was gathered must add up to what the record says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.collect import Gathered
from coordinator.loop import Coordinator
from scheduling.histogram import LogHistogram
from scheduling.tables import RANK, REQUEST, TELEMETRY, conformed, finish_number
from storage.files import OsDisk
from storage.metrics import write_metrics
from storage.recovery import RECORD_NAME
from storage.recovery import rows as record_rows
from storage.rundir import METRICS_NAME, SEGMENTS_NAME, RunDir, read_run
from storage.segments import Segment, SegmentWriter, read_segments
from storage.summary import Sums, check_reduced, check_sums, summarise, sums_of
from workers.metrics import HISTOGRAMS

Rows = npt.NDArray[Any]


def own_rows(gathered: Gathered, coordinator: Coordinator, session: int) -> list[Rows]:
    """This session's request rows: without those whose answers were dropped as late, with what rank 0 failed itself."""
    dropped = coordinator.dropped
    kept = gathered.requests
    if dropped:
        kept = []
        for rows in gathered.requests:
            keys = zip(rows["rank"].tolist(), rows["index"].tolist(), rows["attempt"].tolist(), strict=True)
            kept.append(rows[np.fromiter((key not in dropped for key in keys), np.bool_, len(rows))])
    return [*kept, _failed_here(coordinator, session)]


def _failed_here(coordinator: Coordinator, session: int) -> Rows:
    """Lines that were no request, and requests that killed too many engines: no worker counts these."""
    nan, error = float("nan"), finish_number("error")
    failures = coordinator.failures
    rows = [
        (index, 0, attempt, session, 0, 0, 0, 0.0, nan, nan, 0.0, nan, -1, error, 0) for index, attempt, *_ in failures
    ]
    return np.array(rows, REQUEST)


def rank_rows(gathered: Gathered, coordinator: Coordinator) -> Rows:
    """One row for each worker, with what only rank 0 knows filled in."""
    views = {view.id: view for view in coordinator.plane.workers()}
    ranks = np.concatenate(gathered.ranks) if gathered.ranks else np.zeros(0, RANK)
    ranks = ranks[np.isin(ranks["rank"], list(views))]
    for row in ranks:
        view = views[int(row["rank"])]
        row["stolen_in"], row["stolen_out"] = view.stolen_in, view.stolen_out
        row["engine_restarts"] = view.engine_losses
    return ranks


def store_session(run: RunDir, gathered: Gathered, coordinator: Coordinator) -> None:
    """Keep what is in no record: rank counters, telemetry and gaps between tokens of this session."""
    writer = SegmentWriter(OsDisk(), run.segments_path, run.session)
    try:
        segments = [
            Segment("ranks", rank_rows(gathered, coordinator), {}),
            Segment("itl", gathered.itl.counts, {}),
        ]
        segments += [Segment("telemetry", rows, {}) for rows in gathered.telemetry if len(rows)]
        writer.write(segments)
    finally:
        writer.close()


def write_run_metrics(
    run: RunDir, gathered: Gathered | None, coordinator: Coordinator | None, attributes: dict[str, Any]
) -> None:
    """Make metrics.h5 from everything that is known of the run.

    Raises:
        BugError: reduced counters, gathered rows and the record do not say the same of this session.
        RecordError: it cannot be written.
    """
    if gathered is None or coordinator is None:
        attributes = attributes | {"collectives": "none for the last session: made from the record and the segments"}
        requests: Iterator[Rows] = record_rows(run.record_path)
    else:
        check_reduced(gathered.reduced, summarise(gathered.requests))
        kept = own_rows(gathered, coordinator, run.session)
        recorded = _sums(record_rows(run.record_path, session=run.session))
        check_sums(recorded, _sums(iter(kept)))
        attributes = attributes | {"collectives": f"{gathered.ranks_in} ranks"}
        requests = _all_rows(run, kept)
    _write(run.path, requests, attributes)


def rebuild_metrics(path: Path) -> None:
    """Make metrics.h5 of a run from its record and segments, where it is missing or older than the record.

    Raises:
        RunDirError: there is no run, or its record is damaged.
        RecordError: it cannot be written.
    """
    sessions = [session for session in read_run(path)["sessions"] if "wall_s" in session]
    facts = sessions[-1] if sessions else {}
    attributes = {name: value for name, value in facts.items() if isinstance(value, int | float | str)}
    attributes["collectives"] = "none: made from the record and the segments"
    record = path / RECORD_NAME
    _write(path, record_rows(record) if record.exists() else iter(()), attributes)


def _write(path: Path, requests: Iterator[Rows], attributes: dict[str, Any]) -> None:
    record, segments = path / RECORD_NAME, path / SEGMENTS_NAME
    histograms = {name: LogHistogram() for name in HISTOGRAMS}
    for segment in read_segments(segments, "itl"):
        histograms["itl"].counts += segment.array
    summary = summarise(record_rows(record) if record.exists() else iter(()))
    for name in HISTOGRAMS:
        if name != "itl":
            histograms[name] = summary.histograms[f"{name}_s"]
    if summary.ok:
        attributes = attributes | {"e2e_min_s": summary.shortest_s, "e2e_max_s": summary.longest_s}
    ranks = [conformed(segment.array, RANK) for segment in read_segments(segments, "ranks")]
    telemetry = (segment.array.astype(TELEMETRY) for segment in read_segments(segments, "telemetry"))
    write_metrics(
        path / METRICS_NAME, requests, np.concatenate(ranks) if ranks else np.zeros(0, RANK), histograms, telemetry,
        attributes,
    )  # fmt: skip


def _all_rows(run: RunDir, kept: list[Rows]) -> Iterator[Rows]:
    for rows in record_rows(run.record_path):
        earlier = rows[rows["session"] != run.session]
        if len(earlier):
            yield earlier
    yield from kept


def _sums(chunks: Iterator[Rows]) -> Sums:
    total = Sums()
    for rows in chunks:
        total += sums_of(rows)
    return total
