"""Whether a person is watching: the launcher's streams, not the rank's, decide.

Under mpirun a rank's stdout is often a pseudo-terminal and its stderr a pipe, whatever the person has, and Open MPI
forwards whole lines only, so that a line drawn over itself would never show. What counts is where the launcher itself
writes: if that is a terminal of this host, live lines are drawn on it directly.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import IO, Any

import psutil
from rich.console import Console

from coordinator.launch import detect

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "hydra_pmi_proxy", "hydra_bstrap_pr", "mpiexec.hydra")
PLAIN_WIDTH = 110
NARROW_COLUMNS = 100
"""A terminal with fewer shows shorter words."""


class Trimmed:
    """A stream without the blanks that fill the lines of tables: a file or a pipe has no use for them."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +(?=\n)", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console_for(stream: IO[str], *, live: bool = False) -> Console:
    """A console for `stream` (stdout or stderr) that shows colours, and with `live` moving lines, only to a person."""
    path = terminal_of(stream)
    width = None if path is None else _width_of(path)
    if path is None or width is None:
        return _plain(stream, _width_beside(stream) or PLAIN_WIDTH)
    if live and not stream.isatty():
        try:
            stream = open(path, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - as long as we live
        except OSError:
            return _plain(stream, PLAIN_WIDTH)
    return Console(file=stream, force_terminal=True, highlight=False, width=width)


def _plain(stream: IO[str], width: int) -> Console:
    trimmed: Any = Trimmed(stream)
    return Console(file=trimmed, force_terminal=False, highlight=False, width=width)


def _width_beside(stream: IO[str]) -> int | None:
    """Of the terminal of whoever looks at stdout through another program (`| less`); None where there is none, and for
    what goes to a file."""
    if stream is sys.stderr or not _is_piped(stream):
        return None
    path = terminal_of(sys.stderr)
    return None if path is None else _width_of(path)


def _is_piped(stream: IO[str]) -> bool:
    try:
        if detect(os.environ).launcher == "none":
            return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
        outermost = _outermost_launcher()
        return outermost is not None and stat.S_ISFIFO(os.stat(f"/proc/{outermost}/fd/1").st_mode)
    except (OSError, ValueError):
        return False


def terminal_of(stream: IO[str]) -> str | None:
    """The terminal on which a person sees `stream`, as a path; None if it is none that we can reach."""
    if detect(os.environ).launcher == "none":
        try:
            return os.ttyname(stream.fileno()) if stream.isatty() else None
        except (OSError, ValueError):
            return None
    return _launchers_terminal(2 if stream is sys.stderr else 1)


def _outermost_launcher() -> int | None:
    """The process id of the launcher that a person, or a script, started on this host."""
    outermost = None
    try:
        for process in psutil.Process().parents():
            if process.name() in LAUNCHERS:
                outermost = process.pid
    except psutil.Error:
        return None
    return outermost


def _launchers_terminal(descriptor: int) -> str | None:
    outermost = _outermost_launcher()
    try:
        target = "" if outermost is None else os.readlink(f"/proc/{outermost}/fd/{descriptor}")
    except OSError:
        return None
    return target if target.startswith(("/dev/pts/", "/dev/tty")) else None


def _width_of(path: str) -> int | None:
    try:
        terminal = os.open(path, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.get_terminal_size(terminal).columns or 80
    except OSError:
        return None
    finally:
        os.close(terminal)
