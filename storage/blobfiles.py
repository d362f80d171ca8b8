"""What the store does with single files and folders: hash, copy, write whole, look through, remove.

Nothing here knows what a blob is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from scheduling.errors import ModelStoreError
from storage.digest import Digest
from storage.files import OsDisk

CHUNK_BYTES = 4 << 20
MOVES_MAX = 100
"""How often something is tried again that somebody else's removing has come in the way of."""
Progress = Callable[[int], None]
"""Called with the bytes that were hashed since the last call."""


def nothing(_: int) -> None:
    """Nobody looks."""


def hash_file(fd: int, progress: Progress = nothing, size: int | None = None) -> Digest:
    """The digest of an open file, from its beginning; no further than a piece beyond `size`, if that is given."""
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    place = 0
    with contextlib.suppress(OSError):  # a hint
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count := os.preadv(fd, [buffer], place):
        hashed.update(buffer[:count])
        place += count
        progress(count)
        if size is not None and place > size:
            break
    return Digest.of(hashed)


def copy_file(source: int, target: int, size: int, progress: Progress) -> tuple[Digest, int]:
    """Copy a file of `size` bytes, and no further than a piece beyond: one that grows would never end."""
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    place = 0
    while count := os.preadv(source, [buffer], place):
        hashed.update(buffer[:count])
        left = buffer[:count]
        while left:
            left = left[os.write(target, left) :]
        place += count
        progress(count)
        if place > size:
            break
    return Digest.of(hashed), place


def write_whole(scratch: tuple[int, Path], path: Path, data: bytes) -> None:
    """Give `path` the content `data` durably and at once, by way of a file of our own."""
    fd, temporary = scratch
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        _moved(temporary, path)
        with contextlib.suppress(FileNotFoundError):  # removed at once
            OsDisk().sync_dir(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unusable(path, error) from error


def _moved(temporary: Path, path: Path) -> None:
    """Who removes another model may remove the folder just after it was made: then it is made again."""
    for _ in range(MOVES_MAX):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # the latter if it goes while mkdir looks at it
            make_folder(path.parent)
            os.replace(temporary, path)
            return
    os.replace(temporary, path)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there, durably. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # of a folder that we may not read its file system says when it is
        OsDisk().sync_dir(folder.parent)


def changed_s(entry: os.DirEntry[str]) -> float:
    """When it, or anything in it, was last written, renamed or given a second name, in seconds since 1970.

    A second name has the time of what it is a name of, and so does a blob that was moved: hence the time of the last
    change of status as well.
    """
    newest = 0.0
    for path in (entry.path, *(inner.path for inner in _inside(entry))):
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            newest = max(newest, found.st_mtime, found.st_ctime)
    return newest


def _inside(entry: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    if not entry.is_dir(follow_symlinks=False):
        return []
    with contextlib.suppress(ModelStoreError):
        return entries_of(Path(entry.path))
    return []


def removed(entry: os.DirEntry[str], dry_run: bool) -> int:
    """Remove it. Returns its bytes. Raises OSError."""
    size = sum(one.stat(follow_symlinks=False).st_size for one in (entry, *_inside(entry)))
    if dry_run:
        return size
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
    else:
        os.unlink(entry.path)
    return size


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unusable(folder, error) from error


def unusable(path: Path, error: OSError) -> ModelStoreError:
    """What to say of an operating system's refusal."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelStoreError(
            f"{path} cannot be written: {error.strerror}; `llmpi models gc` or `llmpi models rm` make room, LLMPI_HOME "
            "moves the store"
        )
    return ModelStoreError(f"{path} cannot be used: {error.strerror or error}; LLMPI_HOME names another place")
