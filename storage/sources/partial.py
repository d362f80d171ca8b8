"""A file that grows in scratch over several attempts, and several pulls.

Beside `X.partial` lies `X.json`: what the other side said of the version that the bytes are of (`validator`: an ETag or
a date) and its length. Both are written before the first byte, so bytes never lie beside the words for others. The
SHA-256 is computed while bytes come; those of an earlier pull are read once for it. Nothing here knows where bytes come
from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from scheduling.errors import ModelSourceError
from storage.files import OsDisk, read_all, replace_file
from storage.sources.job import check_start

_DISK = OsDisk()
_BLOCK_BYTES = 1 << 20
_NOTE_BYTES = 1 << 16


class Partial:
    """One growing file; a context manager. `size` is in bytes, `validator` and `total` are of the version it is of."""

    def __init__(self, path: Path, reading: Callable[[int], None] = lambda _: None) -> None:
        """Open `path`, made if it is not there. `reading` is called with the bytes read of what is there already."""
        self.path = path
        self.size = 0
        self.validator: str | None = None
        self.total: int | None = None
        self._digest = hashlib.sha256()
        self._start = b""
        self._file = _DISK.open_append(path)
        try:
            self._load(reading)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def _note_path(self) -> Path:
        return self.path.with_suffix(".json")

    def _load(self, reading: Callable[[int], None]) -> None:
        length = self._file.size()
        try:
            note = json.loads(read_all(_DISK, self._note_path, _NOTE_BYTES))
            self.validator, self.total = note["validator"], note["total"]
            known = isinstance(self.validator, str | None) and isinstance(self.total, int | None)
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known or (self.total is not None and length > self.total):
            self.restart()
            return
        with self.path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                self._take(block)
                reading(self.size)

    def _take(self, block: bytes) -> None:
        if len(self._start) < 8:
            self._start += block[: 8 - len(self._start)]
        self._digest.update(block)
        self.size += len(block)

    def restart(self) -> None:
        """Throw away what is there: it is of another version, or wrong. A store that has it under another name keeps it
        as it is."""
        if os.stat(self.path).st_nlink > 1:
            self._file.close()
            _DISK.remove(self.path)
            self._file = _DISK.open_append(self.path)
        self._file.truncate(0)
        self.size, self.validator, self.total = 0, None, None
        self._digest, self._start = hashlib.sha256(), b""
        _DISK.remove(self._note_path)

    def set_aside(self) -> Path:
        """Move what is there out of the way: it is whole, and not what it should be. Returns where it lies."""
        aside = self.path.with_suffix(".wrong")
        self._file.close()
        os.replace(self.path, aside)
        self._file = _DISK.open_append(self.path)
        self.restart()
        return aside

    def expect(self, validator: str | None, total: int | None) -> None:
        """Note which version the bytes to come are of."""
        if (validator, total) == (self.validator, self.total) and _DISK.exists(self._note_path):
            return
        self.validator, self.total = validator, total
        replace_file(_DISK, self._note_path, json.dumps({"validator": validator, "total": total}).encode())

    def write(self, block: bytes, what: str) -> None:
        """Append. What does not begin like a GGUF is thrown away; ModelSourceError names it as `what`."""
        self._file.write(block)
        begun = len(self._start) >= 4
        self._take(block)
        if not begun and len(self._start) >= 4:
            self._check_start(what)

    def _check_start(self, what: str) -> None:
        try:
            check_start(self._start, what)
        except ModelSourceError:
            self.restart()
            raise

    def finish(self, what: str) -> str:
        """Make the whole file durable; its SHA-256 in hexadecimal. ModelSourceError if it is no GGUF."""
        self._check_start(what)
        self._file.sync()
        self.expect(self.validator, self.size)
        return self._digest.hexdigest()

    def space_bytes(self) -> int:
        """What the file system has left for this user."""
        status = os.statvfs(self.path.parent)
        return status.f_bavail * status.f_frsize
