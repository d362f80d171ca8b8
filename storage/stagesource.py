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
        self.bytes_read = 0
        try:
            for file in files:
                self._open.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
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

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)
        self._open.clear()
