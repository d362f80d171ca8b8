"""The commands that look at a run directory: status, stop, export. None of them needs MPI."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import cast

from scheduling.errors import EXIT_OK, ConfigError, RankLostError
from storage.export import Form, export_table
from storage.recovery import RECORD_NAME, export_ordered, whole_lines
from storage.rundir import METRICS_NAME, SEGMENTS_NAME
from storage.runjson import read_run
from storage.runstatus import Status, is_held, request_stop
from storage.runstatus import status as run_status
from storage.segments import segment_files

POLL_S = 0.2
OVERDUE_S = 60.0
"""How long `llmpi stop --wait` waits beyond what the job has promised: networks show files late."""


def show_status(run_dir: Path, as_json: bool) -> int:
    """Print how far a run is; the exit code says it too (0, 1 or 3)."""
    found = run_status(run_dir)
    if as_json:
        from coordinator.values import print_json

        print_json(
            {
                "run_dir": str(run_dir), "ok": found.ok, "failed": found.failed, "done": found.done,
                "total": found.total, "complete": found.complete, "running": found.running,
                "sessions": found.sessions, "exit_code": found.exit_code,
            }
        )  # fmt: skip
        return found.exit_code
    print(state_line(found))
    return found.exit_code


def state_line(found: Status) -> str:
    """How far a run is, in a line."""
    total = "?" if found.total is None else str(found.total)
    state = (
        "complete" if found.complete else "running" if found.running else "not complete: the same command resumes it"
    )
    return f"{found.path}: {found.done} of {total} done ({found.ok} answered, {found.failed} failed), {state}"


def stop_run(run_dir: Path, wait: bool) -> int:
    """Ask the job that works on a run to drain. With `wait`: until it has, and exit as `show_status` does then.

    Raises:
        RunDirError: there is no run, or no job works on it.
        RankLostError: the job has not ended long after it should have.
    """
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
    read_run(run_dir)
    if table == "parquet" and output is None and sys.stdout.isatty():
        raise ConfigError("a Parquet file is nothing for a terminal: name a file with -o")
    to = output
    if table is not None and output is not None and (output.is_file() or not output.exists()):
        to = output.with_name(f".{output.name}.tmp")
    try:
        target = sys.stdout.buffer if to is None else to.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    try:
        if table is not None:
            export_table(run_dir, target, cast("Form", table), in_input_order=order == "input")
        elif order == "input":
            export_ordered(run_dir, target)
        else:
            target.writelines(whole_lines(run_dir / RECORD_NAME))
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
