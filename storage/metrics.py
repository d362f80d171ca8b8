"""metrics.h5: every request, rank, histogram and sample of a run, for h5py, pandas or MATLAB.

Made once at the end, and again at any time from the record and the segments. Written to a temporary name and
renamed, so that what is there is whole. Only plain numbers and fixed-length strings; units, formulas and the
numbers that stand for words are attributes (docs/metrics.md lists all). Rows are streamed: memory is one chunk.
HDF5's own file locking is not used: the run directory has a lock already, and parallel file systems often have none.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from scheduling.errors import RecordError, RunDirError
from scheduling.histogram import BUCKETS, LogHistogram, edges_s
from scheduling.tables import COPY, FINISH_REASONS, RANK, REQUEST, TELEMETRY
from storage.files import Disk, OsDisk
from storage.summary import Rows, Summary, summarise

FORMAT_VERSION = 1
CHUNK_ROWS = 16_384
ROWS_PER_READ = 65_536

FORMULAS = {
    "queue_s": "received by the engine to first scheduled",
    "ttft_s": "received by the engine to first output token, queue_s included; NaN without output",
    "tpot_s": "(e2e_s - ttft_s) / (output_tokens - 1); NaN for fewer than 2 tokens or several choices",
    "e2e_s": "received by the engine to finished, queue_s included",
    "end_s": "ended, since rank 0 welcomed the rank, on the rank's clock; the engine received it at end_s - e2e_s",
    "itl_s": "gaps between consecutive output tokens of a sequence; 0 between those that come from one step",
    "busy_s": "time in which at least one slot was in use",
    "slot_s": "integral of slots in use over time",
    "starved_slot_s": "integral of free slots over time while unstarted work existed that they could have taken",
    "open_slot_s": "integral of all slots, free or not, over the same time: what starved_slot_s is a share of",
}

UNITS = {
    "REQUEST": {"queue_s": "s", "ttft_s": "s", "tpot_s": "s", "e2e_s": "s", "end_s": "s"},
    "RANK": {"busy_s": "s", "slot_s": "slot s", "starved_slot_s": "slot s", "open_slot_s": "slot s", "wall_s": "s"},
    "COPY": {"start_s": "s since the start of the session", "answered_s": "s since the start of the session"},
    "TELEMETRY": {
        "t_s": "s since the start of the session",
        "utilization": "%",
        "memory_used_bytes": "B",
        "power_w": "W",
        "temperature_c": "deg C",
        "energy_j": "J since the start of the session",
        "cpu_percent": "% of one core",
        "rss_bytes": "B",
    },
}

_STORAGE: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "track_times": False}


def write_metrics(
    path: Path,
    rows_iter: Iterable[Rows],
    ranks: Rows,
    histograms: Mapping[str, LogHistogram],
    telemetry: Rows | Iterable[Rows],
    attributes: Mapping[str, Any],
    disk: Disk | None = None,
    *,
    copies: Rows | None = None,
) -> None:
    """Write metrics.h5 at `path`, replacing the old one only when the new one is whole and durable.

    `rows_iter` yields chunks of `scheduling.tables.REQUEST`, `ranks` is `RANK`, `telemetry` is `TELEMETRY` or
    chunks of it, `copies` is `COPY`. `histograms` by name without unit (queue, ttft, tpot, itl, e2e). `attributes` are
    numbers, texts, or lists of them, stored at the root. Raises RecordError if it cannot be written.
    """
    # A name of its own: a report may be made while the job that runs here makes one.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    disk = disk or OsDisk()

    def write(place: Path) -> None:
        with place.open("w+b", buffering=0) as raw:
            target = _Unfailing(raw)
            fill(target)
        target.check()

    def fill(target: _Unfailing) -> None:
        with h5py.File(target, "w") as file:
            _root_attributes(file, attributes)
            _table(file, "requests", REQUEST, UNITS["REQUEST"], target.checked(rows_iter))
            file["requests"].attrs["finish_reasons"] = [f"{n}={name}" for name, n in FINISH_REASONS.items()]
            file["requests"].attrs["ok"] = ["0=failed", "1=answered"]
            _table(file, "ranks", RANK, UNITS["RANK"], [ranks])
            chunks = [telemetry] if isinstance(telemetry, np.ndarray) else telemetry
            _table(file, "telemetry", TELEMETRY, UNITS["TELEMETRY"], target.checked(chunks))
            file["telemetry"].attrs["missing"] = "NaN, or -1 for integers; never 0"
            _table(file, "copies", COPY, UNITS["COPY"], [] if copies is None else [copies])
            file["copies"].attrs["won"] = ["1=the copy answered first", "0=it was in vain", "-1=neither answered"]
            _histograms(file, histograms)

    try:
        disk.fill(temporary, write)
        disk.rename(temporary, path)
        disk.sync_dir(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError is what h5py makes of a failed close
        raise RecordError(f"cannot write {path}: {_why(error)}. {_way_out(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # a disk that refuses everything does not hide why
            disk.remove(temporary)


class _Unfailing:
    """A file for HDF5 in which nothing fails, over one in which it may.

    What HDF5 could not write it tries again whenever an object is let go, and once more when the process ends, with a
    traceback each time and a crash at last. So the first error is kept, for `check` to raise, and what comes after it
    is dropped.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the error that there was, if any."""
        if self._error is not None:
            raise self._error

    def checked(self, chunks: Iterable[Rows]) -> Iterator[Rows]:
        """The same chunks, as long as there is no error."""
        for rows in chunks:
            self.check()
            yield rows

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return length

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            if self._error is None:
                self._file.truncate(size)
        except OSError as error:
            self._error = error
        return size or 0

    def flush(self) -> None:
        """Nothing is held back here."""


def _why(error: Exception) -> str:
    """The reason in a few words: HDF5 says it with addresses, over several lines."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error).partition("\n")[0]


