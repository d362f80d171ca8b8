"""One cell of a study: a job of `llmpi batch` over some of the ranks, and what is read off it.

It is the same job, with the same record, metrics and report. Three things are told to it:

- A worker has in each cell what it has in the largest: the same GPUs, the same processors. A host's processors are not
  divided anew among fewer workers, or speed-up would be against a worker with more of them.
- No request is handed out before all engines are loaded (`AllLoaded`), so that loading is no part of the time.
- Rank 0 works on no request.

Engines are started anew in each cell: each begins with empty caches, in memory that is found as the first found it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.lead import Lead
from coordinator.loop import Coordinator
from coordinator.report import report_data
from coordinator.study.design import Cell
from coordinator.study.summary import Measured
from scheduling.errors import EXIT_OK, EXIT_SOME_FAILED, BugError, RankLostError
from scheduling.ledger import WorkerState


class AllLoaded:
    """A gate of `Session`: whether all workers have an engine, or never will."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready_at: dict[int, tuple[float, int]] = {}
        self._open = False

    def __call__(self, coordinator: Coordinator) -> bool:
        if self._open:
            return True
        now = self._clock()
        for worker, ready in coordinator.ready.items():
            self._ready_at.setdefault(worker, (now, ready.slots))
        views = coordinator.plane.workers()
        gone = {view.id for view in views if view.state is WorkerState.GONE}
        self._open = len(gone | self._ready_at.keys()) == len(views)
        return self._open

    @property
    def slots(self) -> int:
        """Of all workers together."""
        return sum(slots for _, slots in self._ready_at.values())

    def waited_slot_s(self, until: float) -> float:
        """Slot time from when each worker was ready."""
        return sum(slots * max(0.0, until - at) for at, slots in self._ready_at.values())


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: its job's exit code, and what was measured, None if it was cut off."""

    code: int
    measured: Measured | None = None
    facts: dict[str, Any] | None = None


def run_cell(cell: Cell, lead: Lead, run_dir: Path, start_unix_s: float) -> Outcome:
    """Run the job that `lead` leads. Raises RankLostError if a worker was lost: then nothing was measured."""
    gate = AllLoaded()
    lead.session.gate = gate
    code = lead.run()
    if code not in (EXIT_OK, EXIT_SOME_FAILED):
        return Outcome(code)
    coordinator = lead.session.coordinator
    if coordinator is None:
        raise BugError(f"cell {cell.name} is over and was never begun")
    data = report_data(run_dir)
    if lost := data["last_session"].get("workers_lost"):
        raise RankLostError(f"cell {cell.name} lost a worker ({lost}): it is not counted. The same command goes on")
    first_at = coordinator.first_assigned_at
    measured = measure(
        cell, data, slots=gate.slots, start_unix_s=start_unix_s,
        load_s=float("nan") if first_at is None else first_at - lead.session.welcomed_at,
        waited_slot_s=0.0 if first_at is None else gate.waited_slot_s(first_at),
    )  # fmt: skip
    return Outcome(code, measured, {"hosts": [row["host"] for row in data["ranks"]], **_devices(data), **_job()})


def measure(
    cell: Cell, data: dict[str, Any], *, slots: int, start_unix_s: float, load_s: float, waited_slot_s: float
) -> Measured:
    """What a cell's report (`coordinator.report.report_data`) says. `waited_slot_s`: slot time before the first
    assignment, in which workers wanted work as well."""
    last = data["last_session"]
    wall_s = float(last["wall_s"])
    ranks = data["ranks"]
    used = sum(rank["slot_s"] for rank in ranks)
    starved = sum(rank["starved_slot_s"] for rank in ranks) - waited_slot_s
    slot_time = slots * wall_s
    idle_share = _share(slot_time - used, slot_time)
    # Workers count from when they were ready, rank 0 from when it heard of that: in a cell of milliseconds it shows.
    starved_share = min(idle_share, _share(starved, slot_time))
    energy = data["energy"] or {}
    joules = energy.get("joules")
    return Measured(
        name=cell.name, workers=cell.workers, repeat=cell.repeat, order=cell.order, start_unix_s=start_unix_s,
        wall_s=wall_s, load_s=load_s, requests=data["requests"], failed=data["failed"],
        prompt_tokens=data["prompt_tokens"], output_tokens=data["output_tokens"], slots=slots,
        idle_share=idle_share, starved_share=starved_share,
        energy_j=float("nan") if joules is None else float(joules),
    )  # fmt: skip


def _share(part: float, whole: float) -> float:
    """Two clocks measured it: a little below 0 is 0."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else float("nan")


def _devices(data: dict[str, Any]) -> dict[str, Any]:
    return {"devices": [row["device"] for row in data["ranks"]]}


def _job() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job": job} if job else {}
