"""A disk in memory that outlives those who write to it: what is written, what is synced, what a crash leaves.

`Storage` is the disk, `SimulatedDisk` one process's way to it. Every operation that changes something goes through the
process's `Operations`, which may let time pass, refuse it, or end the process there, before it or in the middle of it.
What a crash leaves is as in tests.storage.crash_disk: everything if only processes died; what was synced, or an
arbitrary part of the rest too, if the machine lost its power.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import BinaryIO, Protocol

from storage.files import AppendFile, Lock
from tests.storage.crash_disk import Inode, torn


@dataclass(eq=False)
class File(Inode):
    """`dropped`: (start, end) of what a failed sync has left clean in the cache: no later sync writes it."""

    dropped: tuple[int, int] = (0, 0)


class Operations(Protocol):
    """What one process may do to the disk."""

    def operate(self, what: str, path: Path, half: Callable[[], None] | None = None) -> None:
        """Called before an operation that changes something. `half` does half of it."""

    def look(self) -> None:
        """Called before one that changes nothing."""


class Storage:
    """Files and directories below `root`, which is there and durable. `torn_writes`: power was lost with some."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[Path, File] = {root: File(None, None)}
        self.durable_names: dict[Path, File] = dict(self.names)
        self.locked: set[Path] = set()

    def durable(self, path: Path) -> bytes:
        """What a loss of power would leave of the file at least; empty if not even its name."""
        inode = self.durable_names.get(path)
        return b"" if inode is None or path.parent not in self.durable_names else inode.durable or b""

    def content(self, path: Path) -> bytes:
        inode = self.names.get(path)
        return b"" if inode is None else inode.now or b""

    def processes_died(self) -> None:
        """Everything that was written stays."""
        self.locked.clear()

    def power_lost(self, dice: Random) -> None:
        """What was not synced is lost, or an arbitrary part of it."""
        self.locked.clear()
        if dice.random() < 0.5:
            left = {path: inode.durable for path, inode in self.durable_names.items()}
        else:
            left = {}
            for path in sorted(self.names.keys() | self.durable_names.keys()):
                inode = dice.choice((self.names, self.durable_names)).get(path)
                if inode is not None:
                    left[path] = torn(inode, dice)
        left[self.root] = None
        kept = {path: data for path, data in left.items() if path == self.root or path.parent in left}
        self.names = {path: File(data, data) for path, data in kept.items()}
        self.durable_names = dict(self.names)


class SimulatedDisk:
    """`storage.files.Disk` of one process."""

    def __init__(self, storage: Storage, operations: Operations, fills: Callable[[], bool] = lambda: True) -> None:
        """`fills`: whether files that a library writes itself are really made; else they are a few bytes."""
        self._storage = storage
        self._operations = operations
        self._fills = fills

    def open_append(self, path: Path) -> AppendFile:
        self._operations.operate("open", path)
        self._must_have_parent(path)
        inode = self._storage.names.setdefault(path, File())
        if inode.now is None:
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        return _SimulatedFile(self._operations, path, inode)

    def open_read(self, path: Path) -> BinaryIO:
        self._operations.look()
        inode = self._storage.names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return io.BytesIO(inode.now or b"")

    def exists(self, path: Path) -> bool:
        self._operations.look()
        return path in self._storage.names

    def is_dir(self, path: Path) -> bool:
        self._operations.look()
        inode = self._storage.names.get(path)
        return inode is not None and inode.now is None

    def refresh(self, path: Path) -> None:
        """There is one host."""

    def list_dir(self, path: Path) -> list[str]:
        self._operations.look()
        return sorted(name.name for name in self._storage.names if name.parent == path and name != path)

    def make_dirs(self, path: Path) -> None:
        self._operations.operate("make_dirs", path)
        missing = path
        while missing not in self._storage.names:
            self._storage.names[missing] = File(None, None)
            missing = missing.parent

    def rename(self, old: Path, new: Path) -> None:
        self._operations.operate("rename", old)
        self._storage.names[new] = self._storage.names.pop(old)

    def remove(self, path: Path) -> None:
        self._operations.operate("remove", path)
        self._storage.names.pop(path, None)

    def sync_dir(self, path: Path) -> None:
        self._operations.operate("sync_dir", path)
        storage = self._storage
        kept = {name: inode for name, inode in storage.durable_names.items() if name.parent != path or name == path}
        storage.durable_names = kept | {name: inode for name, inode in storage.names.items() if name.parent == path}

    def fill(self, path: Path, write: Callable[[Path], None]) -> None:
        """`write` opens the file itself, so that it is made on the real disk and then taken from there."""
        inode = File()

        def make(part: float) -> None:
            self._must_have_parent(path)
            self._storage.names[path] = inode
            data = b"not really made"
            if self._fills():
                try:
                    write(path)
                    data = path.read_bytes()
                finally:
                    path.unlink(missing_ok=True)
            inode.now = data[: int(len(data) * part)]

        self._operations.operate("fill", path, lambda: make(0.5))
        make(1.0)
        self._operations.operate("sync", path)
        inode.durable = inode.now

    def try_lock(self, path: Path) -> Lock | None:
        self._operations.operate("lock", path)
        self._must_have_parent(path)
        self._storage.names.setdefault(path, File())
        if path in self._storage.locked:
            return None
        self._storage.locked.add(path)
        return _SimulatedLock(self._storage, path)

    def locked(self, path: Path) -> bool:
        self._operations.look()
        return path in self._storage.locked

    def _must_have_parent(self, path: Path) -> None:
        if path.parent not in self._storage.names:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path.parent))


@dataclass(slots=True)
class _SimulatedLock:
    storage: Storage
    path: Path

    def release(self) -> None:
        self.storage.locked.discard(self.path)


@dataclass(slots=True)
class _SimulatedFile:
    operations: Operations
    path: Path
    inode: File

    def write(self, data: bytes) -> None:
        self.operations.operate("write", self.path, lambda: self._append(data[: len(data) // 2]))
        self._append(data)

    def _append(self, data: bytes) -> None:
        self.inode.now = (self.inode.now or b"") + data

    def sync(self) -> None:
        inode = self.inode
        now = inode.now or b""
        try:
            self.operations.operate("sync", self.path)
        except OSError:
            inode.dropped = (min(len(inode.durable or b""), inode.dropped[0] or len(now)), len(now))
            raise
        start, end = inode.dropped
        inode.durable = now[:start] + bytes(end - start) + now[end:]

    def rewrite(self, start: int) -> None:
        self.operations.operate("rewrite", self.path)
        if start <= self.inode.dropped[0]:
            self.inode.dropped = (0, 0)

    def truncate(self, size: int) -> None:
        self.operations.operate("truncate", self.path)
        inode = self.inode
        inode.now = (inode.now or b"")[:size]
        start, end = inode.dropped
        inode.dropped = (start, min(end, size)) if size > start else (0, 0)

    def size(self) -> int:
        self.operations.look()
        return len(self.inode.now or b"")

    def close(self) -> None:
        """Nothing is held back here."""


class Outside:
    """Operations of somebody who looks on and is never disturbed."""

    def operate(self, what: str, path: Path, half: Callable[[], None] | None = None) -> None:
        """Nothing goes wrong."""

    def look(self) -> None:
        """Nothing goes wrong."""
