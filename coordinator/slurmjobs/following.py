"""`llmpi submit --wait`: what the jobs of a run do, until none is left, from files and by squeue."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rich.text import Text

from coordinator.durations import duration
from coordinator.progress import PLAIN_EVERY_S, rate_text
from coordinator.slurmjobs.chain import Queued, in_queue, last_state
from coordinator.slurmjobs.journal import FOLDER, Journal, read_journal
from coordinator.slurmjobs.partitions import Client, run_client
from coordinator.terminal import console_for
from scheduling.errors import EXIT_RESUMABLE, EXIT_USAGE, ConfigError, InfrastructureError
from storage.runjson import RUN_NAME
from storage.runstatus import Status
from storage.runstatus import status as run_status

POLL_S = 2.0
PATIENCE_S = 600.0
"""How long squeue may fail before that is believed: controllers restart."""
UNTOLD = ("", "(null)", "(None)")
"""What squeue shows where there is no reason yet."""


class Follower:
    """Tells of a run whose first job is `job`. `follow` returns the exit code that the record calls for.

    `job`: the one that runs, or will next.
    """

    def __init__(
        self,
        run_dir: Path,
        job: str,
        client: Client = run_client,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        stream: IO[str] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._first = self.job = job
        self._client = client
        self._clock = clock
        self._sleep = sleep
        self._console = console_for(stream or sys.stderr, live=True)
        self._live = self._console.status("") if self._console.is_terminal else None
        self._told = ""
        self._told_at = -PLAIN_EVERY_S
        self._began: tuple[float, int] | None = None
        self._answers_since = clock()

    def follow(self) -> int:
        """Until no job of the run is left in the queue."""
        with self._live or contextlib.nullcontext():
            while True:
                queued = self._queued()
                found = self._status()
                if not queued:
                    break
                self._tell(queued, found)
                self._sleep(POLL_S)
        journal = read_journal(self._run_dir)
        last = journal.links[-1].job if journal.links else self._first
        self._check_end(found, journal, last)
        assert found is not None
        why = "" if found.complete else f": {self._log_of(last)}"
        self._console.print(f"{_done(found)} · no job is left{why}", soft_wrap=True, markup=False)
        return found.exit_code

    def _queued(self) -> list[Queued]:
        jobs = {self._first, *read_journal(self._run_dir).recent()}
        try:
            found = in_queue(sorted(jobs), self._client)
        except InfrastructureError:
            if self._clock() - self._answers_since > PATIENCE_S:
                raise
            return [Queued(self._first, "UNKNOWN", "squeue does not answer")]
        self._answers_since = self._clock()
        return found

    def _check_end(self, found: Status | None, journal: Journal, last: str) -> None:
        """Raises where the record says nothing of how the last job ended: it was refused, or never came to a run."""
        where = self._log_of(last)
        if journal.statuses.get(last) == EXIT_USAGE:
            raise ConfigError(f"the command was refused in job {last}: {where}")
        if found is not None:
            return
        if journal.links:
            raise InfrastructureError(f"job {last} ended before there was a run: {where}")
        state = last_state(last, self._client).lower()
        raise InfrastructureError(f"job {last} is over and has not begun{f' (it was {state})' if state else ''}")

    def _log_of(self, job: str) -> str:
        log = self._run_dir / FOLDER / f"job-{job}.log"
        return f"{log} says why" if log.exists() else f"the log of job {job} says why"

    def _status(self) -> Status | None:
        return run_status(self._run_dir) if (self._run_dir / RUN_NAME).exists() else None

    def _tell(self, queued: list[Queued], found: Status | None) -> None:
        """A line when the job changed, and now and then; on a terminal one line that is drawn over itself."""
        now, first = self._clock(), queued[0]
        self.job = first.job
        state = f"{first.job} {first.state}"
        why = "" if first.why in UNTOLD else f" {'on ' if first.state == 'RUNNING' else ''}{first.why}"
        where = f"job {first.job} {first.state.lower()}{why}"
        if first.state != "RUNNING":
            self._began = None  # what waits in the queue has no pace
        pace = [] if found is None or first.state != "RUNNING" else self._rate(now, found)
        line = " · ".join([where, *([] if found is None else [_done(found)]), *pace])
        if self._live is not None:
            self._live.update(Text(line))
        if state == self._told and (self._live or now - self._told_at < PLAIN_EVERY_S or found is None):
            return
        self._console.print(line, soft_wrap=True, markup=False)
        self._told, self._told_at = state, now

    def _rate(self, now: float, found: Status) -> list[str]:
        if self._began is None or found.done < self._began[1]:
            self._began = (now, found.done)
        began, before = self._began
        if found.done == before or now - began < 1:
            return []
        rate = (found.done - before) / (now - began)
        left = [] if found.total is None else [f"ETA {duration((found.total - found.done) / rate)}"]
        return [rate_text(rate, "requests"), *left]


def _done(found: Status) -> str:
    total = "?" if found.total is None else found.total
    failed = f", {found.failed} failed" if found.failed else ""
    state = ", complete" if found.complete else ""
    return f"{found.done} of {total} done{failed}{state}"


def interrupted(run_dir: Path, job: str) -> int:
    """What is said when a person has enough of waiting, and the exit code."""
    print(
        f"\nnot waiting any more; job {job} goes on. `llmpi status {run_dir}` says how far it is, "
        f"`llmpi stop {run_dir}` ends it in order",
        file=sys.stderr,
    )
    return EXIT_RESUMABLE
