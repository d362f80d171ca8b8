"""All that a report shows of one run, read once: figures, histograms, its timeline, its devices, what run.json says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.report import report_data
from scheduling.histogram import LogHistogram
from storage.metrics import Metrics, read_copies, read_requests, read_summary, read_telemetry
from storage.rundir import METRICS_NAME
from storage.runjson import read_run
from storage.runstatus import Status
from storage.timeline import Timeline, timeline
from storage.usage import Device, devices


@dataclass(frozen=True)
class RunView:
    """`data` is what `report_data` says: tables and pages show its figures and no others."""

    name: str
    path: Path
    data: dict[str, Any]
    state: dict[str, Any]
    """run.json."""
    status: Status
    metrics: Metrics
    timeline: Timeline | None
    devices: list[Device]

    def histogram(self, latency: str) -> LogHistogram | None:
        """Of "queue_s", "ttft_s", "tpot_s", "itl_s" or "e2e_s"."""
        if latency == "itl_s":
            return self.metrics.histograms.get("itl")
        return self.metrics.summary.histograms[latency]

    def last_ranks(self) -> list[dict[str, Any]]:
        """Counters of the ranks in the session that the figures are of."""
        session = self.data["last_session"].get("session")
        return [rank for rank in self.data["ranks"] if session in (None, rank["session"])]


def view_run(path: Path, name: str, status: Status) -> RunView:
    """Read a run whose metrics.h5 is there. Raises RunDirError like `report_data` and `read_run`."""
    file = path / METRICS_NAME
    metrics = read_summary(file)
    line = timeline(lambda: read_requests(file), read_copies(file))
    begins = {} if line is None else line.breaks_s
    return RunView(
        name=name, path=path, data=report_data(path, metrics), state=read_run(path), status=status, metrics=metrics,
        timeline=line, devices=devices(read_telemetry(file), metrics.ranks, begins),
    )  # fmt: skip


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call runs: the directories' names, or their paths where these are the same."""
    names = [path.resolve().name for path in paths]
    counts = Counter(names)
    return [name if counts[name] == 1 else str(path) for name, path in zip(names, paths, strict=True)]
