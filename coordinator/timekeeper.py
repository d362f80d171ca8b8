"""When a job has to stop: a signal, `llmpi stop`, `--time-limit`, or the end that Slurm knows. Rank 0's alone.

Whoever asks for a drain gets the job's exit within `--drain-timeout`, and before a time limit the job is gone by then.
A part of that is kept for the end (`coordinator.closing`); what still runs when it begins is given up.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from coordinator.closing import Size, reserve_s
from coordinator.durations import duration
from coordinator.signals import BY_HAND, StopSignals
from coordinator.timelimit import SlurmEnd, slurm_job
from scheduling.errors import ConfigError, StoppedError
from scheduling.events import DrainRequested, TimeLimited

SLURM_MARGIN_S = 15.0
"""So long before Slurm's end the ranks are gone: launcher and batch script come after them."""
SLURM_TERM_S = 600.0
"""A SIGTERM this long before Slurm's end, or later, announces it; an earlier one is somebody's who cancels the job."""
MOVED_S = 0.5
STARTED = 19
"""The field of /proc/PID/stat, from the one behind the name on, that says when the process was started."""
GOODBYE_LEAST_S = 2.0
"""What ranks that can be reached need to leave, however late it is."""
LAUNCHER_S = 1.0
"""Kept of the time for the launcher, which leaves after the last rank, or ends those that do not leave."""

Asked = Literal["signal", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOptions:
    """`time_limit_s` counts from the job's start. `slurm_limit`: whether the end that Slurm knows counts, too."""

    drain_timeout_s: float = 20.0
    time_limit_s: float | None = None
    slurm_limit: bool = True
    on_limit: Literal["stop", "requeue"] = "stop"

    def __post_init__(self) -> None:
        if not 0 < self.drain_timeout_s < math.inf:
            raise ConfigError(f"--drain-timeout is {self.drain_timeout_s:g}: it must be above 0 seconds, and finite")

    def check(self, environ: Mapping[str, str]) -> None:
        """Raises ConfigError for what is not to be had in this environment."""
        if self.on_limit == "requeue" and not environ.get("SLURM_JOB_ID"):
            raise ConfigError("--on-limit requeue is for jobs of Slurm, and this is none (there is no SLURM_JOB_ID)")


class Timekeeper:
    """See the module's text. `age_s`: how long this job had been running when this was made."""

    def __init__(
        self,
        options: StopOptions,
        signals: StopSignals,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        environ: Mapping[str, str] = os.environ,
        age_s: float = 0.0,
    ) -> None:
        self._options = options
        self._signals = signals
        self._clock = clock
        self._wall_clock = wall_clock
        self._born = clock() - age_s
        self._asked: Asked | None = None
        self._drained_at: float | None = None
        self._told: float | None = None
        self.job = slurm_job(environ)
        self._slurm_at: float | None = None
        self._slurm = SlurmEnd(environ if options.slurm_limit else {})
        self.meanwhile: Callable[[], None] = lambda: None
        """Called at each look at the time."""

    # ------------------------------------------------------------ the time limit

    def limit(self) -> tuple[float, str] | None:
        """When this job has to be gone, on its clock, and why; None as long as no limit is known."""
        found = []
        own_s = self._options.time_limit_s
        if own_s is not None:
            found.append((self._born + own_s, f"the time limit of {duration(own_s)}"))
        end_unix_s = self._slurm.end_unix_s
        if end_unix_s is not None:
            if self._slurm_at is None:  # once: a wall clock may be set
                self._slurm_at = self._clock() + end_unix_s - self._wall_clock()
            found.append((self._slurm_at - SLURM_MARGIN_S, f"Slurm ends job {self.job} at {_time_of_day(end_unix_s)}"))
        return min(found, default=None)

    def interruption(self) -> str | None:
        """Why a job that has not begun to work should not; None if it should."""
        self.meanwhile()
        if self._signals.count:
            return f"{self._signals.name} received"
        limit = self.limit()
        return limit[1] if limit is not None and self._clock() >= limit[0] else None

    def check(self, meanwhile: str) -> None:
        """Raises StoppedError if there is an `interruption`, for nothing has been started yet."""
        if reason := self.interruption():
            raise StoppedError(f"{reason}: stopped while {meanwhile}, nothing was started")

    # ------------------------------------------------------------ while it runs

    def stops(self, stop_asked: Callable[[], bool], size: Size) -> list[DrainRequested | TimeLimited]:
        """What the control plane is to be told now. `stop_asked`: by `llmpi stop`; `size`: of the record."""
        events: list[DrainRequested | TimeLimited] = []
        self.meanwhile()
        if self._asked is None and (self._signals.count or stop_asked()):
            self._asked = "signal" if self._signals.count else "stop"
            reason = f"{self._signals.name} received" if self._signals.count else "asked by llmpi stop"
            now, bound_s = self._clock(), self._options.drain_timeout_s
            self._drained_at = now
            events.append(DrainRequested(reason, now + bound_s - reserve_s(bound_s, size)))
        limit = self.limit()
        if limit is not None:
            at, reason = limit
            bound_s = min(self._options.drain_timeout_s, max(0.0, at - self._born) / 2)
            end_at = at - reserve_s(bound_s, size)
            if self._told is None or abs(end_at - self._told) > MOVED_S:
                self._told = end_at
                events.append(TimeLimited(end_at, reason))
        return events

    @property
    def exit_by(self) -> float | None:
        """When this process has to be gone, on its clock; None: nobody has said."""
        times = [] if self._drained_at is None else [self._drained_at + self._options.drain_timeout_s]
        if (limit := self.limit()) is not None:
            times.append(limit[0])
        return min(times, default=None)

    def goodbye_s(self, otherwise_s: float) -> float:
        """How long the other ranks may take to leave once rank 0 does: `otherwise_s`, or what is left of the time."""
        exit_by = self.exit_by
        if exit_by is None:
            return otherwise_s
        return min(otherwise_s, max(GOODBYE_LEAST_S, exit_by - LAUNCHER_S - self._clock()))

    @property
    def drain_s(self) -> float | None:
        """How long ago a drain was asked for."""
        return None if self._drained_at is None else self._clock() - self._drained_at

    # ------------------------------------------------------------ afterwards

    def requeues(self) -> bool:
        """Whether a run that was drained should go on in a new job: time was up, and nobody wants it to end.

        A signal counts if it is one that Slurm sends before its limit.
        """
        if self._options.on_limit != "requeue" or self._asked == "stop":
            return False
        if self._asked is None or self._signals.name == "SIGUSR2":
            return True
        near = self._slurm_at is not None and self._slurm_at - self._clock() <= SLURM_TERM_S
        return self._signals.name in ("SIGTERM", BY_HAND) and near


def age_s() -> float:
    """How long this process has been running, by the kernel's clock since it booted; 0 where there is none."""
    try:
        after_name = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        born_s = int(after_name[STARTED]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born_s)
    except (OSError, AttributeError):
        return 0.0


def _time_of_day(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S")
