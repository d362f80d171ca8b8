"""What workers tell of themselves between the handshake and the end, brought to disk once an interval.

Each worker sends its counters and its new telemetry every interval. A second after the first of them all that has
come goes to metrics.d/, from a thread of its own, because a sync takes milliseconds that rank 0's loop does not have.
So a job that is killed has both up to its last interval. Messages, not collectives: a rank that is lost meanwhile
holds nobody up. Memory is one interval's telemetry and a row for each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.collect import Gathered
from scheduling import messages as m
from scheduling.histogram import LogHistogram
from scheduling.tables import COPY, RANK, TELEMETRY
from storage.files import Disk
from storage.segments import Segment, SegmentWriter, replace_counters

GATHER_S = 1.0
"""How long those that tell at about the same time are waited for."""

Rows = npt.NDArray[Any]


class Intervals:
    """One session's. `filled` adds to rows of RANK what only rank 0 knows, `copies` gives rows of COPY, which it alone
    knows too. Not to be used from several threads."""

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        session: int,
        filled: Callable[[Rows], Rows],
        clock: Callable[[], float],
        executor: Executor,
        copies: Callable[[], Rows] = lambda: np.zeros(0, COPY),
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._session = session
        self._filled = filled
        self._clock = clock
        self._executor = executor
        self._copies = copies
        self._writer: SegmentWriter | None = None
        self._writing: Future[None] | None = None
        self._told: dict[int, m.Counters] = {}
        self._telemetry: list[Rows] = []
        self._due_at: float | None = None

    def hear(self, worker: int, message: m.Counters) -> None:
        """Keep what a worker tells; the next `tick` that is due writes it."""
        self._told[worker] = message
        if message.telemetry:
            self._telemetry.append(np.frombuffer(message.telemetry, TELEMETRY))
        if self._due_at is None:
            self._due_at = self._clock() + GATHER_S

    def tick(self) -> None:
        """To be called a few times a second. Raises RecordError if what was written last could not be."""
        if self._writing is not None and self._writing.done():
            self._settle()
        if self._writing is None and self._due_at is not None and self._clock() >= self._due_at:
            self._due_at = None
            telemetry, self._telemetry = self._telemetry, []
            self._writing = self._executor.submit(self._write, *self._sums(self._told), telemetry, self._copies())

    def finish(self, gathered: Gathered | None, complete: Callable[[Rows], Rows] = lambda ranks: ranks) -> None:
        """The last write: what was gathered at the end, and what those told last that were not there to be asked.

        `complete` is given rows of RANK and gives those to be written. Raises RecordError.
        """
        self._settle()
        present = () if gathered is None else gathered.present
        ranks, itl = self._sums({worker: told for worker, told in self._told.items() if worker not in present})
        telemetry = self._telemetry
        if gathered is not None:
            ranks = np.concatenate([ranks, *gathered.ranks])
            itl = itl + gathered.itl.counts
            telemetry = telemetry + gathered.telemetry
        try:
            self._write(self._filled(complete(ranks)), itl, telemetry, self._copies())
        finally:
            self.close()

    def close(self) -> None:
        """Let the thread and the file go. What was not written stays so."""
        self._executor.shutdown()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _sums(self, told: Mapping[int, m.Counters]) -> tuple[Rows, Rows]:
        """Rows of workers, and their gaps between tokens, as they told them last."""
        itl = LogHistogram()
        for message in told.values():
            itl.add_sparse(message.itl_buckets, message.itl_counts)
        rows = b"".join(message.row for _, message in sorted(told.items()))
        return self._filled(np.frombuffer(rows, RANK).copy()), itl.counts

    def _write(self, ranks: Rows, itl: Rows, telemetry: list[Rows], copies: Rows) -> None:
        if self._writer is None:
            self._writer = SegmentWriter(self._disk, self._directory, self._session)
        samples = [Segment("telemetry", rows, {}) for rows in telemetry if len(rows)]
        if samples:
            self._writer.write(samples)
        counters = [Segment("ranks", ranks, {}), Segment("itl", itl, {})]
        if len(copies):
            counters.append(Segment("copies", copies, {}))
        replace_counters(self._disk, self._directory, self._session, counters)
