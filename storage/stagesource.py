"""What rank 0 reads when it stages models: a `storage.relay.Source`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from scheduling.errors import StagingError
from storage.stagedir import StageFile


class NoSource:
    """The source of files that could not be opened; never read."""

    def read(self, file: int, place: int, into: memoryview) -> None:
        raise StagingError("nothing can be read")


class SourceFiles:
    """Files that rank 0 reads, each byte once. Raises StagingError."""

    def __init__(self, files: Sequence[StageFile]) -> None:
        self._files = files
        self._open: list[int] = []
        self._began: list[tuple[int, int]] = []
        self.bytes_read = 0
        try:
            for file in files:
                self._open.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
                self._began.append(_state(self._open[-1]))
        except OSError as error:
            self.close()
            raise StagingError(f"{error.filename} cannot be read: {error.strerror}") from None

    def read(self, file: int, place: int, into: memoryview) -> None:
        path = self._files[file].path
        while into:
            try:
                count = os.preadv(self._open[file], [into], place)
            except OSError as error:
                raise StagingError(f"{path} cannot be read at byte {place:,}: {error.strerror}") from None
            if not count:
                raise StagingError(f"{path} ends at byte {place:,} now: it was changed while it was read")
            self.bytes_read += count
            into, place = into[count:], place + count

    def check_unchanged(self) -> None:
        """After the reading: what was read is what the files hold, not some of it from before a change."""
        for file, fd, began in zip(self._files, self._open, self._began, strict=True):
            if _state(fd) != began:
                raise StagingError(f"{file.path} was changed while it was read; start again when nobody writes to it")

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)
        self._open.clear()


def _state(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns
