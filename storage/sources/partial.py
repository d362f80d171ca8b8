"""A file that grows in scratch over several attempts, and several pulls.

Beside `X.partial` lies `X.json`: what the other side said of the version that the bytes are of (`validator`: an ETag or
a date) and its length. Both are written before the first byte, so bytes never lie beside the words for others. `synced`
is how many bytes are known to be on disk: what a power cut leaves behind these may be zeros, and no later pull goes on
from them. The SHA-256 is computed while bytes come; those of an earlier pull are read once for it. Nothing here knows
where bytes come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from scheduling.errors import ModelSourceError
from storage.files import OsDisk, read_all, replace_file
from storage.sources.job import check_start

_DISK = OsDisk()
_BLOCK_BYTES = 1 << 20
_NOTE_BYTES = 1 << 16
SYNC_BYTES = 64 << 20
"""So many bytes, or ..."""
SYNC_S = 5.0
"""... what came in so many seconds, are synced together, and are what a killed process or machine loses."""


class Partial:
    """One growing file; a context manager. `size` is in bytes, `validator` and `total` are of the version it is of."""

    def __init__(
        self, path: Path, reading: Callable[[int], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open `path`, made if it is not there. `reading` is called with the bytes read of what is there already."""
        self.path = path
        self.size = 0
        self.validator: str | None = None
        self.total: int | None = None
        self._synced = 0
        self._clock, self._synced_at = clock, clock()
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
        try:
            with contextlib.suppress(OSError):  # what is on its way tells more; less is taken up later
                self._sync()
        finally:
            self._file.close()

    @property
    def _note_path(self) -> Path:
        return self.path.with_suffix(".json")

    def _load(self, reading: Callable[[int], None]) -> None:
        length = self._file.size()
        try:
            note = json.loads(read_all(_DISK, self._note_path, _NOTE_BYTES))
            self.validator, self.total, self._synced = note["validator"], note["total"], note["synced"]
            known = isinstance(self.validator, str | None) and isinstance(self.total, int | None)
            known = known and isinstance(self._synced, int) and 0 < self._synced <= length
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known or (self.total is not None and length > self.total):
            self.restart()
            return
        if length > self._synced:
            self._file.truncate(self._synced)
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
        self.size, self.validator, self.total, self._synced = 0, None, None, 0
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
        self._note()

    def _note(self) -> None:
        note = {"validator": self.validator, "total": self.total, "synced": self._synced}
        replace_file(_DISK, self._note_path, json.dumps(note).encode())

    def _sync(self) -> None:
        """Make what is there durable, and note that it is."""
        self._synced_at = self._clock()
        if self.size > self._synced:
            self._file.sync()
            self._synced = self.size
            self._note()

    def write(self, block: bytes, what: str) -> None:
        """Append. What does not begin like a GGUF is thrown away; ModelSourceError names it as `what`."""
        self._file.write(block)
        begun = len(self._start) >= 4
        self._take(block)
        if not begun and len(self._start) >= 4:
            self._check_start(what)
        if self.size - self._synced >= SYNC_BYTES or self._clock() - self._synced_at >= SYNC_S:
            self._sync()

    def _check_start(self, what: str) -> None:
        try:
            check_start(self._start, what)
        except ModelSourceError:
            self.restart()
            raise

    def finish(self, what: str) -> str:
        """Make the whole file durable; its SHA-256 in hexadecimal. ModelSourceError if it is no GGUF."""
        self._check_start(what)
        self._sync()
        self.expect(self.validator, self.size)
        return self._digest.hexdigest()

    def space_bytes(self) -> int:
        """What the file system has left for this user."""
        status = os.statvfs(self.path.parent)
        return status.f_bavail * status.f_frsize
