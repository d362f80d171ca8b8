"""The file layer as an argument: what the record and the run directory need of a disk, and the real one.

Everything durable in this package goes through a `Disk`, so that tests and the simulator can give one that fails
or crashes at any write, fsync or rename. A `Disk` raises OSError like the operating system does; the callers turn
that into errors for people. It knows nothing of records, locks' owners or JSON.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.filesystems import mount_of, read_mounts

REWRITE_BYTES = 1 << 20

_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class AppendFile(Protocol):
    """A file that only grows, or is cut. Not durable before `sync`."""

    def write(self, data: bytes) -> None:
        """Append all of `data`, or raise OSError; a part of it may have been written then."""

    def sync(self) -> None:
        """Make everything written so far durable."""

    def rewrite(self, start: int) -> None:
        """Write again what stands from byte `start` on. Pages that the system could not write are clean in its cache
        from then on: of those, `sync` proves something only after this."""

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""

    def size(self) -> int:
        """Length in bytes."""

    def close(self) -> None:
        """Close. What was not synced may be lost. Never raises OSError."""


class Lock(Protocol):
    """A lock that is held until `release`, or until this process ends in whatever way."""

    def release(self) -> None: ...


class LocksUnsupportedError(OSError):
    """The file system cannot lock."""


class Disk(Protocol):
    """What this package asks of a file system. Every method may raise OSError."""

    def open_append(self, path: Path) -> AppendFile:
        """Open for appending; created if it is not there."""

    def open_read(self, path: Path) -> BinaryIO: ...

    def exists(self, path: Path) -> bool: ...

    def is_dir(self, path: Path) -> bool: ...

    def list_dir(self, path: Path) -> list[str]: ...

    def refresh(self, path: Path) -> None:
        """See a file as it is by now, not as this host remembers it: to be called before one is judged by what is in it
        that other hosts write. Never raises OSError."""

    def make_dirs(self, path: Path) -> None: ...

    def rename(self, old: Path, new: Path) -> None:
        """Atomically give `old` the name `new`, replacing what had it."""

    def remove(self, path: Path) -> None:
        """Remove a file. One that is not there is no error."""

    def sync_dir(self, path: Path) -> None:
        """Make creations, renames and removals in a directory durable."""

    def fill(self, path: Path, write: Callable[[Path], None]) -> None:
        """Have `write` make the file `path`, for a library that opens files itself, and make its content durable."""

    def try_lock(self, path: Path) -> Lock | None:
        """Lock `path` (created if missing) exclusively; None if another holds it. Raises LocksUnsupportedError."""

    def locked(self, path: Path) -> bool:
        """Whether anyone holds a lock on `path`; takes none itself. Raises LocksUnsupportedError."""


class _OsAppendFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        os.fsync(self._fd)

    def rewrite(self, start: int) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)  # what is opened for appending writes at the end only
        try:
            while data := os.pread(fd, REWRITE_BYTES, start):
                start += os.pwrite(fd, data, start)
        finally:
            os.close(fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        _close(fd)


class _OsLock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        _close(fd)


class OsDisk:
    """The real file system.

    Locks belong to the open file, not to the process (Linux's open-file-description locks, flock elsewhere): a
    second opening in the same process is refused too, and closing another descriptor of the file releases
    nothing. Both work across hosts on NFS, and on Lustre if it is mounted with `flock`.
    """

    def open_append(self, path: Path) -> AppendFile:
        return _OsAppendFile(path)

    def open_read(self, path: Path) -> BinaryIO:
        return open(path, "rb", buffering=1 << 16)

    def exists(self, path: Path) -> bool:
        return _looked_at(os.lstat, path) is not None

    def is_dir(self, path: Path) -> bool:
        found = _looked_at(os.stat, path)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def list_dir(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def refresh(self, path: Path) -> None:
        # NFS asks its server whenever a file is opened. FUSE file systems may go by a size that they have seen before
        # (sshfs: for 20 s), so that a file seems empty, or ends early, or was not replaced; a change of its status,
        # which changes nothing, makes them ask.
        if not mount_of(path, read_mounts()).type.startswith("fuse"):
            return
        try:
            os.chmod(path, stat.S_IMODE(os.stat(path).st_mode))
        except PermissionError:
            with contextlib.suppress(OSError):
                os.utime(path)  # another user's, which we may write to
        except OSError:
            return  # who reads it is told why

    def make_dirs(self, path: Path) -> None:
        os.makedirs(path, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def sync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot sync a directory: their renames are durable when they return.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(fd)

    def fill(self, path: Path, write: Callable[[Path], None]) -> None:
        write(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def try_lock(self, path: Path) -> Lock | None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            else:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise _lock_error(error) from error
        return _OsLock(fd)

    def locked(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if hasattr(fcntl, "F_OFD_GETLK"):
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
                return bool(kind != fcntl.F_UNLCK)
            # flock cannot be asked, only tried; a shared one is let go at once.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return True
            raise _lock_error(error) from error
        finally:
            os.close(fd)


def _close(fd: int) -> None:
    """A network file system may say only here that it has lost what was written, or that it has gone. What counts was
    synced before; what was not is not counted."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _looked_at(look: Callable[[Path], os.stat_result], path: Path) -> os.stat_result | None:
    """None if nothing is there. A disk that fails says nothing of what is there: what it holds is not to be taken for
    new and written over."""
    try:
        return look(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _lock_error(error: OSError) -> OSError:
    return LocksUnsupportedError(*error.args) if error.errno in _NO_LOCKS else error


def replace_file(disk: Disk, path: Path, data: bytes) -> None:
    """Give `path` the content `data` durably and at once: a reader, or a crash, sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    file = disk.open_append(temporary)
    try:
        file.truncate(0)
        file.write(data)
        file.sync()
    finally:
        file.close()
    disk.rename(temporary, path)
    disk.sync_dir(path.parent)


FAILS_OF_DISKS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ENOTCONN,
        errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ETIMEDOUT,
    }
)  # fmt: skip
"""Errors of a disk that was right before, and may be again: not the fault of what was asked of it. Those of networks
are of file systems behind one."""


def read_all(disk: Disk, path: Path, limit_bytes: int = 1 << 26) -> bytes:
    """The content of a small file; ValueError if it is over `limit_bytes`."""
    with disk.open_read(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"{path} is over {limit_bytes} bytes")
    return data
