"""What a batch job is told beside what its workers are. All ranks read it: it loads nothing that only rank 0 needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.replay import Replay
from coordinator.rows import Columns
from coordinator.slicing.slices import Slice
from coordinator.timekeeper import StopOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What concerns only rank 0, or how the job is shown."""

    input: Path
    output: Path
    format: str | None = None
    columns: Columns = field(default_factory=Columns)
    replay: Replay | None = None
    """What this run is to be the same as."""
    part: Slice | None = None
    """Which requests of the input are this job's; None: all. `output` is the slice's own."""
    ranks: int | None = None
    hostfile: Path | None = None
    """Where llmpi starts its own mpirun: on which hosts."""
    stopping: StopOptions = field(default_factory=StopOptions)
    show: int = 0
    quiet: bool = False
    as_json: bool = False
    of_study: bool = False
    """A study says itself what concerns all its runs."""
