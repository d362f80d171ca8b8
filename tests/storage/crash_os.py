"""The operating system's calls on files below a folder, of which any may be the last one, and what a crash leaves.

For code that goes to the operating system itself, by way of no `Disk`: `tests.storage.crash_disk` is for what does. The
calls are the real ones, counted; at `cut_at` the world ends, and from then on each raises `PowerCutError`, those of
clean-ups too. Beside that, books are kept of what was synced. `survive` makes the folder what one of the MODELS of
`crash_disk` leaves. Names of a folder count as synced when that folder was, a folder's own when its parent was.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.storage.crash_disk import Inode, Model, torn
from tests.storage.fake_disk import PowerCutError

CHANGING = ("replace", "rename", "unlink", "remove", "link", "symlink", "mkdir", "rmdir", "utime")
"""Calls that change names, or times."""
OF_DESCRIPTORS = ("write", "fsync", "fchmod", "ftruncate")


@dataclass(eq=False)
class Entry(Inode):
    """What a name stands for. `target`: of a link by name."""

    target: str | None = None


class CrashOs:
    """See the module's text. What is below `root` when a session begins is durable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.dead = False
        self._cut_at: int | None = None
        self._half = False
        self._inodes: dict[int, Entry] = {}
        self._durable: dict[Path, Entry] = {}
        self._opened: dict[int, Path] = {}

    @contextmanager
    def session(self, cut_at: int | None = None, *, half: bool = False) -> Iterator[None]:
        """Within it calls are counted from 0, and the world may end. `half`: a write that is the last is half done."""
        self.calls, self.dead, self._cut_at, self._half = [], False, cut_at, half
        self._inodes = {}
        self._durable = self._found()
        with pytest.MonkeyPatch.context() as patch:
            for name in (*CHANGING, *OF_DESCRIPTORS, "open"):
                counted = self._counted(name, getattr(os, name))
                patch.setattr(os, name, counted)
                if hasattr(accessor := getattr(pathlib, "_NormalAccessor", None), name):  # of Python 3.10
                    patch.setattr(accessor, name, staticmethod(counted))
            try:
                yield
            except PowerCutError:
                assert self.dead
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """What the end of a process does to files that it has opened, and to their locks."""
        for fd, path in self._opened.items():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)") == str(path):
                    os.close(fd)
        self._opened.clear()

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = self._path(name, args, options)
            if path is None or not path.is_relative_to(self.root):
                return real(*args, **options)
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            self._operate(name, path, lambda: real(args[0], args[1][: len(args[1]) // 2]) if name == "write" else None)
            new = name == "open" and not os.path.lexists(path)
            result = real(*args, **options)
            if name == "open":
                self._opened[result] = path
            if new:  # the number may have been another file's
                self._inodes[path.lstat().st_ino] = Entry()
            if name == "fsync":
                self._sync(path, args[0])
            return result

        return call

    @staticmethod
    def _path(name: str, args: Any, options: Any) -> Path | None:
        """What a call is about: the name that comes to be, or goes."""
        if name in OF_DESCRIPTORS:
            return Path(os.readlink(f"/proc/self/fd/{args[0]}"))
        if isinstance(args[0], int):
            return None
        path = os.fspath(args[1] if name in ("replace", "rename", "link", "symlink") else args[0])
        if (folder := options.get("dir_fd")) is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return Path(os.fsdecode(path))

    def _operate(self, what: str, path: Path, half: Callable[[], object]) -> None:
        if self.dead:
            raise PowerCutError
        place = len(self.calls)
        self.calls.append(f"{what} {path.relative_to(self.root)}")
        if place == self._cut_at:
            if self._half:
                half()
            self.dead = True
            raise PowerCutError

    # ------------------------------------------------------------ what is durable

    def _entry(self, path: Path) -> Entry:
        """What is at `path` now. A file that nobody has made in this session is durable as it is."""
        if path.is_symlink():
            return Entry(target=os.readlink(path))
        if path.is_dir():
            return Entry(None, None)
        content = path.read_bytes()
        entry = self._inodes.setdefault(path.lstat().st_ino, Entry(content, content))
        entry.now = content
        return entry

    def _found(self) -> dict[Path, Entry]:
        return {path: self._entry(path) for path in sorted(self.root.rglob("*"))}

    def _sync(self, path: Path, fd: int) -> None:
        if not path.is_dir():
            entry = self._inodes[os.fstat(fd).st_ino]
            entry.now = entry.durable = path.read_bytes()
            return
        others = {name: entry for name, entry in self._durable.items() if name.parent != path}
        self._durable = others | {name: self._entry(name) for name in path.iterdir()}

    def survive(self, model: Model, seed: int = 0) -> None:
        """Make the folder what `model` leaves of it."""
        if model == "killed":
            return
        dice = random.Random(seed)
        now = self._found()
        left = dict(self._durable)
        if model == "torn":
            left = {}
            for path in sorted(now.keys() | self._durable.keys()):
                entry = dice.choice((now, self._durable)).get(path)
                if entry is not None:
                    left[path] = entry
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, entry in sorted(left.items(), key=lambda one: one[0]):
            if not path.parent.is_dir():
                continue  # in a folder that was lost itself
            content = torn(entry, dice) if model == "torn" else entry.durable
            if entry.target is not None:
                path.symlink_to(entry.target)
            elif content is None:
                path.mkdir()
            else:
                path.write_bytes(content)
