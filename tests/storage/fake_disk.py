"""A disk in memory that can be full, refuse operations, and lose what was not synced when it crashes."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from storage.files import AppendFile, Lock, LocksUnsupportedError


class PowerCutError(BaseException):
    """Not an Exception: nothing may handle it."""


@dataclass
class Content:
    """`now` is what a reader sees, `durable` what a crash leaves.

    `dropped`: (start, end) of what a failed sync has left clean in the cache, as Linux does: no later sync writes it.
    """

    now: bytes = b""
    durable: bytes = b""
    dropped: tuple[int, int] = (0, 0)


@dataclass
class FakeDisk:
    """`capacity_bytes` bounds all files together. `fail` maps an operation's name to the errno it ends with.

    The operation after the first `cut_after` ends in a PowerCutError, and has not happened.
    """

    capacity_bytes: int = 1 << 30
    fail: dict[str, int] = field(default_factory=dict)
    locks_work: bool = True
    cut_after: int = 1 << 30
    files: dict[Path, Content] = field(default_factory=dict)
    dirs: set[Path] = field(default_factory=set)
    held: set[Path] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def check(self, operation: str) -> None:
        if len(self.calls) >= self.cut_after:
            raise PowerCutError
        self.calls.append(operation)
        if operation in self.fail:
            number = self.fail[operation]
            raise OSError(number, os.strerror(number))

    def room(self) -> int:
        return self.capacity_bytes - sum(len(file.now) for file in self.files.values())

    def crash(self, torn_bytes: int = 0) -> FakeDisk:
        """The disk after a power cut: what was synced, and at most `torn_bytes` of what was not."""
        left = {}
        for path, file in self.files.items():
            more = file.now[len(file.durable) : len(file.durable) + torn_bytes]
            kept = file.durable + more if file.now.startswith(file.durable) else file.durable
            left[path] = Content(kept, kept)
        return FakeDisk(files=left, dirs=set(self.dirs))

    def open_append(self, path: Path) -> AppendFile:
        self.check("open")
        if path.parent not in self.dirs:
            raise FileNotFoundError(errno.ENOENT, "no such directory")
        return _FakeFile(self, self.files.setdefault(path, Content()))

    def open_read(self, path: Path) -> BinaryIO:
        self.check("read")
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return io.BytesIO(self.files[path].now)

    def exists(self, path: Path) -> bool:
        return path in self.files or path in self.dirs

    def is_dir(self, path: Path) -> bool:
        return path in self.dirs

    def refresh(self, path: Path) -> None:
        """There is one host."""

    def list_dir(self, path: Path) -> list[str]:
        return sorted(file.name for file in self.files if file.parent == path)

    def make_dirs(self, path: Path) -> None:
        self.check("make_dirs")
        self.dirs |= {path, *path.parents}

    def rename(self, old: Path, new: Path) -> None:
        self.check("rename")
        self.files[new] = self.files.pop(old)

    def remove(self, path: Path) -> None:
        self.check("remove")
        self.files.pop(path, None)

    def sync_dir(self, path: Path) -> None:
        self.check("sync_dir")

    def fill(self, path: Path, write: Callable[[Path], None]) -> None:
        raise NotImplementedError("a file that a library writes itself is on a real disk")

    def try_lock(self, path: Path) -> Lock | None:
        if not self.locks_work:
            raise LocksUnsupportedError(errno.ENOLCK, "no locks")
        self.open_append(path)
        if path in self.held:
            return None
        self.held.add(path)
        return _FakeLock(self, path)

    def locked(self, path: Path) -> bool:
        if not self.locks_work:
            raise LocksUnsupportedError(errno.ENOLCK, "no locks")
        return path in self.held


@dataclass
class _FakeLock:
    disk: FakeDisk
    path: Path

    def release(self) -> None:
        self.disk.held.discard(self.path)


@dataclass
class _FakeFile:
    disk: FakeDisk
    content: Content

    def write(self, data: bytes) -> None:
        self.disk.check("write")
        room = self.disk.room()
        self.content.now += data[:room]
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        content = self.content
        try:
            self.disk.check("sync")
        except OSError:
            content.dropped = (len(content.durable), len(content.now))
            raise
        start, end = content.dropped
        content.durable = content.now[:start] + bytes(end - start) + content.now[end:]

    def rewrite(self, start: int) -> None:
        self.disk.check("rewrite")
        if start <= self.content.dropped[0]:
            self.content.dropped = (0, 0)

    def truncate(self, size: int) -> None:
        self.disk.check("truncate")
        self.content.now = self.content.now[:size]
        if size <= self.content.dropped[0]:
            self.content.dropped = (0, 0)

    def size(self) -> int:
        return len(self.content.now)

    def close(self) -> None:
        pass
