"""Input that cannot be read in place: written once, as JSON lines, into the run directory.

A run reads its requests more than once and from any place on: for the check, on resuming, for another attempt. Plain
files of JSON lines and of text allow that. Everything else (compressed files, Parquet, CSV, directories of files,
standard input, JSON lines whose fields have other names) becomes `requests.jsonl`, a line a request, streaming; from
there on it is a file like any other. The file appears whole or not at all. What it was made from is remembered by
path, size and time of change, so that resuming can tell whether that is still the same.

This module decides what an input is made of (`parts_of`), and converts it (`convert`). When that has to be done, and
that nobody else does it meanwhile, is for `coordinator.prepared` to say.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import msgspec

from coordinator.compressed import STDIN, Stored, packing, unpacked
from coordinator.inputfile import (
    BOM,
    PROBLEMS_MAX,
    Origin,
    Problems,
    Readable,
    line_blocks,
    text_of,
    too_long,
)
from coordinator.rows import Columns, Row, RowForm, csv_rows, parquet_rows
from scheduling.errors import ConfigError, InputError, RequestError
from scheduling.requestlines import text_line
from storage.files import OsDisk
from storage.rundir import REQUESTS_NAME

Kind = Literal["jsonl", "text", "csv", "tsv", "parquet"]

_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
_PACKED = (".gz", ".zst", ".zstd")
_PARQUET = b"PAR1"
_SNIFFED_BYTES = 1 << 16
_OTHERS_SHOWN = 5
_NO_REQUEST = b'{"prompt":null}'
"""What stands for a row that makes no request, where rows may fail alone."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an input (`path` STDIN: standard input), and how it is written. 'text' and the like may be packed."""

    path: Path
    kind: Kind | None
    """None: its content will say."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input that has to be converted. `identity` is what tells it from another, for run.json."""

    path: Path
    parts: tuple[Part, ...]
    columns: Columns
    identity: dict[str, Any]

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def name(self) -> str:
        return "standard input" if self.is_stdin else str(self.path)

    @property
    def origin(self) -> Origin | None:
        """Whose lines or rows the requests are, one each; None if they are those of several files."""
        if self.parts[0].path != self.path:
            return None
        kind = self.parts[0].kind or ("csv" if self.columns.given else "text")  # it will be sniffed in about this way
        return Origin(self.name, "row" if kind in ("csv", "tsv", "parquet") else "line")


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of an input: so many requests in so many bytes."""

    rows: int
    bytes: int


# ---------------------------------------------------------------- what an input is made of


def source_of(path: Path, form: str | None, columns: Columns) -> Source | None:
    """The input at `path` as one that must be converted; None if it is read in place.

    Raises InputError or ConfigError for what cannot be an input at all.
    """
    kind = cast("Kind | None", form)
    if path == STDIN:
        return _source(path, (Part(path, kind),), columns, {"path": "-"}, form)
    try:
        status = path.stat()
    except OSError:
        return None  # reading it in place says what is wrong
    if stat.S_ISDIR(status.st_mode):
        parts = _parts_of_directory(path, kind)
        return _source(path, parts, columns, _identity_of_parts(path, parts), form)
    if not stat.S_ISREG(status.st_mode):
        return None
    kind = kind or _kind_by_name(path)
    if not columns.given and kind in ("jsonl", "text", None):
        with Stored(path) as stored:
            head = stored.peek(4)
        if packing(head) is None and not head.startswith(_PARQUET) and path.suffix.lower() not in _PACKED:
            return None
    identity = {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return _source(path, (Part(path, kind),), columns, identity, form)


def _source(
    path: Path, parts: tuple[Part, ...], columns: Columns, identity: dict[str, Any], form: str | None
) -> Source:
    said = {
        "format": form, "prompt_column": columns.prompt, "template": columns.template, "id_column": columns.id,
    }  # fmt: skip
    return Source(path, parts, columns, identity | {key: value for key, value in said.items() if value is not None})


def _kind_by_name(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _parts_of_directory(path: Path, form: Kind | None) -> tuple[Part, ...]:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    parts, others = [], []
    for name in names:
        if name.startswith("."):
            continue
        kind = _kind_by_name(path / name)
        if kind is None or not (path / name).is_file():
            others.append(name)
        else:
            parts.append(Part(path / name, form or kind))
    if others:
        shown = ", ".join(others[:_OTHERS_SHOWN]) + (", …" if len(others) > _OTHERS_SHOWN else "")
        raise InputError(
            f"{path} holds what is no file of requests: {shown}; move it elsewhere, or give files the endings "
            f"{' '.join(_SUFFIXES)} (or these with .gz or .zst)"
        )
    if not parts:
        raise InputError(f"{path} is empty: there is no file of requests in it")
    return tuple(parts)


def _identity_of_parts(path: Path, parts: Sequence[Part]) -> dict[str, Any]:
    listing = hashlib.sha256()
    size = 0
    for part in parts:
        status = part.path.stat()
        size += status.st_size
        listing.update(msgspec.json.encode((part.path.name, status.st_size, status.st_mtime_ns)) + b"\n")
    return {
        "path": str(path.resolve()), "files": len(parts), "bytes": size, "listing_sha256": listing.hexdigest(),
    }  # fmt: skip


# ---------------------------------------------------------------- converting


OnRows = Callable[[int, int, int], object]
"""Called as (requests so far, bytes of the input read, bytes in all; 0 if not known), about once a MiB."""


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def convert(
    source: Source,
    run_dir: Path,
    *,
    strict: bool,
    on_rows: OnRows = _nothing,
    on_wait: Callable[[], object] = _nothing,
) -> Converted:
    """Write the requests of `source` to `run_dir`/requests.jsonl, durably and at once.

    `on_wait` is called while nothing comes from standard input.

    `strict`: rows that make no request are an error, which names the first ones of a file; else each becomes a
    request that fails. Raises InputError, ConfigError (a package is missing), OSError (of the run directory).
    """
    disk = OsDisk()
    final = run_dir / REQUESTS_NAME
    temporary = run_dir / f".{REQUESTS_NAME}.tmp"
    try:
        with open(temporary, "wb", buffering=1 << 20) as out:
            rows = _Conversion(source, out, strict, on_rows, on_wait).run()
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        if rows == 0:
            raise InputError(f"{source.name} is empty: there is no request in it")
        disk.rename(temporary, final)
        disk.sync_dir(run_dir)
    finally:
        disk.remove(temporary)
    return Converted(rows, size)


class _Conversion:
    """One pass over an input."""

    def __init__(
        self, source: Source, out: BinaryIO, strict: bool, on_rows: OnRows, on_wait: Callable[[], object]
    ) -> None:
        self._source = source
        self._columns = source.columns
        self._out = out
        self._strict = strict
        self._on_rows = on_rows
        self._on_wait = on_wait
        self._rows = 0
        self._written = self._told = 0
        self._bytes_before = 0
        self._bytes_all = 0 if source.is_stdin else sum(part.path.stat().st_size for part in source.parts)

    def run(self) -> int:
        for part in self._source.parts:
            self._convert(part)
            self._bytes_before += 0 if part.path == STDIN else part.path.stat().st_size
        return self._rows

    def _convert(self, part: Part) -> None:
        with Stored(part.path, self._on_wait) as stored:
            if stored.peek(4) == _PARQUET or part.kind == "parquet":
                if part.path == STDIN:
                    raise InputError("a Parquet file cannot be read from standard input: give its path with -i")
                if part.kind not in (None, "parquet"):
                    raise InputError(
                        f"{part.path} is a Parquet file, not {part.kind}: name it so, or leave out --format"
                    )
                self._convert_rows(parquet_rows(part.path, self._form_of(stored.name)), Problems("row"), stored)
                return
            file = unpacked(stored)
            kind = part.kind
            if kind is None:
                file = _Ahead(file)
                kind = _sniffed(file.peek(_SNIFFED_BYTES), self._columns)
            if kind in ("csv", "tsv"):
                rows = csv_rows(file, stored.name, "," if kind == "csv" else "\t", self._form_of(stored.name))
                self._convert_rows(rows, Problems("row"), stored)
            elif kind == "text":
                self._refuse_columns(stored.name)
                self._convert_lines(file, stored, lambda line: text_line(text_of(line)))
            elif self._columns.given:
                form = RowForm(self._columns, None, stored.name)
                self._convert_lines(file, stored, lambda line: _line_of_object(line, form))
            else:
                self._convert_lines(file, stored, None)

    def _form_of(self, table: str) -> Callable[[Sequence[str] | None], RowForm]:
        return lambda names: RowForm(self._columns, names, table)

    def _refuse_columns(self, name: str) -> None:
        if self._columns.given:
            raise ConfigError(
                f"{name} is text, which has no columns: --prompt-column, --template and --id-column are for CSV, "
                "Parquet and JSON lines"
            )

    def _convert_rows(
        self, rows: Iterator[tuple[RowForm, int, Row | RequestError]], problems: Problems, stored: Stored
    ) -> None:
        for form, number, row in rows:
            try:
                if isinstance(row, RequestError):
                    raise row
                line = form.line(row)
            except RequestError as error:
                line = self._wrong(problems, number, error, stored)
            self._put(line + b"\n", 1, stored)
        self._end(problems, stored)

    def _convert_lines(self, file: Readable, stored: Stored, make: Callable[[bytes], bytes] | None) -> None:
        """A line each; `make` None: as it is. Blank lines stay, so that lines keep their numbers."""
        problems = Problems()
        number = 0
        for block in line_blocks(file):
            made = []
            count = 0
            for line in block.lines:
                number += 1
                if not line.strip() and not block.dropped:
                    made.append(b"")
                    continue
                count += 1
                try:
                    if block.dropped:
                        raise too_long(block.dropped)
                    made.append(line if make is None else make(line))
                except RequestError as error:
                    made.append(self._wrong(problems, number, error, stored))
            self._put(b"\n".join(made) + b"\n", count, stored)
        self._end(problems, stored)

    def _wrong(self, problems: Problems, number: int, error: RequestError, stored: Stored) -> bytes:
        if self._strict:
            problems.add(number, error)
            if problems.count >= PROBLEMS_MAX:
                raise problems.error(stored.name)
        return _NO_REQUEST

    def _end(self, problems: Problems, stored: Stored) -> None:
        if problems.count:
            raise problems.error(stored.name)

    def _put(self, data: bytes, rows: int, stored: Stored) -> None:
        self._out.write(data)
        self._rows += rows
        self._written += len(data)
        if self._written - self._told >= 1 << 20:
            self._told = self._written
            self._on_rows(self._rows, self._bytes_before + stored.done, self._bytes_all)


class _Ahead:
    """A stream whose beginning can be looked at before it is read."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (more := self._file.read(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int, /) -> bytes:
        if not self._ahead:
            return self._file.read(size)
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def tell(self) -> int:
        return self._file.tell() - len(self._ahead)


def _sniffed(head: bytes, columns: Columns) -> Literal["jsonl", "csv", "text"]:
    """How a text is written whose name does not say: JSON lines begin with a brace, a table was asked for columns."""
    if head.removeprefix(BOM).lstrip().startswith(b"{"):
        return "jsonl"
    return "csv" if columns.given else "text"


def _line_of_object(line: bytes, form: RowForm) -> bytes:
    """The request of a JSON object by `form`. One that is a request of OpenAI's batch format stays as it is."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(f"this is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RequestError("a line must be a JSON object")
    if isinstance(row.get("body"), dict) and "url" in row:
        return line.strip()
    return form.line(row)
