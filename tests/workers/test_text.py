from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text import PieceTable, TextStream

TEXT = "héllo 🙂 wörld — 日本語"


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


@given(st.binary(max_size=60), st.lists(st.integers(0, 5), max_size=20))
def test_streamed_text_equals_the_text_decoded_at_once(data: bytes, sizes: list[int]) -> None:
    stream = TextStream()
    text = "".join([stream.push(piece) for piece in cut(data, sizes)]) + stream.finish()
    assert text == data.decode("utf-8", "replace")


def test_no_character_is_broken_while_streaming() -> None:
    stream = TextStream()
    parts = [stream.push(bytes([byte])) for byte in TEXT.encode()]
    assert [part for part in parts if part] == list(TEXT)


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character() -> None:
    stream = TextStream()
    assert stream.push("a🙂".encode()[:-1]) == "a"
    assert stream.finish() == "\ufffd"


@given(st.text("ab", max_size=20), st.lists(st.integers(1, 3), max_size=20))
def test_text_ends_before_the_first_stop_string_however_it_is_split(text: str, sizes: list[int]) -> None:
    stream = TextStream(("aba",))
    out = ""
    for piece in cut(text.encode(), sizes):
        assert not stream.stopped or not stream.push(piece)
        if not stream.stopped:
            out += stream.push(piece)
    out += stream.finish()
    assert out == text.split("aba")[0]
    assert stream.stopped == ("aba" in text)


@given(st.text("ab", max_size=12), st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_nothing_that_could_begin_a_stop_string_is_given_out(before: str, after: str, stop: str) -> None:
    stream = TextStream((stop,))
    given_out = stream.push(before.encode()) + stream.push(after.encode())
    whole = before + after
    assert stop not in given_out
    assert whole.startswith(given_out)
    if not stream.stopped:
        held = whole[len(given_out) :]
        assert stop.startswith(held)


def test_the_earliest_of_several_stop_strings_counts() -> None:
    stream = TextStream(("world", "lo"))
    assert stream.push(b"hello world") == "hel"
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_can_be_split_inside_a_character() -> None:
    stream = TextStream(("é!",))
    data = "café!".encode()
    assert "".join(stream.push(bytes([byte])) for byte in data) == "caf"
    assert stream.stopped


def test_pieces_are_asked_for_once() -> None:
    asked: list[int] = []

    def piece_of(token: int) -> bytes:
        asked.append(token)
        return bytes([token])

    table = PieceTable(200, piece_of)
    assert table.text([104, 105, 104]) == "hi" + "h"
    assert table[105] == b"i"
    assert asked == [104, 105]


@pytest.mark.parametrize("data", [b"\xff", b"\xe2\x82"])
def test_bytes_that_are_no_text_are_replaced(data: bytes) -> None:
    table = PieceTable(1, lambda token: data)
    assert table.text([0]) == "\ufffd"
