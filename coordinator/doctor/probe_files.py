"""One folder looked at: which file system, how fast, and whether what llmpi relies on works there.

What is written is small, is removed again, and is bounded in time; a file system that does not answer at all holds up
the thread that asks, not the doctor (`gather`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.doctor.facts import Place
from storage.filesystems import mount_of, read_mounts

SAMPLE_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20
SPEED_S = 2.0
"""For each of writing and reading: what was done by then is what is measured."""
FSYNCS = 3


def look_at(use: str, path: Path, *, write: bool = True, speed: bool = True) -> Place:
    """`path` need not be there: then it is the nearest folder above it that is looked at."""
    folder = existing(path)
    try:
        os.listdir(folder)  # an automounter mounts what is looked into
    except OSError as error:
        return Place(use=use, path=str(path), problem=error.strerror or str(error))
    mount = mount_of(folder, read_mounts())
    about: dict[str, Any] = {
        "use": use, "path": str(path), "type": mount.type, "mounted": mount.source, "network": mount.network,
        "memory": mount.memory, "locks_reach": mount.locks_reach, "free_bytes": shutil.disk_usage(folder).free,
    }  # fmt: skip
    if not write:
        return Place(**about, written=False)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Place(use=use, path=str(path), problem=f"you may not write to {folder}", type=mount.type)
    try:
        return Place(**about, **_tried(folder, speed=speed))
    except OSError as error:
        return Place(
            use=use, path=str(path), problem=f"writing there failed: {error.strerror or error}", type=mount.type
        )


def existing(path: Path) -> Path:
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _tried(folder: Path, *, speed: bool) -> dict[str, Any]:
    """Raises OSError where not even a file can be written."""
    # Of its own: two places may be one folder.
    name = folder / f".llmpi-doctor-{uuid.uuid4().hex}"
    other = name.with_name(f"{name.name}-renamed")
    faults: list[str] = []
    found: dict[str, Any] = {}
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if speed:
                found["write_bytes_per_s"] = _written(fd)
            else:
                os.write(fd, b"x")
            found["fsync_s"] = _fsyncs(fd, faults)
            _locks(fd, faults)
            if speed:
                found["read_bytes_per_s"] = _read(fd)
        finally:
            os.close(fd)
        _fault(faults, "rename fails", lambda: os.replace(name, other))
        _fault(faults, "syncing a folder fails", lambda: _sync_folder(folder))
    finally:
        for left in (name, other):
            with contextlib.suppress(OSError):
                left.unlink()
    return found | {"faults": tuple(faults)}


def _written(fd: int) -> float:
    """Bytes a second, synchronised at the end."""
    chunk = os.urandom(CHUNK_BYTES)  # file systems that compress would be too good with zeros
    began, done = time.monotonic(), 0
    while done < SAMPLE_BYTES and time.monotonic() - began < SPEED_S:
        done += os.write(fd, chunk)
    os.fsync(fd)
    return done / max(1e-9, time.monotonic() - began)


def _fsyncs(fd: int, faults: list[str]) -> float | None:
    """Median seconds of a small write and its fsync, as a commit is."""
    took = []
    try:
        for _ in range(FSYNCS):
            began = time.monotonic()
            os.write(fd, b"a line of a record\n" * 20)
            os.fsync(fd)
            took.append(time.monotonic() - began)
    except OSError as error:
        faults.append(f"fsync fails: {error.strerror or error}")
        return None
    return sorted(took)[len(took) // 2]


def _locks(fd: int, faults: list[str]) -> None:
    _fault(faults, "lockf fails", lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    _fault(faults, "unlocking fails", lambda: fcntl.lockf(fd, fcntl.LOCK_UN))


def _read(fd: int) -> float:
    """Bytes a second, of what was dropped from the cache where the kernel does that."""
    size = os.lseek(fd, 0, os.SEEK_END)
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    began, place = time.monotonic(), 0
    while place < size and time.monotonic() - began < SPEED_S:
        place += max(1, len(os.pread(fd, CHUNK_BYTES, place)))
    return place / max(1e-9, time.monotonic() - began)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fault(faults: list[str], what: str, do: Callable[[], object]) -> None:
    try:
        do()
    except OSError as error:
        faults.append(f"{what}: {error.strerror or error}")
