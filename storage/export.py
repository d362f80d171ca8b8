"""The answers of a run as a table: JSON lines, CSV or Parquet, one row a choice, in bounded memory.

A request that failed has one row, with its error and no text; an embedding has one row an input. Token counts and times
are the request's: with several choices each of its rows has them. CSV and JSON lines are UTF-8; a CSV cell is empty
both for nothing and for an empty text, which JSON lines and Parquet keep apart. Numbers of an embedding are a list, in
CSV written as JSON.
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from scheduling.errors import ConfigError
from scheduling.vectors import from_base64
from storage.answers import Answer, answers
from storage.files import Disk

Form = Literal["jsonl", "csv", "parquet"]
Row = dict[str, Any]

COLUMNS = {
    "custom_id": "string", "index": "int64", "choice": "int32", "text": "string", "finish_reason": "string",
    "error": "string", "error_message": "string", "prompt_tokens": "int64", "cached_tokens": "int64",
    "output_tokens": "int64", "queue_s": "double", "ttft_s": "double", "tpot_s": "double", "e2e_s": "double",
    "logprob": "double", "embedding": "list", "attempt": "int32", "rank": "int32", "session": "int32",
}  # fmt: skip
"""Names and, for Parquet, types. `logprob`: of a continuation that was weighed."""

BATCH_ROWS = 8_192
BATCH_BYTES = 8 << 20
"""So many rows, or about so many bytes of text, are a row group of Parquet and a write of the others."""


def export_table(
    run_dirs: Sequence[Path], out: BinaryIO, form: Form, *, in_input_order: bool = True, disk: Disk | None = None
) -> int:
    """Write the table of a run, or one of all that are slices of one input, to `out`; returns how many rows.

    Raises RunDirError (no record, or a damaged one), ConfigError (pyarrow is missing); errors of `out` are the
    caller's.
    """
    if form == "parquet":
        return _write_parquet(run_dirs, out, in_input_order, disk)
    write = _write_csv if form == "csv" else _write_jsonl
    count = 0
    if form == "csv":
        out.write(_csv_lines([list(COLUMNS)]))
    for rows in _batches(run_dirs, in_input_order, disk):
        write(rows, out)
        count += len(rows)
    return count


def _batches(run_dirs: Sequence[Path], in_input_order: bool, disk: Disk | None) -> Iterator[list[Row]]:
    rows: list[Row] = []
    size = 0
    parts = [answers(run_dir, in_input_order=in_input_order, disk=disk) for run_dir in run_dirs]
    merged = heapq.merge(*parts, key=lambda answer: answer.llmpi.index) if in_input_order else chain(*parts)
    for answer in merged:
        for row in rows_of(answer):
            rows.append(row)
            size += len(row["text"] or "") + 32 * len(row["embedding"] or ())
            if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows


def rows_of(answer: Answer) -> Iterator[Row]:
    """The rows of one request, each with all COLUMNS."""
    timing = answer.llmpi
    common = dict.fromkeys(COLUMNS) | {"custom_id": answer.custom_id, "choice": 0}
    common |= {name: getattr(timing, name) for name in COLUMNS if name in timing.__struct_fields__}
    if answer.error is not None:
        yield common | {"error": answer.error.code, "error_message": answer.error.message}
        return
    for choice in answer.choices:
        yield common | {
            "choice": choice.index, "text": choice.said, "finish_reason": choice.finish_reason,
            "logprob": choice.logprob,
        }  # fmt: skip
    for vector in answer.vectors:
        numbers = vector.embedding
        plain = from_base64(numbers).tolist() if isinstance(numbers, str) else numbers
        yield common | {"choice": vector.index, "embedding": plain}


def _write_jsonl(rows: list[Row], out: BinaryIO) -> None:
    out.write(b"".join([msgspec.json.encode(row) + b"\n" for row in rows]))


def _write_csv(rows: list[Row], out: BinaryIO) -> None:
    for row in rows:
        if row["embedding"] is not None:
            row["embedding"] = msgspec.json.encode(row["embedding"]).decode()
    out.write(_csv_lines(list(row.values()) for row in rows))


def _csv_lines(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO()
    # RFC 4180's line end. With another one Python leaves a carriage return within a text unquoted.
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def _write_parquet(run_dirs: Sequence[Path], out: BinaryIO, in_input_order: bool, disk: Disk | None) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            "pyarrow, which writes Parquet, is not installed: pip install 'llmpi[parquet]', or export --to csv"
        ) from None
    types = {
        name: pa.list_(pa.float32()) if kind == "list" else pa.type_for_alias(kind) for name, kind in COLUMNS.items()
    }
    schema = pa.schema([pa.field(name, kind, nullable=name not in _ALWAYS) for name, kind in types.items()])
    count = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for rows in _batches(run_dirs, in_input_order, disk):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


_ALWAYS = frozenset(("custom_id", "index", "choice", "prompt_tokens", "output_tokens", "attempt", "rank", "session"))
