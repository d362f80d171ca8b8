"""The input of a run as a file that can be read again and again: the input itself, or what was made of it once.

What has to be converted is written under the run directory's lock, before there is a run; later sessions use what is
there. A run that has answers never gets another `requests.jsonl`: an input that is not what it was made from is
refused.
"""

from __future__ import annotations

import fcntl
import select
import struct
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.compressed import WAIT_S, open_stdin
from coordinator.convert import Converted, Source, convert
from coordinator.durations import duration
from coordinator.inputfile import Origin
from coordinator.progress import PLAIN_EVERY_S
from coordinator.rows import Columns
from scheduling.errors import ConfigError, InputError, RunDirError
from scheduling.wording import counted
from storage.joblock import JobLock
from storage.rundir import REQUESTS_NAME, holds_answers, lock_run
from storage.runjson import RUN_NAME, read_run, refuse_other_run, unusable

Note = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Prepared:
    """`path`: where the requests are read. `source`: what they were made from, for the identity of the run; None if
    they are read in place. `origin`: the same for errors, where it is one file. `held`: the lock of the run directory,
    if it was taken."""

    path: Path
    source: dict[str, Any] | None = None
    origin: Origin | None = None
    held: JobLock | None = None


def prepare_input(
    source: Source,
    run_dir: Path,
    *,
    strict: bool,
    note: Note,
    check_stop: Callable[[], object],
    stdin_ends: bool = True,
) -> Prepared:
    """Convert `source` into `run_dir`, unless that was done before; the run directory is locked afterwards.

    `check_stop` is called now and then and may raise. `stdin_ends` False: whoever hands standard input on does not
    say when it ends, so that it cannot be read. Raises InputError, ConfigError, RunDirError, RecordError (no
    space left); nothing is locked then.
    """
    held = lock_run(run_dir)
    try:
        if not _reuse(source, run_dir, note, check_stop, stdin_ends):
            if source.is_stdin and not stdin_ends:
                raise ConfigError(
                    "Open MPI's mpirun does not tell its ranks when standard input ends: leave mpirun out and give "
                    "`llmpi batch --ranks N -i -`, or write the requests to a file first"
                )
            _convert(source, run_dir, strict=strict, note=note, check_stop=check_stop)
        return Prepared(run_dir / REQUESTS_NAME, source.identity, source.origin, held)
    except BaseException:
        held.release()
        raise


def _reuse(source: Source, run_dir: Path, note: Note, check_stop: Callable[[], object], stdin_ends: bool) -> bool:
    """Whether what an earlier session made of this input is used."""
    if not (run_dir / RUN_NAME).exists():
        return False
    before = read_run(run_dir)["identity"].get("input")
    made_from = before.get("source") if isinstance(before, dict) else None
    there = (run_dir / REQUESTS_NAME).exists()
    if not holds_answers(run_dir):
        # It may become another run. What standard input has can only be told by reading it.
        return (
            there
            and made_from == source.identity
            and not (source.is_stdin and stdin_ends and _stdin_has_data(check_stop))
        )
    refuse_other_run(run_dir, {"input": {"source": made_from}}, {"input": {"source": source.identity}})
    if not there and source.is_stdin:
        raise RunDirError(
            f"{run_dir} lacks {REQUESTS_NAME}, which was made from standard input: restore it, or give another run "
            "directory"
        )
    if source.is_stdin:
        note(f"standard input is not read again: the requests are in {run_dir / REQUESTS_NAME}")
    return there


def _stdin_has_data(check_stop: Callable[[], object]) -> bool:
    """Whether something other than the end comes, without taking it; nobody is asked to type it."""
    try:
        with open_stdin() as file:
            if file.isatty():
                return False
            while not select.select([file], [], [], WAIT_S)[0]:
                check_stop()
            return bool(struct.unpack("i", fcntl.ioctl(file, termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return False  # closed, or a device such as /dev/null


def _convert(source: Source, run_dir: Path, *, strict: bool, note: Note, check_stop: Callable[[], object]) -> Converted:
    name = source.name
    start_s = time.monotonic()
    told_s = start_s

    def on_rows(rows: int, done_bytes: int, all_bytes: int) -> None:
        nonlocal told_s
        check_stop()
        now_s = time.monotonic()
        if now_s - told_s >= PLAIN_EVERY_S:
            told_s = now_s
            passed_s = now_s - start_s
            left = f", {duration(passed_s * (all_bytes - done_bytes) / done_bytes)} left" if all_bytes else ""
            note(f"converting {name}: {rows:,} requests, {rows / passed_s:,.0f} a second{left}")

    try:
        made = convert(source, run_dir, strict=strict, on_rows=on_rows, on_wait=check_stop)
    except OSError as error:
        raise unusable(run_dir, error) from error
    took_s = time.monotonic() - start_s
    note(f"converted {name}: {counted(made.rows, 'request')} in {took_s:.1f} s, from {_made_of(source.columns)}")
    return made


def _made_of(columns: Columns) -> str:
    if columns.template is not None:
        return "a template"
    return "its lines" if columns.prompt is None else f"column {columns.prompt!r}"


def tell_files(error: InputError, prepared: Prepared) -> InputError:
    """`error` about a line that was made from one of several files, with these."""
    if prepared.source is None or "files" not in prepared.source or str(prepared.path) not in str(error):
        return error
    return InputError(f"{error}\n  (it was made from the files in {prepared.source['path']}, one after another)")
