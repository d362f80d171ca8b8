"""The commands that look at a run directory: status, stop, report, export. None of them needs MPI."""

from __future__ import annotations

import sys
from pathlib import Path

from scheduling.errors import EXIT_OK, ConfigError
from storage.recovery import RECORD_NAME, export_ordered, whole_lines
from storage.rundir import METRICS_NAME, SEGMENTS_NAME, Status, read_run, request_stop
from storage.rundir import status as run_status
from storage.segments import segment_files


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
    print(_state(found))
    return found.exit_code


def _state(found: Status) -> str:
    total = "?" if found.total is None else str(found.total)
    state = (
        "complete" if found.complete else "running" if found.running else "not complete: the same command resumes it"
    )
    return f"{found.path}: {found.done} of {total} done ({found.ok} answered, {found.failed} failed), {state}"


def stop_run(run_dir: Path) -> int:
    """Ask the job that works on a run to drain."""
    holder = request_stop(run_dir)
    where = f" (process {holder.pid} on {holder.host})" if holder is not None else ""
    print(f"asked the job on {run_dir}{where} to drain: it finishes what runs and stops")
    return EXIT_OK


def show_report(run_dir: Path, as_json: bool, *, rebuild: bool = False) -> int:
    """Print the tables of a run. metrics.h5 is made anew if `rebuild`, or where it is missing or out of date."""
    from coordinator.report import print_report, report_data
    from coordinator.rundata import make_metrics

    found = run_status(run_dir)
    if rebuild or _outdated(run_dir):
        before = read_run(run_dir)
        make_metrics(run_dir)
        if read_run(run_dir) != before:
            # The job ended meanwhile, and has made its own: this one may have taken that one's place.
            make_metrics(run_dir)
    data = report_data(run_dir)
    if as_json:
        from coordinator.values import print_json

        print_json(data)
        return EXIT_OK
    if not found.complete:
        print(_state(found))
    print_report(data, sys.stdout, run_dir)
    return EXIT_OK


def _outdated(run_dir: Path) -> bool:
    """Whether metrics.h5 is missing, or something that it is made of was written later."""
    metrics = run_dir / METRICS_NAME
    if not metrics.exists():
        return True
    sources = [path for path in (run_dir / RECORD_NAME, *segment_files(run_dir / SEGMENTS_NAME)) if path.exists()]
    return any(path.stat().st_mtime_ns > metrics.stat().st_mtime_ns for path in sources)


def export_answers(run_dir: Path, order: str, output: Path | None) -> int:
    """Write all answers to `output` or stdout."""
    read_run(run_dir)
    try:
        target = sys.stdout.buffer if output is None else output.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    try:
        if order == "input":
            export_ordered(run_dir, target)
        else:
            target.writelines(whole_lines(run_dir / RECORD_NAME))
        target.flush()
    except OSError as error:
        if output is None:
            raise
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    finally:
        if output is not None:
            target.close()
    return EXIT_OK
