"""Rows of tables, and the request that each one makes.

`csv_rows` and `parquet_rows` read a table lazily, a row as a dictionary of the columns that are needed. `RowForm` says
which those are and makes the line of a request from a row. What is wrong with one row is a RequestError, given back
in the row's place so that the others can be read; what is wrong with the table as a whole is an InputError.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coordinator.inputfile import LINE_BYTES_MAX, Readable, line_blocks, text_of
from coordinator.prompttemplate import Template, parse_template
from scheduling.errors import ConfigError, InputError, RequestError

PROMPT_COLUMN, ID_COLUMN = "prompt", "custom_id"
"""Which columns are taken where nothing is said."""

COLUMNS_SHOWN = 30
PARQUET_ROWS = 1_024
PARQUET_BYTES = 4 << 20
"""Most rows, and about how many bytes of them, that are taken out of a Parquet file at once."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """What `--prompt-column`, `--template` and `--id-column` say. Raises ConfigError if two of them contradict."""

    prompt: str | None = None
    template: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.template is not None:
            raise ConfigError("--prompt-column and --template are both given; give one of them")
        if self.template is not None:
            parse_template(self.template)

    @property
    def given(self) -> bool:
        return (self.prompt, self.template, self.id) != (None, None, None)


class RowForm:
    """How a row becomes a request. `names`: the columns of the table; None if its rows differ (JSON lines).

    `needed` are the columns that it asks for. Raises InputError, with the columns there are, for one that is not there.
    """

    def __init__(self, columns: Columns, names: Sequence[str] | None, table: str) -> None:
        self._template: Template | None = None if columns.template is None else parse_template(columns.template)
        self._prompt = columns.prompt or PROMPT_COLUMN
        self._id: str | None = columns.id
        if columns.id is None and (names is None or ID_COLUMN in names):
            self._id = ID_COLUMN
        self._id_required = columns.id is not None
        of_prompt = (self._prompt,) if self._template is None else self._template.columns
        self.needed = tuple(dict.fromkeys((*of_prompt, *([] if self._id is None else [self._id]))))
        if names is not None:
            self._check(names, table, hint=not columns.given)

    def _check(self, names: Sequence[str], table: str, *, hint: bool) -> None:
        for name in self.needed:
            if name not in names:
                way = ": name another one with --prompt-column, or several with --template" if hint else ""
                raise InputError(f"{table} has no column {name!r}{way}; its columns are {_listed(names)}")
            if names.count(name) > 1:
                raise InputError(f"{table} has {names.count(name)} columns {name!r}; give each a name of its own")

    def line(self, row: Row) -> bytes:
        """The request's line, without a newline. Raises RequestError."""
        fields: dict[str, Any] = {}
        custom_id = self._custom_id(row)
        if custom_id is not None:
            fields["custom_id"] = custom_id
        if self._template is not None:
            for name in self._template.columns:
                self._refuse_missing(row, name)
            fields["prompt"] = self._template.fill(row)
        else:
            self._refuse_missing(row, self._prompt)
            prompt = row[self._prompt]
            if not isinstance(prompt, str):
                kind = "nothing (null)" if prompt is None else f"a {type(prompt).__name__}"
                way = "" if prompt is None else f"; --template '{{{self._prompt}}}' writes it as text"
                raise RequestError(f"{self._prompt!r} holds {kind}, not a text{way}")
            fields["prompt"] = prompt
        try:
            line = msgspec.json.encode(fields)
        except UnicodeEncodeError:
            raise RequestError("a text holds half of a surrogate pair, which is no character") from None
        if len(line) > LINE_BYTES_MAX:
            raise RequestError(f"the request has {len(line):,} bytes; at most {LINE_BYTES_MAX:,} are read")
        return line

    def _custom_id(self, row: Row) -> str | int | None:
        """None: it has none, and is called by its number."""
        if self._id is None:
            return None
        if self._id_required:
            self._refuse_missing(row, self._id)
        value = row.get(self._id)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(f"{self._id!r} holds a {type(value).__name__}; an id is a text or a whole number")
        return value

    @staticmethod
    def _refuse_missing(row: Row, name: str) -> None:
        if name not in row:
            raise RequestError(f"there is no {name!r}; there are {_listed(list(row))}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:COLUMNS_SHOWN])
    more = len(names) - COLUMNS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "none"


MakeForm = Callable[[Sequence[str] | None], RowForm]


# ---------------------------------------------------------------- CSV


class _Lines:
    """The lines of a text for the csv module. Bounded: what one row may have in bytes, over all its lines."""

    def __init__(self, file: Readable, table: str) -> None:
        self._lines = self._read(file)
        self._table = table
        self.row_bytes = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _read(self, file: Readable) -> Iterator[str]:
        for block in line_blocks(file):
            for line in block.lines:
                self.number += 1
                self.row_bytes += (block.dropped or len(line)) + 1
                if self.row_bytes > LINE_BYTES_MAX:
                    raise InputError(
                        f"{self._table}, line {self.number}: a row has more than {LINE_BYTES_MAX:,} bytes; is a "
                        "quotation mark not closed?"
                    )
                try:
                    yield text_of(line) + ("\r\n" if line.endswith(b"\r") else "\n")
                except RequestError as error:
                    raise InputError(f"{self._table}, line {self.number}: {error}") from None


def csv_rows(file: Readable, table: str, delimiter: str, make_form: MakeForm) -> Iterator[tuple[RowForm, int, Row]]:
    """Rows after the header, counted from 1 (RFC 4180: quoted fields may hold newlines). Blank lines are no rows.

    Raises InputError, with row and line, where the table is no such table.
    """
    limit = csv.field_size_limit(LINE_BYTES_MAX)
    lines = _Lines(file, table)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0
    header: list[str] = []
    try:
        for fields in reader:
            lines.row_bytes = 0
            if not fields:
                continue
            if not header:
                header = fields
                form = make_form(header)
                places = [(name, header.index(name)) for name in form.needed]
                continue
            number += 1
            if len(fields) != len(header):
                raise InputError(
                    f"{table}, row {number} (it ends in line {lines.number}) has {len(fields)} fields, the header "
                    f"{len(header)}; put fields that hold the delimiter or a newline in quotation marks"
                )
            yield form, number, {name: fields[place] for name, place in places}
    except csv.Error as error:
        row = f"row {number + 1}" if header else "header"
        raise InputError(f"{table}, {row} (line {lines.number}) cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)


# ---------------------------------------------------------------- Parquet


def parquet_rows(path: Path, make_form: MakeForm) -> Iterator[tuple[RowForm, int, Row | RequestError]]:
    """The rows of a Parquet file, counted from 1. Only columns that are needed are read, some MiB of rows at a time.

    Raises ConfigError if pyarrow is not there, InputError if the file is damaged.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"{path} is a Parquet file, and pyarrow, which reads it, is not installed: pip install 'llmpi[parquet]'"
        ) from None
    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            names = list(table.schema_arrow.names)
            form = make_form(names)
            rows_at_once = _rows_at_once(table.metadata, form.needed)
            for batch in table.iter_batches(rows_at_once, columns=list(form.needed), use_threads=False):
                columns = [_values(batch.column(name)) for name in form.needed]
                for values in zip(*columns, strict=True):
                    number += 1
                    wrong = next((value for value in values if isinstance(value, RequestError)), None)
                    yield form, number, wrong or dict(zip(form.needed, values, strict=True))
    except MemoryError:
        raise InputError(f"{path}: not enough memory for a page of rows after row {number}") from None
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as Parquet after row {number}: {said}; get it again") from None


def _rows_at_once(metadata: Any, needed: Sequence[str]) -> int:
    """So many rows that they have about PARQUET_BYTES in the row group whose rows are largest."""
    largest = 1
    for k in range(metadata.num_row_groups):
        group = metadata.row_group(k)
        sizes = [group.column(j) for j in range(group.num_columns)]
        size = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema.split(".")[0] in needed)
        largest = max(largest, size // max(1, group.num_rows))
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // largest))


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except ValueError:  # among them bytes that are not UTF-8: say which rows have them
        return [_value(one) for one in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError as error:
        return RequestError(f"a value cannot be read: {error}")
