"""A node's own copies of models: in which folder of the node they lie, which are there, and how one is written.

    <folder>/llmpi-<uid>/blobs/sha256-<hex>   whole copies, as in a model store (`storage.blobs`)
    <folder>/llmpi-<uid>/partial/             copies that are being written
    <folder>/llmpi-<uid>/views/<hex>/         names by which llama.cpp finds the parts of a split model
    <folder>/llmpi-<uid>/known/<hex>          digests of files that are in no store, by path, size and time of change

A copy gets its name by a rename, after its digest was compared, so two jobs that stage the same model at once both
succeed. It is not synchronised to disk: what a node keeps for itself may be lost with it, and its size is looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import ModelStoreError, StagingError
from storage.blobs import SPARE_BYTES, Blobs
from storage.digest import Digest
from storage.filesystems import mount_of
from storage.manifest import Manifest, ModelName, StoredFile
from storage.modelstore import ModelStore

MEMORY_FOLDER = "/dev/shm"
MEMORY_SHARE = 0.5
"""Of the memory that is free: what copies in memory may take at most, as llama.cpp needs some too."""


@dataclass(frozen=True)
class StageFile:
    """One file to stage. `digest` None: it is in no store, and only reading it tells."""

    path: str
    size: int
    digest: Digest | None


def candidates(stage_dir: str | None, environ: Mapping[str, str]) -> list[Path]:
    """Folders of this node where copies may lie, best first; `stage_dir` alone, if it is given."""
    if stage_dir is not None:
        return [Path(stage_dir)]
    named = [environ.get("SLURM_TMPDIR"), environ.get("TMPDIR"), MEMORY_FOLDER]
    return [Path(name) for name in dict.fromkeys(named) if name and os.path.isabs(name)]


class StageDir:
    """The copies of this user below `folder`. Raises StagingError if the folder cannot be used, or is not ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / f"llmpi-{os.getuid()}"
        if not folder.is_dir():
            raise StagingError(f"{folder} is no folder")
        try:
            self.root.mkdir(mode=0o700, exist_ok=True)
            found = self.root.lstat()
        except OSError as error:
            raise StagingError(f"{self.root} cannot be made: {error.strerror}") from None
        # Anybody can make folders in /tmp or /dev/shm: what another one put there is not loaded.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise StagingError(f"{self.root} is not a folder that only you may write to; remove it")
        self.blobs = Blobs(self.root)

    @property
    def device(self) -> int:
        """Of the file system, as `os.stat` numbers it on this node."""
        return self.root.stat().st_dev

    def lacks(self, files: Sequence[StageFile], digests: Sequence[Digest | None]) -> int:
        """Bytes of those `files` that are not here whole."""
        return sum(
            file.size for file, digest in zip(files, digests, strict=True)
            if digest is None or not self.has(digest, file.size)
        )  # fmt: skip

    def has(self, digest: Digest, size: int) -> bool:
        try:
            return self.blobs.path(digest).lstat().st_size == size and self.blobs.has(digest)
        except OSError:
            return False

    def room_bytes(self, table: str, free_memory_bytes: int) -> int:
        """What can still be written here; of memory, no more than a share of what is free."""
        free = shutil.disk_usage(self.root).free - SPARE_BYTES
        if mount_of(self.root, table).memory:
            free = min(free, int(free_memory_bytes * MEMORY_SHARE))
        return max(0, free)

    def path(self, files: Sequence[StageFile], digests: Sequence[Digest]) -> Path:
        """The file to load a model from. Raises ModelStoreError: a copy has gone."""
        stored = tuple(
            StoredFile(digest, file.size, os.path.basename(file.path))
            for file, digest in zip(files, digests, strict=True)
        )
        return ModelStore(self.root).path(Manifest(ModelName("staged"), stored, created_at="", source=""))

    def need_writable(self) -> None:
        """Raises StagingError where nothing can be written. Only writing tells: what modes allow, mounts may not."""
        try:
            fd, path = self.blobs.scratch()
            os.close(fd)
            path.unlink()
        except (OSError, ModelStoreError) as error:
            raise StagingError(_unwritable(self.root, error)) from None

    # ------------------------------------------------ digests of files that are in no store

    def known(self, key: str) -> tuple[Digest, ...]:
        """The digests noted under `key`; () if there are none."""
        with contextlib.suppress(OSError, ModelStoreError, UnicodeDecodeError):
            return tuple(map(Digest.parse, (self.root / "known" / key).read_text(encoding="ascii").split()))
        return ()

    def note(self, key: str, digests: Sequence[Digest]) -> None:
        with contextlib.suppress(OSError, ModelStoreError):  # the next job reads it again then
            fd, temporary = self.blobs.scratch()
            with open(fd, "w", encoding="ascii") as file:
                file.write("".join(f"{digest}\n" for digest in digests))
            os.replace(temporary, self.blobs.folder("known") / key)


class Writing:
    """Copies that are being written: a `storage.relay.Sink`. `reserve`: take their room at once, which costs nothing on
    a disk, but in memory as much as writing them.

    Raises StagingError: there is no room.
    """

    def __init__(self, into: StageDir, files: Sequence[StageFile], *, reserve: bool) -> None:
        self._into, self._files = into, files
        self._open: list[tuple[int, Path]] = []
        try:
            for file in files:
                self._open.append(into.blobs.scratch())
                if reserve:
                    _reserve(self._open[-1][0], file.size)
        except (OSError, ModelStoreError) as error:
            self.drop()
            raise StagingError(_unwritable(into.root, error)) from None

    def write(self, file: int, place: int, data: memoryview) -> None:
        fd = self._open[file][0]
        try:
            while data:
                written = os.pwrite(fd, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            raise StagingError(_unwritable(self._into.root, error)) from None

    def name(self, digests: Sequence[Digest]) -> None:
        """Give the copies their names. Raises StagingError."""
        try:
            for (fd, path), digest in zip(self._open, digests, strict=True):
                os.fchmod(fd, 0o600)
                self._into.blobs.name(path, digest)
        except (OSError, ModelStoreError) as error:
            raise StagingError(_unwritable(self._into.root, error)) from None

    def drop(self) -> None:
        """Close them; what has no name yet is removed."""
        for fd, path in self._open:
            # Where nothing can be written any more nothing can be removed; who wrote has said why.
            with contextlib.suppress(OSError):
                os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._open.clear()


def _reserve(fd: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _unwritable(root: Path, error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    why, full = str(error), False
    if isinstance(cause, OSError):
        why, full = cause.strerror or str(cause), cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return (
        f"{root} cannot be written: {why}; {'make room there, or ' if full else ''}name another folder with --stage-dir"
    )