def _way_out(error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM):
        way = "where it can be written run the same command again, or `llmpi report` on a copy of the run directory"
    else:
        way = "free space, then run the same command again"
    return f"The answers are safe in the record; {way}."


def _root_attributes(file: h5py.File, attributes: Mapping[str, Any]) -> None:
    file.attrs["format"] = "llmpi-metrics"
    file.attrs["format_version"] = FORMAT_VERSION
    for name, value in attributes.items():
        # HDF5 has no None: what is unknown is not there.
        if value is not None:
            file.attrs[name] = [_attribute(one) for one in value] if isinstance(value, list) else _attribute(value)


def _attribute(value: Any) -> Any:
    """As any reader takes it: no enumeration for yes and no, and texts that can be written in UTF-8, without NUL."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    return value.encode("utf-8", "replace").decode().replace("\0", "?") if isinstance(value, str) else value


def _table(
    file: h5py.File, name: str, dtype: np.dtype[np.void], units: Mapping[str, str], chunks: Iterable[Rows]
) -> None:
    """A dataset that grows chunk by chunk, with what its fields mean."""
    table = file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(CHUNK_ROWS,), **_STORAGE)
    for rows in chunks:
        if rows.dtype != dtype:
            raise ValueError(f"rows for /{name} have the type {rows.dtype}, not {dtype}")
        start = len(table)
        table.resize((start + len(rows),))
        table[start:] = rows
    for field in dtype.names or ():
        if field in units:
            table.attrs[f"{field}_unit"] = units[field]
        if field in FORMULAS:
            table.attrs[f"{field}_formula"] = FORMULAS[field]


def _histograms(file: h5py.File, histograms: Mapping[str, LogHistogram]) -> None:
    group = file.create_group("histograms")
    edges = group.create_dataset("edges_s", data=edges_s(), **_STORAGE)
    edges.attrs["unit"] = "s"
    edges.attrs["meaning"] = "bucket k of the others counts values in [edges_s[k], edges_s[k + 1])"
    for name, histogram in histograms.items():
        counts = group.create_dataset(name, data=histogram.counts.astype(np.int64), **_STORAGE)
        counts.attrs["unit"] = "samples per bucket"
        counts.attrs["count"] = histogram.count
        # Gaps between tokens come as counts alone: then there is no sum.
        counts.attrs["sum_s"] = histogram.sum_s if histogram.sum_s > 0.0 or not histogram.count else math.nan
        counts.attrs["formula"] = FORMULAS[f"{name}_s"]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Metrics:
    """What a report needs of metrics.h5. `histograms` by name, as they were given; `summary` from the rows."""

    attributes: dict[str, Any]
    summary: Summary
    ranks: Rows
    histograms: dict[str, LogHistogram]
    telemetry_samples: int


def read_summary(path: Path) -> Metrics:
    """Read a metrics file back, its requests in chunks. Raises RunDirError if it is missing or no such file."""
    with _open(path) as file:
        try:
            return Metrics(
                attributes=_plain_attributes(file),
                summary=summarise(_chunks(file["requests"])),
                ranks=file["ranks"][:],
                histograms={
                    name: _histogram(counts) for name, counts in file["histograms"].items() if name != "edges_s"
                },
                telemetry_samples=len(file["telemetry"]),
            )
        except (KeyError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error


def read_requests(path: Path) -> Iterator[Rows]:
    """The rows of /requests in chunks."""
    with _open(path) as file:
        yield from _chunks(file["requests"])


def read_telemetry(path: Path) -> Rows:
    """All of /telemetry."""
    with _open(path) as file:
        telemetry: Rows = file["telemetry"][:]
        return telemetry


def read_copies(path: Path) -> Rows:
    """All of /copies; none where an older version wrote the file."""
    with _open(path) as file:
        copies: Rows = file["copies"][:] if "copies" in file else np.zeros(0, COPY)
        return copies


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    with contextlib.ExitStack() as stack:
        try:
            # Through a file of ours: HDF5 would lock one of its own if HDF5_USE_FILE_LOCKING says so, whatever we say.
            raw = stack.enter_context(path.open("rb"))
            file = stack.enter_context(h5py.File(raw, "r"))
        except OSError as error:
            raise _unreadable(path, error) from error
        if file.attrs.get("format") != "llmpi-metrics" or file.attrs.get("format_version") != FORMAT_VERSION:
            raise RunDirError(f"{path} is no metrics file of this version of llmpi.")
        yield file


def _chunks(table: h5py.Dataset) -> Iterator[Rows]:
    for start in range(0, len(table), ROWS_PER_READ):
        yield table[start : start + ROWS_PER_READ]


def _histogram(counts: h5py.Dataset) -> LogHistogram:
    if counts.shape != (BUCKETS,):
        raise ValueError(f"a histogram of {counts.shape} buckets")
    sum_s = float(counts.attrs["sum_s"])
    return LogHistogram(counts[:], sum_s if math.isfinite(sum_s) else 0.0)


def _plain_attributes(file: h5py.File) -> dict[str, Any]:
    """Attributes as Python values."""
    return {name: _plain(value) for name, value in file.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _unreadable(path: Path, error: Exception) -> RunDirError:
    return RunDirError(f"cannot read the metrics {path}: {error}. Make them again with 'llmpi report --rebuild'.")
