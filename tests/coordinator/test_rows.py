"""Rows of CSV and Parquet, and the requests that they make."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import rows as rows_module
from coordinator.rows import Columns, RowForm, csv_rows, parquet_rows
from scheduling.errors import ConfigError, InputError, RequestError

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def read_csv(content: bytes, columns: Columns | None = None, delimiter: str = ",") -> list[dict[str, Any]]:
    """What the requests of a CSV file hold."""

    def make(names: Sequence[str] | None) -> RowForm:
        return RowForm(columns or Columns(), names, "t.csv")

    found = list(csv_rows(io.BytesIO(content), "t.csv", delimiter, make))
    assert [number for _, number, _ in found] == list(range(1, len(found) + 1))
    return [json.loads(form.line(row)) for form, _, row in found]


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from(["\n", "\r\n"]), st.sampled_from(",\t"))
def test_csv_is_read_as_it_was_written(cells: list[tuple[str, str]], end: str, delimiter: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("custom_id", "prompt"), *cells])
    expected = [({"custom_id": name} if name else {}) | {"prompt": prompt} for name, prompt in cells]
    assert read_csv(text.getvalue().encode(), delimiter=delimiter) == expected
    assert read_csv(b"\xef\xbb\xbf" + text.getvalue().encode(), delimiter=delimiter) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,a\nx,1\ny\n", "row 2 (it ends in line 3) has 1 fields, the header 2"),
        (b'prompt,a\n"x\ny",1\nz,1,2\n', "row 2 (it ends in line 4) has 3 fields"),
        (b'prompt\n"a"b\n', "row 1 (line 2) cannot be read"),
        (b'prompt\na\n"never closed\n', "row 2 (line 3) cannot be read: unexpected end of data"),
        (b"prompt\n\xff\n", "line 2: byte 1 of the line (0xff) is not UTF-8"),
        (b"a,b\n1,2\n", "no column 'prompt': name another one with --prompt-column"),
        (b"prompt,prompt\n1,2\n", "2 columns 'prompt'"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said_with_its_place(content: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_csv(content)
    assert words in str(caught.value)
    assert "t.csv" in str(caught.value)


def test_a_row_is_bounded_however_many_lines_and_fields_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LINE_BYTES_MAX", 1_000)
    assert len(read_csv(b"prompt\n" + b"x" * 900 + b"\n" + b"x" * 900 + b"\n")) == 2
    for content in (b'"' + b"x\n" * 600, b"x," * 600, b'"' + b"x" * 2_000):
        with pytest.raises(InputError, match=r"more than 1,000 bytes; is a\s+quotation mark not closed"):
            read_csv(b"prompt\n" + content)


def test_the_limit_of_fields_is_put_back() -> None:
    before = csv.field_size_limit()
    read_csv(b"prompt\n" + b"x" * (before + 1) + b"\n")
    assert csv.field_size_limit() == before


# ---------------------------------------------------------------- which columns make a request


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (Columns(), {"prompt": "p", "custom_id": "c", "x": 1}, {"custom_id": "c", "prompt": "p"}),
        (Columns(), {"prompt": "p"}, {"prompt": "p"}),
        (Columns(), {"prompt": "p", "custom_id": None}, {"prompt": "p"}),
        (Columns(prompt="q"), {"q": "p", "prompt": "no"}, {"prompt": "p"}),
        (Columns(id="k"), {"prompt": "p", "k": 7, "custom_id": "no"}, {"custom_id": 7, "prompt": "p"}),
        (Columns(template="{a}-{b}-{a}"), {"a": 1, "b": None}, {"prompt": "1--1"}),
    ],
)
def test_columns_make_a_request(columns: Columns, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.loads(RowForm(columns, list(row), "t").line(row)) == expected
    assert json.loads(RowForm(columns, None, "t").line(row)) == expected


@pytest.mark.parametrize(
    ("columns", "row", "words"),
    [
        (Columns(), {"prompt": None}, "'prompt' holds nothing"),
        (Columns(), {"prompt": 3}, "'prompt' holds a int, not a text; --template '{prompt}'"),
        (Columns(), {"prompt": "p", "custom_id": 1.5}, "'custom_id' holds a float"),
        (Columns(), {"prompt": "p", "custom_id": True}, "'custom_id' holds a bool"),
        (Columns(prompt="q"), {"prompt": "p"}, "there is no 'q'; there are 'prompt'"),
        (Columns(id="k"), {"prompt": "p"}, "there is no 'k'"),
        (Columns(template="{a}"), {"b": "p"}, "there is no 'a'"),
        (Columns(), {"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_a_row_that_makes_no_request_says_why(columns: Columns, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        RowForm(columns, None, "t").line(row)
    assert words in str(caught.value)


def test_many_columns_are_not_all_listed() -> None:
    with pytest.raises(InputError, match=r"'c0', .*'c29' and 70 more"):
        RowForm(Columns(), [f"c{k}" for k in range(100)], "t")


def test_prompt_column_and_template_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--template"):
        Columns(prompt="a", template="{a}")


# ---------------------------------------------------------------- Parquet


def read_parquet(path: Path, columns: Columns | None = None) -> list[Any]:
    found: list[Any] = []
    for form, number, row in parquet_rows(path, lambda names: RowForm(columns or Columns(), names, str(path))):
        assert number == len(found) + 1
        found.append(row if isinstance(row, RequestError) else json.loads(form.line(row)))
    return found


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(-9, 9), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=9),
    st.integers(1, 4),
)
def test_parquet_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[int, str]], group: int
) -> None:
    path = tmp_path_factory.mktemp("p") / "t.parquet"
    table = {"other": [0.5] * len(cells), "custom_id": [k for k, _ in cells], "prompt": [text for _, text in cells]}
    schema = pa.schema([("other", pa.float64()), ("custom_id", pa.int64()), ("prompt", pa.large_string())])
    pq.write_table(pa.table(table, schema=schema), path, row_group_size=group)
    assert read_parquet(path) == [{"custom_id": k, "prompt": text} for k, text in cells]


def test_a_value_that_is_not_utf8_is_wrong_in_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    texts = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), path)
    first, second, third = read_parquet(path)
    assert (first, third) == ({"prompt": "good"}, {"prompt": "fine"})
    assert "cannot be read" in str(second)


def test_parquet_that_is_cut_off_or_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 100}), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PAR1", b"", b"PAR1" + bytes(50) + whole[-8:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"t\.parquet cannot be read as Parquet"):
            read_parquet(path)


def test_parquet_without_the_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": ["x"], "b": [1]}), path)
    with pytest.raises(InputError, match=r"no column 'prompt'.*its columns are 'a', 'b'"):
        read_parquet(path)
    assert read_parquet(path, Columns(template="{a}{b}")) == [{"prompt": "x1"}]


def test_without_pyarrow_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"llmpi\[parquet\]"):
        read_parquet(tmp_path / "t.parquet")
