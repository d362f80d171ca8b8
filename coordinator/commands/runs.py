"""What is asked of a run directory, `llmpi status`, `stop`, `report` and `export`: parsing and help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from coordinator.commands.parameters import AsJson, RunDirectory
from coordinator.launch import detect
from scheduling.errors import EXIT_OK


def status(run_dir: RunDirectory, as_json: AsJson = False) -> None:
    """Say how far a run is. Exit 0 if all is answered, 1 if some failed, 3 if it can be resumed."""
    from coordinator.rundirs import show_status

    raise typer.Exit(show_status(run_dir, as_json) if detect(os.environ).speaks else EXIT_OK)


def stop(
    run_dir: RunDirectory,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the job has ended; then exit as `llmpi status` does.")
    ] = False,
) -> None:
    """Drain a running job. Nothing new is started, what runs is finished if it can be, the run can be resumed."""
    from coordinator.rundirs import stop_run

    raise typer.Exit(stop_run(run_dir, wait) if detect(os.environ).speaks else EXIT_OK)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories of batches.")],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Page with pictures to write. [default: report.html in RUN_DIR; of several runs, in this folder]"
        ),
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Tables only.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Answers to print as well.")] = 0,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make metrics.h5 anew from the record.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the tables of runs, and write a page with pictures. Several runs stand side by side.

    metrics.h5 is made from the record and the segments where it is missing or older.
    """
    from coordinator.reporting import ReportOptions, show_report

    options = ReportOptions(html=html, no_html=no_html, show=show, rebuild=rebuild, as_json=as_json)
    raise typer.Exit(show_report(run_dirs, options) if detect(os.environ).speaks else EXIT_OK)


def export(
    run_dir: RunDirectory,
    order: Annotated[
        Literal["input", "completion"], typer.Option(help="'input' sorts the answers like the requests.")
    ] = "input",
    to: Annotated[
        Literal["jsonl", "csv", "parquet"] | None,
        typer.Option(help="A table with a row an answer: text, how it ended, tokens, times. [default: no table]"),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write. [default: stdout]")] = None,
) -> None:
    """Write the answers as OpenAI batch output or as a table. Each is a line or a row."""
    from coordinator.rundirs import export_answers

    if not detect(os.environ).speaks:
        raise typer.Exit(EXIT_OK)
    raise typer.Exit(export_answers(run_dir, order, output, to))
