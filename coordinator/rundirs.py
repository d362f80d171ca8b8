"""The commands that look at a run directory: status, stop, export. None of them needs MPI."""

from __future__ import annotations

import heapq
import os
import socket
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from coordinator.slicing.slices import slice_dirs
from coordinator.statusline import state_line, status_data
from scheduling.errors import EXIT_OK, ConfigError, RankLostError
from scheduling.recordline import decode_row
from storage.export import Form, export_table
from storage.recovery import RECORD_NAME, ordered_lines, whole_lines
from storage.rundir import METRICS_NAME, SEGMENTS_NAME
from storage.runjson import RUN_NAME, read_run
from storage.runstatus import is_held, request_stop
from storage.runstatus import status as run_status
from storage.segments import segment_files

POLL_S = 0.2
OVERDUE_S = 60.0
"""How long `llmpi stop --wait` waits beyond what the job has promised: networks show files late."""


def show_status(run_dir: Path, as_json: bool) -> int:
    """Print how far a run is, or all slices of one; the exit code says it too (0, 1 or 3)."""
    if dirs := slice_dirs(run_dir):
        from coordinator.slicing import whole

        return whole.show_status(run_dir, dirs, as_json)
    found = run_status(run_dir)
    if as_json:
        from coordinator.values import print_json

        print_json(status_data(found))
        return found.exit_code
    print(state_line(found))
    return found.exit_code


def stop_run(run_dir: Path, wait: bool) -> int:
    """Ask the job that works on a run to drain. With `wait`: until it has, and exit as `show_status` does then.

    Raises:
        RunDirError: there is no run, or no job works on it.
        RankLostError: the job has not ended long after it should have.
    """
    if dirs := slice_dirs(run_dir):
        from coordinator.slicing import whole

        for path in whole.stop_all(run_dir, dirs):
            print(f"asked the job on {path} to drain", flush=True)
        while wait and any(is_held(path) for path in dirs):
            time.sleep(POLL_S)
        return show_status(run_dir, as_json=False) if wait else EXIT_OK
    holder = request_stop(run_dir)
    where = f" (process {holder.pid} on {holder.host})" if holder is not None else ""
    bound_s = read_run(run_dir)["details"].get("batch", {}).get("stopping", {}).get("drain_timeout_s")
    when = "" if bound_s is None else f" within {bound_s:g} s"
    print(f"asked the job on {run_dir}{where} to drain: it finishes what it can and ends{when}", flush=True)
    if not wait:
        return EXIT_OK
    deadline = time.monotonic() + (bound_s or 0.0) + OVERDUE_S
    while is_held(run_dir):
        if time.monotonic() > deadline:
            raise RankLostError(f"the job on {run_dir}{where} has not ended{when}, nor {OVERDUE_S:g} s after that")
        time.sleep(POLL_S)
    return show_status(run_dir, as_json=False)


def outdated(run_dir: Path) -> bool:
    """Whether metrics.h5 is missing, or something that it is made of was written later."""
    metrics = run_dir / METRICS_NAME
    if not metrics.exists():
        return True
    sources = [path for path in (run_dir / RECORD_NAME, *segment_files(run_dir / SEGMENTS_NAME)) if path.exists()]
    return any(path.stat().st_mtime_ns > metrics.stat().st_mtime_ns for path in sources)


def export_answers(run_dir: Path, order: str, output: Path | None, table: str | None = None) -> int:
    """Write all answers to `output` or stdout; `table` says as which kind of table, None: the record's lines.

    A table that goes to a file appears there whole or not at all.
    """
    dirs = slice_dirs(run_dir) or [run_dir]
    begun = [path for path in dirs if path == run_dir or (path / RUN_NAME).exists()]
    for path in begun:
        read_run(path)
    if len(begun) < len(dirs):
        print(
            f"llmpi: {len(dirs) - len(begun)} of {len(dirs)} slices have not begun: they are left out", file=sys.stderr
        )
    if table == "parquet" and output is None and sys.stdout.isatty():
        raise ConfigError("a Parquet file is nothing for a terminal: name a file with -o")
    to = output
    if table is not None and output is not None and (output.is_file() or not output.exists()):
        to = output.with_name(f".{output.name}.{socket.gethostname()}-{os.getpid()}.tmp")  # others may export, too
    try:
        target = sys.stdout.buffer if to is None else to.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    try:
        if table is not None:
            export_table(begun, target, cast("Form", table), in_input_order=order == "input")
        else:
            _export_lines(begun, target, in_input_order=order == "input")
        target.flush()
        if to is not None and to != output:
            os.fsync(target.fileno())
            to.replace(cast("Path", output))
    except OSError as error:
        if output is None:
            raise
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    finally:
        if to is not None:
            target.close()
        if to is not None and to != output:
            to.unlink(missing_ok=True)
    return EXIT_OK


def _export_lines(run_dirs: Sequence[Path], out: BinaryIO, *, in_input_order: bool) -> None:
    records = [path / RECORD_NAME for path in run_dirs]
    if not in_input_order:
        out.writelines(chain.from_iterable(map(whole_lines, records)))
    elif len(records) == 1:
        out.writelines(ordered_lines(records[0]))
    else:
        out.writelines(heapq.merge(*map(ordered_lines, records), key=lambda line: decode_row(line).llmpi.index))
