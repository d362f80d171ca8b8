"""Numbers and strings from the front of a GGUF file, through a window, never past its end.

Whatever is wrong becomes a ModelFileError that says where: the byte, and the key or tensor that is being read
(`within`, which the caller sets). At most _WINDOW_BYTES, or what a caller asks for, are in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from pathlib import Path
from typing import BinaryIO

from scheduling.errors import ModelFileError

STRING_BYTES_MAX = 1 << 26
TEXT_KEPT_BYTES = 1024
TOKEN_BYTES_MAX = 1 << 16

_WINDOW_BYTES = 1 << 18
_U64 = struct.Struct("<Q")


def shown(text: str) -> str:
    """A text of a file as a message may have it: in quotes, on one line, not long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


class GgufReader:
    """Reads `file` from its start. `size`: bytes of the file; `within`: what is being read, for errors."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.size = os.fstat(file.fileno()).st_size
        self.within = "the counts"
        self._window = b""
        self._start = 0
        self._at = 0

    @property
    def offset(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return self.size - self.offset

    def bad(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self._path} is damaged near byte {self.offset}: {why}. Fetch it again.")

    def truncated(self) -> ModelFileError:
        return ModelFileError(
            f"{self._path} is truncated: it ends at byte {self.size}, within {self.within}. Fetch it again."
        )

    def no_room(self, claim: str) -> ModelFileError:
        return ModelFileError(
            f"{self._path} is truncated, or damaged near byte {self.offset}: {claim}, and {self.left} bytes are left. "
            "Fetch it again."
        )

    def take(self, length: int) -> bytes:
        """The next `length` bytes, which a caller has bounded."""
        if self._at + length > len(self._window):
            if length > self.left:
                raise self.truncated()
            self._refill(max(length, _WINDOW_BYTES))
            if len(self._window) < length:
                raise self.truncated()
        data = self._window[self._at : self._at + length]
        self._at += length
        return data

    def skip(self, length: int) -> None:
        if length > self.left:
            raise self.truncated()
        self._at += length

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def name(self, limit: int, what: str) -> str:
        """A string of at most `limit` bytes that names something."""
        length = self.u64()
        if length > limit:
            raise self.bad(f"{what} of {length} bytes, {limit} at most")
        try:
            name = self.take(length).decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} that is not UTF-8") from None
        if "\0" in name:
            # llama.cpp ends it there: two names could become one.
            raise self.bad(f"{what} with a zero byte in it, {shown(name)}")
        return name

    def text(self) -> bytes | None:
        """A string of any allowed length; None if it is too long to keep."""
        length = self._text_bytes()
        if length <= TEXT_KEPT_BYTES:
            return self.take(length)
        self.skip(length)
        return None

    def text_sha256(self) -> str:
        """SHA-256 of a string's bytes, in hexadecimal."""
        left = self._text_bytes()
        digest = hashlib.sha256()
        while left:
            piece = self.take(min(left, _WINDOW_BYTES))
            digest.update(piece)
            left -= len(piece)
        return digest.hexdigest()

    def skip_texts(self, count: int) -> None:
        """Step over `count` strings, in a loop that vocabularies are worth."""
        unpack = _U64.unpack_from
        window, at = self._window, self._at
        last = len(window) - 8
        for _ in range(count):
            if at > last:
                window, at = self._window_from(at, 8), 0
                last = len(window) - 8
            length = unpack(window, at)[0]
            if length > STRING_BYTES_MAX:
                self._at = at
                raise self._too_long(length)
            at += 8 + length
        self._at = at
        if self.left < 0:
            raise self.truncated()

    def token_hashes(self, count: int) -> array[int]:
        """Hashes of `count` tokens as llama.cpp has them: up to a zero byte, and none of them empty."""
        unpack = _U64.unpack_from
        window, at = self._window, self._at
        last = len(window) - 8
        hashes = array("q")
        for number in range(count):
            if at > last:
                window, at = self._window_from(at, 8), 0
                last = len(window) - 8
            length = unpack(window, at)[0]
            if length > TOKEN_BYTES_MAX:
                self._at = at
                raise self.bad(f"its token {number} has {length} bytes, {TOKEN_BYTES_MAX} at most")
            if at + length > last:
                window, at = self._window_from(at, 8 + length), 0
                last = len(window) - 8
            end = at + 8 + length
            token = window[at + 8 : end]
            if 0 in token:
                token = token[: token.index(0)]
            hashes.append(hash(token or b"[EMPTY_%d]" % number))
            at = end
        self._at = at
        return hashes

    def _window_from(self, at: int, needed: int) -> bytes:
        """A new window that begins at `at` of the old one, and has `needed` bytes at least."""
        self._at = at
        if self.left < needed:
            raise self.truncated()
        self._refill(_WINDOW_BYTES)
        if len(self._window) < needed:
            raise self.truncated()
        return self._window

    def _text_bytes(self) -> int:
        length = self.u64()
        if length > STRING_BYTES_MAX:
            raise self._too_long(length)
        if length > self.left:
            raise self.truncated()
        return length

    def _too_long(self, length: int) -> ModelFileError:
        return self.bad(f"{self.within} has a string of {length} bytes, {STRING_BYTES_MAX} at most")

    def _refill(self, length: int) -> None:
        """Let the window begin at the current offset."""
        self._start, self._at = self.offset, 0
        self._file.seek(self._start)
        self._window = self._file.read(length)
