from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ProtocolError
from workers.frames import FRAME_BYTES_MAX, FRAME_LENGTH, FrameSplitter, PipeReader, PipeWriter, read_frame, write_all


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


def framed(body: bytes) -> bytes:
    return FRAME_LENGTH.pack(len(body)) + body


@given(st.lists(st.binary(max_size=50), max_size=10), st.integers(1, 20))
def test_bodies_come_out_whole_however_the_stream_is_cut(bodies: list[bytes], cut: int) -> None:
    stream = b"".join(map(framed, bodies))
    splitter = FrameSplitter()
    out: list[bytes] = []
    for start in range(0, len(stream), cut):
        out += splitter.feed(stream[start : start + cut])
    assert out == bodies
    assert splitter.partial_bytes == 0


def test_a_partial_frame_stays_inside() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(framed(b"whole") + framed(b"half")[:-1]) == [b"whole"]
    assert splitter.partial_bytes == 7


def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        FrameSplitter().feed(FRAME_LENGTH.pack(FRAME_BYTES_MAX + 1))


def test_reader_takes_what_is_there_and_does_not_wait(pipe: tuple[int, int]) -> None:
    reader = PipeReader(pipe[0])
    assert reader.read() == []
    os.write(pipe[1], framed(b"one") + framed(b"two") + b"\x09")
    assert reader.read() == [b"one", b"two"]
    assert not reader.eof


def test_reader_sees_the_end_and_drops_a_partial_frame(pipe: tuple[int, int]) -> None:
    reader = PipeReader(pipe[0])
    os.write(pipe[1], framed(b"one") + framed(b"two")[:-1])
    os.close(pipe[1])
    assert reader.read() == [b"one"]
    assert reader.eof


def test_writer_queues_what_the_pipe_does_not_take(pipe: tuple[int, int]) -> None:
    writer, reader = PipeWriter(pipe[1]), PipeReader(pipe[0])
    bodies = [bytes([number]) * 300_000 for number in range(4)]
    for body in bodies:
        writer.put(framed(body))
    assert writer.pending_bytes > 0
    out: list[bytes] = []
    while len(out) < len(bodies):
        out += reader.read()
        writer.flush()
    assert out == bodies
    assert writer.pending_bytes == 0


def test_writer_to_a_closed_pipe_is_broken_and_drops(pipe: tuple[int, int]) -> None:
    writer = PipeWriter(pipe[1])
    os.close(pipe[0])
    writer.put(framed(b"x"))
    assert writer.broken
    writer.put(framed(b"y"))
    assert writer.pending_bytes == 0


def test_blocking_side_reads_what_it_writes(pipe: tuple[int, int]) -> None:
    write_all(pipe[1], framed(b"a" * 1000))
    write_all(pipe[1], framed(b""))
    os.write(pipe[1], framed(b"cut")[:-1])
    os.close(pipe[1])
    assert read_frame(pipe[0]) == b"a" * 1000
    assert read_frame(pipe[0]) == b""
    assert read_frame(pipe[0]) is None
