"""Frames over pipes: length-prefixed bodies, read and written without ever blocking the rank.

`FrameSplitter` is the pure part: bytes in, whole bodies out. `PipeReader` and `PipeWriter` put it on file
descriptors in non-blocking mode, for the rank's side, which must never wait for its engine. The engine's side
has threads of its own and blocks: `read_frame` and `write_all`.

This module knows lengths and bytes; what a body means is `workers.protocol`'s business.
"""

from __future__ import annotations

import os
import struct
from collections import deque

from scheduling.errors import ProtocolError

FRAME_LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 1 << 30
READ_BYTES = 1 << 20
POLL_BYTES_MAX = 16 << 20
"""The most one `PipeReader.read` takes, so that a chatty engine cannot keep its rank from everything else."""


def frame(body: bytes) -> bytes:
    """`body` as it travels. Raises ValueError where it is too long."""
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {FRAME_BYTES_MAX}")
    return FRAME_LENGTH.pack(len(body)) + body


class FrameSplitter:
    """Cuts a stream of bytes into frame bodies. What is left when the stream ends was a partial frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies completed by `data`, in order. Raises `ProtocolError` on a length that no peer sends."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= FRAME_LENGTH.size:
            (length,) = FRAME_LENGTH.unpack_from(buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame claims {length} bytes, more than the limit of {FRAME_BYTES_MAX}")
            end = start + FRAME_LENGTH.size + length
            if end > len(buffer):
                break
            bodies.append(bytes(memoryview(buffer)[start + FRAME_LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]
        return bodies

    @property
    def partial_bytes(self) -> int:
        """Bytes of a frame that has not ended yet."""
        return len(self._buffer)


class PipeReader:
    """Whole frames from the read end of a pipe, as far as they are there."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.eof = False
        self._splitter = FrameSplitter()

    def read(self) -> list[bytes]:
        """All bodies that are complete by now; sets `eof` when the other side has closed."""
        bodies: list[bytes] = []
        taken = 0
        while not self.eof and taken < POLL_BYTES_MAX:
            try:
                data = os.read(self.fd, READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.eof = True
                break
            taken += len(data)
            bodies += self._splitter.feed(data)
        return bodies


class PipeWriter:
    """Queues frames for the write end of a pipe and writes what fits.

    `broken` is set once the other side has closed: from then on frames are dropped.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.broken = False
        self._queue: deque[memoryview] = deque()
        self.pending_bytes = 0

    def put(self, frame: bytes) -> None:
        """Queue one frame, length prefix included, and write what fits."""
        if not self.broken:
            self._queue.append(memoryview(frame))
            self.pending_bytes += len(frame)
            self.flush()

    def flush(self) -> bool:
        """Write what fits. True when nothing is left."""
        while self._queue and not self.broken:
            head = self._queue[0]
            try:
                written = os.write(self.fd, head)
            except BlockingIOError:
                return False
            except OSError:
                self.broken = True
                break
            self.pending_bytes -= written
            if written == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[written:]
        if self.broken:
            self._queue.clear()
            self.pending_bytes = 0
        return True


def read_frame(fd: int) -> bytes | None:
    """The next body from a blocking descriptor, or None at end of file (a partial frame is dropped)."""
    prefix = _read_exactly(fd, FRAME_LENGTH.size)
    if prefix is None:
        return None
    (length,) = FRAME_LENGTH.unpack(prefix)
    if length > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame claims {length} bytes, more than the limit of {FRAME_BYTES_MAX}")
    return _read_exactly(fd, length)


def _read_exactly(fd: int, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = os.read(fd, min(count - len(data), READ_BYTES))
        if not part:
            return None
        data += part
    return bytes(data)


def write_all(fd: int, frame: bytes) -> None:
    """Write one frame to a blocking descriptor. Raises `OSError` when nobody reads any more."""
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(fd, rest) :]
