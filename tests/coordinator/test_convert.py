"""Inputs of every kind become the same requests; what cannot be one is named; nothing is left half written."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from coordinator import convert as convert_module
from coordinator import inputfile
from coordinator.compressed import STDIN
from coordinator.convert import Converted, Source, convert, source_of
from coordinator.rows import Columns
from coordinator.source import FileSource
from scheduling.errors import ConfigError, InputError
from storage.rundir import REQUESTS_NAME

PROMPTS = ["plain", 'with "quotes", commas', "two\nlines", "äöü 漢字"]
ROWS = [{"prompt": prompt, "custom_id": f"c{k}", "extra": k} for k, prompt in enumerate(PROMPTS)]
JSONL = "".join(json.dumps({"prompt": row["prompt"], "custom_id": row["custom_id"]}) + "\n" for row in ROWS).encode()


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "a.csv": lambda: as_csv(ROWS),
    "a.tsv": lambda: as_csv(ROWS, "\t"),
    "a.csv.gz": lambda: gzip.compress(as_csv(ROWS)),
    "a.parquet": lambda: as_parquet(ROWS),
    "a.anything": lambda: as_parquet(ROWS),
    "a.jsonl.gz": lambda: gzip.compress(JSONL),
    "a.jsonl.zst": lambda: zstandard.compress(JSONL),
    "a.JSONL.ZSTD": lambda: zstandard.compress(JSONL),
    "a.gz": lambda: gzip.compress(JSONL),
    "noname": lambda: gzip.compress(b"\xef\xbb\xbf" + JSONL),
}


def source(path: Path, columns: Columns | None = None, form: str | None = None) -> Source:
    found = source_of(path, form, columns or Columns())
    assert found is not None
    return found


def converted(found: Source, run: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """What is in the lines that were made, after reading them as a run does."""
    run.mkdir(exist_ok=True)
    made = convert(found, run, strict=strict)
    content = (run / REQUESTS_NAME).read_bytes()
    lines = [json.loads(line) for line in content.splitlines() if line]
    assert made == Converted(len(lines), len(content))
    assert os.listdir(run) == [REQUESTS_NAME]
    return lines


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_the_same_requests(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name]())
    expected = [{"custom_id": row["custom_id"], "prompt": row["prompt"]} for row in ROWS]
    assert converted(source(path), tmp_path / "run") == expected
    with_source = FileSource(tmp_path / "run" / REQUESTS_NAME)
    assert [arrival.custom_id for arrival in with_source.read(99, 1 << 20)] == [row["custom_id"] for row in ROWS]
    with_source.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", JSONL), ("a.txt", b"x\n"), ("plain", b"x\n"), ("empty", b""), ("nothing", None), ("a.json", b"{}")],
)
def test_what_can_be_read_in_place_is_not_converted(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert source_of(tmp_path / name, None, Columns()) is None


def test_lines_of_a_compressed_file_stay_as_they_are(tmp_path: Path) -> None:
    lines = b' {"custom_id":"a","url":"/v1/completions", "body": {"prompt":"x"}} \r\n\n{"prompt": "y","seed":1}'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    converted(source(path), tmp_path / "run")
    assert (tmp_path / "run" / REQUESTS_NAME).read_bytes() == lines + b"\n"


def test_fields_of_other_names_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    request = {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "as it is"}}
    path.write_text('{"q": "one", "k": 7, "prompt": "no"}\n' + json.dumps(request) + "\n")
    assert converted(source(path, Columns(prompt="q", id="k")), tmp_path / "run") == [
        {"custom_id": 7, "prompt": "one"},
        request,
    ]


def test_text_that_is_compressed_gives_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b" one \r\n\ntwo"))
    assert converted(source(path), tmp_path / "run") == [{"prompt": " one "}, {"prompt": "two"}]


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "b.csv").write_bytes(b"prompt\ntwo\nthree\n")
    (given / "a.jsonl").write_bytes(b'{"prompt": "one"}')
    (given / "c.txt").write_bytes(b"four")
    (given / ".hidden").write_bytes(b"\0")
    found = source(given)
    assert [line["prompt"] for line in converted(found, tmp_path / "run")] == ["one", "two", "three", "four"]
    assert found.identity["files"] == 3
    (given / "c.txt").write_bytes(b"five")
    assert source(given).identity != found.identity


@pytest.mark.parametrize("name", ["README.md", "folder", "a.parquet.md"])
def test_other_files_in_a_directory_are_named_and_refused(tmp_path: Path, name: str) -> None:
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(InputError, match="given is empty"):
        source(given)
    (given / "a.jsonl").write_bytes(JSONL)
    (given / name).mkdir() if name == "folder" else (given / name).touch()
    with pytest.raises(InputError, match=f"holds what is no file of requests: {name};"):
        source(given)


# ---------------------------------------------------------------- what is wrong


def test_a_bad_row_is_an_error_or_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet([{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}]))
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"a\.parquet, row 2: 'prompt' holds nothing"):
        convert(source(path), tmp_path / "run", strict=True)
    assert os.listdir(tmp_path / "run") == []
    lines = converted(source(path), tmp_path / "run", strict=False)
    assert [line["prompt"] for line in lines] == ["a", None, "b"]
    given = FileSource(tmp_path / "run" / REQUESTS_NAME, precheck=False)
    assert [arrival.error is not None for arrival in given.read(9, 1 << 20)] == [False, True, False]
    given.close()


def test_many_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": 1}\n' * 40)
    with pytest.raises(InputError, match=r"40 lines cannot be used\n  line 1: [^!]*and 35 more") as caught:
        converted(source(path, Columns(prompt="q")), tmp_path / "run")
    assert str(caught.value).count("\n") == 6
    monkeypatch.setattr(convert_module, "PROBLEMS_MAX", 10)
    monkeypatch.setattr(inputfile, "PROBLEMS_MAX", 10)
    with pytest.raises(InputError, match="at least 10 lines"):
        converted(source(path, Columns(prompt="q")), tmp_path / "run")


def test_a_line_that_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "' + b"x" * 5_000 + b'"}\n{"prompt": "b"}\n'))
    small = functools.partial(inputfile.line_blocks, block_bytes=64, line_bytes_max=1_000)
    monkeypatch.setattr(convert_module, "line_blocks", small)
    with pytest.raises(InputError, match=r"line 2: the line has 5,014 bytes"):
        converted(source(path), tmp_path / "run")
    assert [line["prompt"] for line in converted(source(path), tmp_path / "run", strict=False)] == ["a", None, "b"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_input_without_a_request_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is empty"):
        converted(source(path), tmp_path / "run")
    (tmp_path / "b.csv").write_bytes(content and b"prompt\n")
    with pytest.raises(InputError, match=r"b\.csv is empty"):
        converted(source(tmp_path / "b.csv"), tmp_path / "run")


def test_options_for_columns_are_refused_for_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x\n")
    with pytest.raises(ConfigError, match="is text, which has no columns"):
        converted(source(path, Columns(prompt="q")), tmp_path / "run")


def test_an_earlier_file_stays_where_converting_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\nold\n")
    converted(source(path), tmp_path / "run")
    path.write_bytes(b"prompt\nnew\na,b\n")
    with pytest.raises(InputError):
        convert(source(path), tmp_path / "run", strict=True)
    assert (tmp_path / "run" / REQUESTS_NAME).read_bytes() == b'{"prompt":"old"}\n'
    assert os.listdir(tmp_path / "run") == [REQUESTS_NAME]


# ---------------------------------------------------------------- standard input


@pytest.fixture
def pipe() -> Iterator[Callable[[bytes], None]]:
    """Gives standard input a content."""
    saved = os.dup(0)

    def give(content: bytes) -> None:
        read, write = os.pipe()
        assert len(content) < 1 << 16, "a pipe holds no more"
        os.write(write, content)
        os.close(write)
        os.dup2(read, 0)
        os.close(read)

    yield give
    os.dup2(saved, 0)
    os.close(saved)


@pytest.mark.parametrize(
    ("content", "columns", "form"),
    [
        (JSONL, None, None),
        (zstandard.compress(JSONL), None, None),
        (as_csv(ROWS), Columns(prompt="prompt"), None),
        (gzip.compress(as_csv(ROWS)), None, "csv"),
        (as_csv(ROWS, "\t"), None, "tsv"),
    ],
)
def test_standard_input_is_read_once(
    tmp_path: Path, pipe: Callable[[bytes], None], content: bytes, columns: Columns | None, form: str | None
) -> None:
    pipe(content)
    found = source(STDIN, columns, form)
    assert found.is_stdin
    assert [line["prompt"] for line in converted(found, tmp_path / "run")] == PROMPTS


def test_parquet_on_standard_input_is_refused(tmp_path: Path, pipe: Callable[[bytes], None]) -> None:
    pipe(as_parquet(ROWS))
    with pytest.raises(InputError, match="give its path with -i"):
        converted(source(STDIN), tmp_path / "run")


def test_who_waits_for_standard_input_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    saved = os.dup(0)
    os.dup2(read, 0)
    monkeypatch.setattr("coordinator.compressed.WAIT_S", 0.0)

    def stop() -> None:
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            convert(source(STDIN), tmp_path, strict=True, on_wait=stop)
    finally:
        os.dup2(saved, 0)
        for number in (read, write, saved):
            os.close(number)
    assert os.listdir(tmp_path) == []


def test_progress_is_told_in_bytes_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\n" + b"some words of a prompt\n" * 120_000)
    told: list[tuple[int, int, int]] = []
    convert(source(path), tmp_path, strict=True, on_rows=lambda *counts: told.append(counts))
    size = path.stat().st_size
    assert len(told) >= 3
    assert told == sorted(told)
    assert all(0 < done <= size and all_bytes == size for _, done, all_bytes in told)
