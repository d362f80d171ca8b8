"""Bytes of a file or of standard input, decompressed on the way where they are compressed (gzip, zstd).

What a file is compressed with its first bytes say, not its name. Memory is bounded whatever the ratio: gzip is asked
for so many bytes at a time; zstd, which cannot be asked, is given so few at a time that even blocks of one repeated
byte make some tens of MiB. Input that ends too early, or is damaged, is an InputError. Several members or frames
after one another are one text, as `gzip` and `zstd` have it.

This module does not know what the bytes mean.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import sys
import zlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from coordinator.inputfile import Readable
from scheduling.errors import ConfigError, InputError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
"""Bytes 2 to 4 of a zstd frame that holds no data; some programs begin with one."""

STDIN = Path("-")
STDIN_VARIABLE = "LLMPI_STDIN"
WAIT_S = 0.5
CHUNK_BYTES = 1 << 16
ZSTD_CHUNK_BYTES = 1 << 10
"""A block of zstd takes 4 bytes at least and makes 128 KiB at most: so 32 MiB a chunk at worst."""
ZSTD_WINDOW_BYTES = 1 << 27
"""What zstd itself accepts without being told otherwise."""


def open_stdin() -> FileIO:
    """Standard input, or that of the process which started mpirun for us. Raises OSError if there is none."""
    given = os.environ.get(STDIN_VARIABLE)
    if given is None:
        if sys.__stdin__ is None:  # closed: its number may be that of another file by now
            raise OSError(errno.EBADF, "it is closed")
        return FileIO(0, closefd=False)
    offset, _, path = given.partition(":")
    # Without O_NONBLOCK opening a pipe with a name would wait for somebody to write to it.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(number, True)
    if int(offset):
        os.lseek(number, int(offset), os.SEEK_SET)
    return FileIO(number)


def stdin_for_ranks() -> dict[str, str]:
    """What to put into the environment of ranks on this machine, so that rank 0 reads this process's standard input.

    mpirun's own way is not enough: Open MPI 5 hands on what is read there, but never that it has ended.
    """
    path = f"/proc/{os.getpid()}/fd/0"
    if sys.__stdin__ is None or not os.path.exists(path):
        return {}
    try:
        offset = os.lseek(0, 0, os.SEEK_CUR)
    except OSError:
        offset = 0  # a pipe
    return {STDIN_VARIABLE: f"{offset}:{path}"}


class Stored:
    """A file's bytes as they lie there. `done` counts those that were read. Closed by its `with` block."""

    def __init__(self, path: Path, on_wait: Callable[[], object] = lambda: None) -> None:
        """`on_wait` is called twice a second while nothing comes from standard input; it may raise to end that."""
        self.path = path
        self._on_wait = on_wait
        self.name = "standard input" if path == STDIN else str(path)
        self.done = 0
        self._ahead = b""
        try:
            self._file = open_stdin() if path == STDIN else FileIO(path)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; -i takes a file of requests") from None
        except OSError as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.name} cannot be read: {error.strerror or error}")

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end, without taking them."""
        while len(self._ahead) < size and (more := self._read(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int, /) -> bytes:
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._read(size)
        self.done += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            # A signal alone does not end a read that waits for a person or a program.
            while self.path == STDIN and not select.select([self._file], [], [], WAIT_S)[0]:
                self._on_wait()
            return self._file.read(size) or b""
        except OSError as error:
            raise self.unreadable(error) from None

    def tell(self) -> int:
        return self.done

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def packing(head: bytes) -> str | None:
    """'gzip' or 'zstd' by the first four bytes, else None."""
    if head.startswith(GZIP):
        return "gzip"
    if head.startswith(ZSTD) or (head[1:4] == _SKIPPABLE and head[0] >> 4 == 5):
        return "zstd"
    return None


def unpacked(stored: Stored) -> Readable:
    """The bytes that `stored` means. Nothing is read but its first four bytes.

    Raises InputError, here for an empty file whose name says that it is compressed, later for what is cut off or
    damaged; ConfigError if it needs a package that is not there.
    """
    head = stored.peek(4)
    kind = packing(head)
    if kind == "gzip":
        return _Gzip(stored)
    if kind == "zstd":
        return _Zstd(stored)
    if not head and stored.path.suffix.lower() in (".gz", ".zst", ".zstd"):
        raise _cut_off(stored)
    return stored


class _Gzip:
    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._rest = b""
        self._member: Any = None
        self._given = 0

    def tell(self) -> int:
        return self._given

    def read(self, size: int, /) -> bytes:
        while True:
            if self._member is None:
                # Zeros may follow a member: tapes and some writers pad with them.
                self._rest = (self._rest or self._stored.read(CHUNK_BYTES)).lstrip(b"\0" if self._given else b"")
                if not self._rest:
                    if not self._stored.peek(1):
                        return b""
                    continue
                self._member = zlib.decompressobj(31)
            chunk = self._rest or self._stored.read(CHUNK_BYTES)
            if not chunk:
                raise _cut_off(self._stored)
            try:
                data: bytes = self._member.decompress(chunk, size)
            except zlib.error as error:
                raise _damaged(self._stored, error) from None
            self._rest = self._member.unconsumed_tail
            if self._member.eof:
                self._rest = self._member.unused_data
                self._member = None
            if data:
                self._given += len(data)
                return data


class _Zstd:
    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._new_frame, self._error = _zstd()
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")
        self._given = 0

    def tell(self) -> int:
        return self._given

    def read(self, size: int, /) -> bytes:
        while not self._ready:
            chunk = self._rest or self._stored.read(ZSTD_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise _cut_off(self._stored)
                return b""
            if self._frame is None:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise _damaged(self._stored, error) from None
            self._rest = b""
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        data = bytes(self._ready[:size])
        self._ready = self._ready[size:]
        self._given += len(data)
        return data


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor of one frame, and the error it raises."""
    try:
        import zstandard
    except ImportError:
        pass
    else:
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj, zstandard.ZstdError
    try:
        zstd = importlib.import_module("compression.zstd")  # Python 3.14 and newer
    except ImportError:
        raise ConfigError(
            "the input is compressed with zstd, which this Python cannot read: pip install 'llmpi[zstd]', or "
            "decompress it first (unzstd)"
        ) from None
    return zstd.ZstdDecompressor, zstd.ZstdError


def _cut_off(stored: Stored) -> InputError:
    return InputError(f"{stored.name} is cut off: its compressed data ends too early; get it again")


def _damaged(stored: Stored, error: Exception) -> InputError:
    return InputError(f"{stored.name} is damaged near byte {stored.done:,}: {error}; get it again")
