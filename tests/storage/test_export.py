"""Tables of answers: every answer once, in either order, the same in all three forms."""

from __future__ import annotations

import csv
import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import ConfigError, RunDirError
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request
from storage import export as export_module
from storage.export import COLUMNS, Form, export_table
from tests.storage.fake_disk import FakeDisk
from tests.storage.samples import RUN, disk_with, ok_line

CHAT = Request(custom_id="chat", kind="chat")
VECTORS = np.array([[0.5, -0.25], [1.0, 0.0]], np.float32)


def record() -> bytes:
    """Out of order: a chat of two choices, a failure, embeddings as numbers and as base64, a completion."""
    asked = [Request(custom_id=f"e{k}", kind="embedding", encoding_format=form) for k, form in enumerate(FORMATS)]
    choices = [('a,\n"b"', "stop", 2), ("", "length", 3)]
    return b"".join(
        [
            encode_result(CHAT, 3, 1, 2, 0, choices, 7, 5, 0.1, 0.2, 0.4, 1, "m", 4),
            encode_failure("bad", 1, 2, 1, 0, "too_long", "it is too long"),
            encode_embeddings(asked[0], 0, 1, 1, 0, VECTORS, 9, 0.1, 0.3, "m"),
            encode_embeddings(asked[1], 4, 1, 1, 0, VECTORS[:1], 9, 0.1, 0.3, "m"),
            ok_line(2, text="plain"),
        ]
    )  # fmt: skip


FORMATS: tuple[Any, ...] = ("float", "base64")


def table(form: Form, disk: FakeDisk, *, in_input_order: bool = True) -> list[dict[str, Any]]:
    out = io.BytesIO()
    count = export_table([RUN], out, form, in_input_order=in_input_order, disk=disk)
    out.seek(0)
    if form == "parquet":
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    elif form == "csv":
        rows = list(csv.DictReader(io.TextIOWrapper(out, "utf-8", newline="")))
    else:
        rows = [json.loads(line) for line in out]
    assert len(rows) == count
    assert all(list(row) == list(COLUMNS) for row in rows)
    return rows


def test_each_answer_is_a_row_in_the_order_of_the_input() -> None:
    rows = table("jsonl", disk_with(record()))
    assert [(row["custom_id"], row["index"], row["choice"]) for row in rows] == [
        ("e0", 0, 0), ("e0", 0, 1), ("bad", 1, 0), ("id", 2, 0), ("chat", 3, 0), ("chat", 3, 1), ("e1", 4, 0),
    ]  # fmt: skip
    assert [row["text"] for row in rows] == [None, None, None, "plain", 'a,\n"b"', "", None]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "error", "stop", "stop", "length", "stop"]
    assert [row["embedding"] for row in rows if row["embedding"]] == [[0.5, -0.25], [1.0, 0.0], [0.5, -0.25]]
    failed = rows[2]
    assert (failed["error"], failed["error_message"], failed["ttft_s"]) == ("too_long", "it is too long", None)
    assert (rows[4]["prompt_tokens"], rows[4]["output_tokens"], rows[4]["cached_tokens"]) == (7, 5, 4)
    assert (rows[4]["e2e_s"], rows[4]["rank"], rows[4]["attempt"]) == (0.4, 2, 1)


def test_order_of_completion_is_the_record_s() -> None:
    rows = table("jsonl", disk_with(record()), in_input_order=False)
    assert [row["index"] for row in rows] == [3, 3, 1, 0, 0, 4, 2]


def test_all_forms_say_the_same() -> None:
    plain = table("jsonl", disk_with(record()))
    assert table("parquet", disk_with(record())) == plain
    for row, cells in zip(plain, table("csv", disk_with(record())), strict=True):
        for name, value in row.items():
            if isinstance(value, str) or value is None:
                assert cells[name] == (value or "")
            else:
                assert json.loads(cells[name]) == value


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was(texts: list[str]) -> None:
    disk = disk_with(b"".join(ok_line(k, text=text) for k, text in enumerate(texts)))
    forms: tuple[Form, ...] = ("jsonl", "csv", "parquet")
    for form in forms:
        assert [row["text"] for row in table(form, disk)] == texts


def test_parquet_has_types_and_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "BATCH_ROWS", 3)
    out = io.BytesIO()
    export_table([RUN], out, "parquet", disk=disk_with(record()))
    file = pq.ParquetFile(out)
    assert file.num_row_groups == 3
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types["text"] == "string"
    assert types["index"] == "int64"
    assert types["e2e_s"] == "double"
    assert types["embedding"] == "list<element: float>"


def test_an_empty_record_is_an_empty_table_and_none_is_an_error() -> None:
    assert table("parquet", disk_with(b"")) == []
    assert table("csv", disk_with(b"")) == []
    with pytest.raises(RunDirError, match="no answer has been recorded"):
        table("jsonl", FakeDisk(dirs={RUN}))


@pytest.mark.parametrize("in_input_order", [True, False])
def test_a_torn_tail_is_left_out_and_damage_is_refused(in_input_order: bool) -> None:
    lines = [ok_line(0), ok_line(1)]
    torn = table("jsonl", disk_with(lines[0] + lines[1][:-30]), in_input_order=in_input_order)
    assert [row["index"] for row in torn] == [0]
    with pytest.raises(RunDirError, match="damaged in line 1"):
        table("jsonl", disk_with(lines[0].replace(b"answer", b"Answer") + lines[1]), in_input_order=in_input_order)


def test_without_pyarrow_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"llmpi\[parquet\]"):
        table("parquet", disk_with(record()))


class _Sink(io.RawIOBase):
    """Takes everything and keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    monkeypatch.setattr(export_module, "BATCH_ROWS", 500)
    peaks = []
    for count in (2_000, 8_000):
        text = "word " * 100
        (tmp_path / "results.jsonl").write_bytes(b"".join(ok_line(k, text=text) for k in range(count)))
        tracemalloc.start()
        export_table([tmp_path], _Sink(), form)  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)
