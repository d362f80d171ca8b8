"""`llmpi report`: the tables of runs, and a page with pictures. Needs no MPI; the page needs matplotlib.

metrics.h5 is made anew where it is missing or older than the record: a job that died could not write it. The page is
written to a temporary name and renamed. That a page cannot be made never takes the tables away.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.slicing.slices import slice_dirs
from scheduling.errors import EXIT_OK, ConfigError, RunDirError
from storage.recovery import RECORD_NAME
from storage.rundir import METRICS_NAME
from storage.runjson import RUN_NAME, read_run
from storage.runstatus import Status
from storage.runstatus import status as run_status

PAGE_NAME = "report.html"
NEEDS = "the page needs matplotlib: pip install 'llmpi[report]'"
RUNS_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """`html` None: RUN_DIR/report.html for one run, report.html in the current folder for several."""

    html: Path | None = None
    no_html: bool = False
    as_json: bool = False
    show: int = 0
    rebuild: bool = False


def show_report(run_dirs: Sequence[Path], options: ReportOptions) -> int:
    """Print the tables of one run, or of several side by side, and write the page.

    Raises:
        ConfigError: options that exclude each other, too many runs, or a page asked for by name that cannot be made.
        RunDirError: a directory holds no run, or its record is damaged, or gone where metrics.h5 is to be made anew.
        RecordError: metrics.h5 cannot be written.
    """
    if options.html is not None and options.no_html:
        raise ConfigError("--html and --no-html exclude each other: leave out one of them")
    if len(run_dirs) == 1 and (dirs := slice_dirs(run_dirs[0])):
        return _report_slices(run_dirs[0], dirs, options)
    if len(run_dirs) > RUNS_MAX:
        raise ConfigError(f"{len(run_dirs)} runs are too many to read side by side: give {RUNS_MAX} at most")
    if options.show and len(run_dirs) > 1:
        raise ConfigError("--show prints the answers of one run: give one run directory")
    states = [run_status(run_dir) for run_dir in run_dirs]
    for run_dir in run_dirs:
        _make_metrics(run_dir, options.rebuild)
    _print_tables(run_dirs, states, options)
    if options.html is not None or not (options.no_html or options.as_json):
        _write_page(run_dirs, states, options)
    return EXIT_OK


def _report_slices(run_dir: Path, dirs: Sequence[Path], options: ReportOptions) -> int:
    from coordinator.slicing import whole

    if options.html is not None or options.show:
        raise ConfigError(f"--html and --show are for one run: name a slice, as {dirs[0]}")
    for path in dirs:
        if (path / RUN_NAME).exists():
            _make_metrics(path, options.rebuild)
    whole.show_report(run_dir, dirs, options.as_json)
    return EXIT_OK


def _make_metrics(run_dir: Path, rebuild: bool) -> None:
    from coordinator.rundata import make_metrics
    from coordinator.rundirs import outdated

    if (run_dir / METRICS_NAME).exists() and not (run_dir / RECORD_NAME).exists():
        # What metrics.h5 has is all that is left.
        if rebuild:
            raise RunDirError(
                f"{run_dir} has lost its {RECORD_NAME}: {METRICS_NAME} cannot be made anew, and is left as it is"
            )
        return
    if rebuild or outdated(run_dir):
        before = read_run(run_dir)
        make_metrics(run_dir)
        if read_run(run_dir) != before:
            # The job ended meanwhile, and has made its own: this one may have taken that one's place.
            make_metrics(run_dir)


def _print_tables(run_dirs: Sequence[Path], states: Sequence[Status], options: ReportOptions) -> None:
    from coordinator.report import print_report, report_data
    from coordinator.runview import names_of
    from coordinator.sidebyside import print_comparison
    from coordinator.statusline import state_line

    data: list[dict[str, Any]] = [report_data(run_dir) for run_dir in run_dirs]
    if options.as_json:
        from coordinator.values import print_json

        print_json(data[0] if len(data) == 1 else data)
        return
    for found in states:
        if not found.complete or found.lost_bytes:
            print(state_line(found))
    if len(data) == 1:
        print_report(data[0], sys.stdout, run_dirs[0], show=options.show)
    else:
        print_comparison(list(zip(names_of(run_dirs), data, strict=True)), sys.stdout)


def _write_page(run_dirs: Sequence[Path], states: Sequence[Status], options: ReportOptions) -> None:
    from coordinator.page import svg

    if not svg.available():
        if options.html is not None:
            raise ConfigError(NEEDS)
        print(f"llmpi: {NEEDS}", file=sys.stderr)
        return
    from coordinator.page.document import page
    from coordinator.report import failure_reasons
    from coordinator.runview import names_of, view_run

    target = options.html or (run_dirs[0] / PAGE_NAME if len(run_dirs) == 1 else Path(PAGE_NAME))
    views = [
        view_run(path, name, found) for path, name, found in zip(run_dirs, names_of(run_dirs), states, strict=True)
    ]  # fmt: skip
    text = page(
        views,
        [failure_reasons(path) if view.data["failed"] else [] for path, view in zip(run_dirs, views, strict=True)],
    )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        problem = f"cannot write {target}: {error.strerror or error}"
        if options.html is not None:
            raise ConfigError(problem) from None
        print(f"llmpi: {problem}. Give another place with --html FILE", file=sys.stderr)
        return
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing is there
            temporary.unlink(missing_ok=True)
    print(f"page with pictures: {target}", file=sys.stderr if options.as_json else sys.stdout)
