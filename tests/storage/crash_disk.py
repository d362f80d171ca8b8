"""A real folder that fails or stops at any operation, and what a crash leaves of it.

`CrashDisk` does everything on the real file system, so that whoever reads files by their names finds them, and keeps
books beside it: what each file holds now, what of it was synced, which names a synced directory had. The operation
`cut_at` ends the world: from then on every operation raises `PowerCutError`, those of clean-ups too. `survive` then
makes the folder what one of the MODELS leaves:

    killed      everything that was written: the processes were killed, the machine lives
    synced      file contents as they were synced last, names as their directory was synced last
    torn        of what was not synced an arbitrary part: pages of it (zeros in the others), names one by one

A failing disk, in place of one that ends: `fail_at` with the errno and whether it is right again afterwards.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from storage.files import AppendFile, Lock, OsDisk
from tests.storage.fake_disk import PowerCutError

Model = Literal["killed", "synced", "torn"]
MODELS: tuple[Model, ...] = ("killed", "synced", "torn")
PAGE_BYTES = 64
"""Small, so that a file of a test has many."""


@dataclass(eq=False)
class Inode:
    """A file's content; None is a directory."""

    now: bytes | None = b""
    durable: bytes | None = b""


class CrashDisk(OsDisk):
    """See the module's text. `root` is there and durable; everything below it is made through this disk.

    `half`: the operation at which the world ends, or the disk fails, is half done if it can be. Operations count from
    0; `calls` names them.
    """

    def __init__(
        self,
        root: Path,
        *,
        cut_at: int | None = None,
        fail_at: int | None = None,
        number: int = 0,
        for_good: bool = True,
        half: bool = False,
    ) -> None:
        self.root = root
        self.calls: list[str] = []
        self.dead = False
        self.failed = False
        self.names: dict[Path, Inode] = {}
        self.durable_names: dict[Path, Inode] = {}
        self.locks: list[Lock] = []
        self._cut_at, self._fail_at = cut_at, fail_at
        self._number, self._for_good, self._half = number, for_good, half
        for path in sorted(root.rglob("*")):
            content = None if path.is_dir() else path.read_bytes()
            self.names[path] = Inode(content, content)
        self.durable_names = dict(self.names)

    def _operate(self, what: str, path: Path, half: Callable[[], None] | None = None) -> None:
        """Count an operation that changes something, and end here if it is the one."""
        if self.dead:
            raise PowerCutError
        place = len(self.calls)
        self.calls.append(f"{what} {path.relative_to(self.root)}")
        if place == self._cut_at:
            if self._half and half is not None:
                half()
            self.dead = True
            raise PowerCutError
        if self._fail_at is not None and (place == self._fail_at or (self._for_good and place > self._fail_at)):
            if self._half and half is not None and place == self._fail_at:
                half()
            self.failed = True
            raise OSError(self._number, os.strerror(self._number))

    def _look(self) -> None:
        """Reading changes nothing, but a dead machine does not read."""
        if self.dead:
            raise PowerCutError

    # ------------------------------------------------------------ the file layer

    def open_append(self, path: Path) -> AppendFile:
        self._operate("open", path)
        file = super().open_append(path)
        return _CrashFile(self, path, self.names.setdefault(path, Inode()), file)

    def open_read(self, path: Path) -> BinaryIO:
        self._look()
        return super().open_read(path)

    def exists(self, path: Path) -> bool:
        self._look()
        return super().exists(path)

    def make_dirs(self, path: Path) -> None:
        self._operate("make_dirs", path)
        super().make_dirs(path)
        self.names.setdefault(path, Inode(None, None))

    def rename(self, old: Path, new: Path) -> None:
        self._operate("rename", old)
        super().rename(old, new)
        self.names[new] = self.names.pop(old)

    def remove(self, path: Path) -> None:
        self._operate("remove", path)
        super().remove(path)
        self.names.pop(path, None)

    def sync_dir(self, path: Path) -> None:
        self._operate("sync_dir", path)
        self.durable_names = {name: inode for name, inode in self.durable_names.items() if name.parent != path} | {
            name: inode for name, inode in self.names.items() if name.parent == path
        }

    def fill(self, path: Path, write: Callable[[Path], None]) -> None:
        inode = self.names.setdefault(path, Inode())

        def part() -> None:
            write(path)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            inode.now = whole[: len(whole) // 2]

        self._operate("fill", path, part)
        write(path)
        inode.now = path.read_bytes()
        self._operate("sync", path)
        inode.durable = inode.now

    def try_lock(self, path: Path) -> Lock | None:
        self._operate("lock", path)
        lock = super().try_lock(path)
        self.names.setdefault(path, Inode())
        if lock is not None:
            self.locks.append(lock)
        return lock

    # ------------------------------------------------------------ the end of the world

    def let_go(self) -> None:
        """What the end of the processes does to their locks."""
        for lock in self.locks:
            lock.release()

    def survive(self, model: Model, seed: int = 0) -> None:
        """Make the folder what `model` leaves of it. May be called again with another model."""
        self.let_go()
        left = self._left(model, random.Random(seed))
        for path in list(self.root.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in sorted(left.items()):
            if path.parent != self.root and path.parent not in left:
                continue  # in a directory that was lost itself
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content)

    def _left(self, model: Model, dice: random.Random) -> dict[Path, bytes | None]:
        if model == "killed":
            return {path: inode.now for path, inode in self.names.items()}
        if model == "synced":
            return {path: inode.durable for path, inode in self.durable_names.items()}
        left: dict[Path, bytes | None] = {}
        for path in sorted(self.names.keys() | self.durable_names.keys()):
            inode = dice.choice((self.names, self.durable_names)).get(path)
            if inode is not None:
                left[path] = _torn(inode, dice)
        return left


def _torn(inode: Inode, dice: random.Random) -> bytes | None:
    """Some pages as they are now, the others as they were synced; a file that has grown may have grown in part."""
    now, durable = inode.now, inode.durable
    if now is None or durable is None or now == durable:
        return now
    size = dice.randint(min(len(now), len(durable)), max(len(now), len(durable)))
    found = bytearray()
    for start in range(0, size, PAGE_BYTES):
        source = dice.choice((now, durable))
        found += source[start : start + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
    return bytes(found[:size])


@dataclass
class _CrashFile:
    disk: CrashDisk
    path: Path
    inode: Inode
    file: AppendFile
    closed: bool = field(default=False)

    def write(self, data: bytes) -> None:
        self.disk._operate("write", self.path, lambda: self._write(data[: len(data) // 2]))
        self._write(data)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.inode.now = (self.inode.now or b"") + data

    def sync(self) -> None:
        self.disk._operate("sync", self.path)
        self.inode.durable = self.inode.now

    def rewrite(self, start: int) -> None:
        self.disk._operate("rewrite", self.path)
        self.file.rewrite(start)

    def truncate(self, size: int) -> None:
        self.disk._operate("truncate", self.path)
        self.file.truncate(size)
        self.inode.now = (self.inode.now or b"")[:size]

    def size(self) -> int:
        self.disk._look()
        return self.file.size()

    def close(self) -> None:
        self.file.close()
