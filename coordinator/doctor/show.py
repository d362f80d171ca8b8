"""The report on a terminal: subjects with their findings, then what is to be mended, errors first."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from coordinator.doctor.findings import Finding, Level, Report, listed
from coordinator.terminal import NARROW_COLUMNS, console_for

MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("✓ ok", "green"),
    "warning": ("! warning", "yellow"),
    "error": ("✗ error", "bold red"),
}
ASCII = str.maketrans({"✓": "+", "✗": "x", "→": ">", "…": ".", "±": "~"})
CHECK_COLUMNS, CHECK_COLUMNS_NARROW = 24, 20


def print_report(report: Report, stream: IO[str]) -> None:
    console = console_for(stream)
    print_to(console, report)


def print_to(console: Console, report: Report) -> None:
    plain = (console.encoding or "").lower().replace("-", "") not in ("utf8", "utf16", "utf32")
    narrow = console.width < NARROW_COLUMNS
    hosts = {host for _, finding in report.all() for host in finding.where}
    for subject, findings in report.subjects.items():
        console.print(Text(f"\n{subject}", style="bold"))
        table = _table(narrow)
        for finding in findings:
            table.add_row(
                _mark(finding.level, plain), _plain(finding.check, plain), _plain(_found(finding, hosts), plain)
            )
        console.print(table)
    _print_summary(console, report, hosts, plain)


def _table(narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(width=9, no_wrap=True)
    columns = CHECK_COLUMNS_NARROW if narrow else CHECK_COLUMNS
    table.add_column(width=columns, overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    return table


def _found(finding: Finding, hosts: set[str]) -> str:
    """With the hosts it is about, where there are several and not all are meant."""
    if not finding.where or len(hosts) < 2:
        return finding.found
    where = "all hosts" if set(finding.where) >= hosts else listed(finding.where, 4)
    return f"{where}: {finding.found}" if where not in finding.found else finding.found


def _print_summary(console: Console, report: Report, hosts: set[str], plain: bool) -> None:
    errors, warnings = report.count("error"), report.count("warning")
    console.print()
    if not errors and not warnings:
        console.print(Text(_plain("✓ nothing to mend", plain), style="bold green"))
        return
    said = f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
    console.print(Text(said, style="bold"))
    for subject, finding in report.to_mend():
        console.print()
        what = subject if finding.check == subject else f"{subject}: {finding.check}"
        head = Text.assemble(_mark(finding.level, plain), (f"  {what}", "bold"))
        console.print(head, soft_wrap=True)
        console.print(Padding(Text(_plain(_found(finding, hosts), plain)), (0, 0, 0, 2)))
        console.print(Padding(Text(_plain(f"→ {finding.remedy}", plain)), (0, 0, 0, 2)))
        if finding.command:
            # Never broken, so that it can be copied.
            console.print(Text(_plain(f"    {finding.command}", plain), style="cyan"), soft_wrap=True)


def _mark(level: Level, plain: bool) -> Text:
    text, style = MARKS[level]
    return Text(_plain(text, plain), style=style)


def _plain(text: str, plain: bool) -> str:
    return text.translate(ASCII).encode("ascii", "replace").decode() if plain else text
