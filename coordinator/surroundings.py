"""What rank 0 of a job lives in beside its ranks: time and disk. Real unless a simulation brings its own.

Everything that waits on rank 0 is a loop of turns that never block, with `sleep` between them: whoever gives another
`sleep` decides what happens meanwhile.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from storage.files import Disk, OsDisk
from storage.record import RecordWriter

Sleep = Callable[[Sequence[int | None], float], None]
"""Given descriptors that may have something to read, and seconds."""


class Recorder(Protocol):
    """Where answers go. `acknowledged` counts the lines that became durable since it was last asked."""

    @property
    def backlog_bytes(self) -> int: ...
    def append(self, lines: list[bytes]) -> None: ...
    def acknowledged(self) -> int: ...


class FileRecorder(Recorder, Protocol):
    """One that writes to a file. `fsyncs`: how often it has synced."""

    @property
    def fsyncs(self) -> int: ...
    def close(self) -> None: ...


def sleep(descriptors: Sequence[int | None], delay_s: float) -> None:
    """Sleep, or less if one of the descriptors has something to read."""
    waiting = [descriptor for descriptor in descriptors if descriptor is not None]
    if waiting:
        select.select(waiting, [], [], delay_s)
    else:
        time.sleep(delay_s)


def one_thread() -> Executor:
    return ThreadPoolExecutor(1, "intervals")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`clock` is monotonic and measures; `wall_clock` is seconds since the epoch. `executor` makes what writes metrics
    beside the loop; `recorder` what writes answers, given disk, path, clock, seconds and bytes between two commits, and
    what raises RunDirError once the record is another job's."""

    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    sleep: Sleep = sleep
    disk: Disk = field(default_factory=OsDisk)
    recorder: Callable[[Disk, Path, Callable[[], float], float, int, Callable[[], None]], FileRecorder] = RecordWriter
    executor: Callable[[], Executor] = one_thread
