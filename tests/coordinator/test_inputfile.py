"""Files of requests: cut into lines, told apart, and checked with every problem named."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import inputfile
from coordinator.inputfile import Block, line_blocks, only_embeddings
from coordinator.source import FileSource, sniff_format
from scheduling.errors import InputError
from tests.coordinator.inputs import WriteFile, jsonl

# ---------------------------------------------------------------- lines in blocks


@given(st.binary(max_size=60).map(lambda raw: raw.replace(b"\xef", b"\n")), st.integers(1, 9))
def test_blocks_hold_every_line_once_with_its_offset_whatever_the_block_size(content: bytes, size: int) -> None:
    found = {}
    for block in line_blocks(io.BytesIO(content), block_bytes=size):
        offset = block.offset
        for line in block.lines:
            found[offset] = line
            offset += len(line) + 1
    expected, offset = {}, 0
    for line in content.split(b"\n"):
        if line or offset < len(content):
            expected[offset] = line
        offset += len(line) + 1
    assert found == expected


def test_a_line_over_the_limit_is_dropped_without_being_kept(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\n" + b"x" * 5_000 + b"\nb\n")
    with open(path, "rb", buffering=0) as file:
        blocks = list(line_blocks(file, block_bytes=100, line_bytes_max=1_000))
    assert blocks == [Block(0, [b"a"]), Block(2, [b"x" * 98], 5_000), Block(5_003, [b"b"])]


# ---------------------------------------------------------------- the format


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.txt", '{"looks": "like JSON"}', "text"),
        ("a.jsonl", "plain", "jsonl"),
        ("a.ndjson", "{}", "jsonl"),
        ("a.dat", '\n  {"prompt": "a"}\n', "jsonl"),
        ("a.dat", "\ufeff{", "jsonl"),
        ("prompts", "What is it?\n", "text"),
    ],
)
def test_the_format_is_found_by_suffix_then_by_the_first_line(
    write: WriteFile, name: str, content: str, form: str
) -> None:
    assert sniff_format(write(content, name)) == form


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"input": "a"}\n\n{"url": "/v1/embeddings", "body": {"input": "b"}}\n', True),
        ('{"input": "a"}\n{"prompt": "b"}\n', False),
        ('{"input": "a"}\n' * 5_000 + '{"prompt": "b"}\n', True),
        ("\n", False),
    ],
)
def test_the_first_requests_tell_whether_embeddings_are_all_that_is_wanted(
    write: WriteFile, content: str, expected: bool
) -> None:
    assert only_embeddings(write(content), "jsonl") is expected
    assert not only_embeddings(write(content), "text")


# ---------------------------------------------------------------- input that cannot be used


@pytest.mark.parametrize("precheck", [True, False])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n \r\n\n", "empty"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"GGUF\x03", "is a model"),
        ("{}".encode("utf-16"), "iconv"),
    ],
)
def test_a_file_that_holds_no_requests_is_refused(write: WriteFile, precheck: bool, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        FileSource(write(content), precheck=precheck)
    assert "requests.jsonl" in str(caught.value)


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        FileSource(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a directory"):
        FileSource(tmp_path)
    with pytest.raises(InputError, match="standard input"):
        FileSource(Path("-"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match=r"no regular file.*\(-i - < .*fifo\)"):
        FileSource(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a", "temprature": 1}', "did you mean temperature?"),
        (b'{"prompt": "\xff"}', "byte 13 of the line"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens is -1"),
        (b'{"prompt": "b", "custom_id": "x"}', 'custom_id "x" is already on line 3'),
    ],
)
def test_the_check_names_file_line_and_reason(write: WriteFile, bad: bytes, words: str) -> None:
    path = write(b'{"prompt": "a"}\n\n{"prompt": "b", "custom_id": "x"}\n\r\n' + bad + b"\n")
    with pytest.raises(InputError) as caught:
        FileSource(path)
    assert str(caught.value).startswith(f"{path}, line 5: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_check_shows_the_first_bad_lines_and_counts_the_others(write: WriteFile) -> None:
    with pytest.raises(InputError) as caught:
        FileSource(write("nonsense\n" * 12))
    said = str(caught.value).splitlines()
    assert "12 lines" in said[0]
    assert [line.split(":")[0].strip() for line in said[1:6]] == [f"line {number}" for number in range(1, 6)]
    assert said[6:] == ["  and 7 more"]


def test_the_check_gives_up_on_a_file_of_another_kind(write: WriteFile) -> None:
    with pytest.raises(InputError, match="at least 1,000 lines"):
        FileSource(write("nonsense\n" * 3_000))


def test_an_id_that_was_made_up_collides_with_one_that_was_given(write: WriteFile) -> None:
    with pytest.raises(InputError, match='"request-1" is already on line 1'):
        FileSource(write(jsonl({"prompt": "a", "id": "request-1"}, {"prompt": "b"})))


def test_equal_hashes_of_different_ids_are_no_duplicates(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputfile, "hash_id", lambda custom_id: b"8 bytes!")
    assert FileSource(write(jsonl({"prompt": "a"}, {"prompt": "b"}))).total == 2


def test_a_text_file_with_bytes_that_are_not_utf8_is_refused_with_the_line(write: WriteFile) -> None:
    with pytest.raises(InputError, match=r"line 2: byte 3 of the line \(0xe4\)"):
        FileSource(write("gut\nschön".encode("latin-1").replace(b"sch\xf6n", b"sp\xe4t"), "a.txt"))
