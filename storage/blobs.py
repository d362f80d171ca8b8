"""Blobs: files named by the SHA-256 of their bytes, in one folder, never changed once they are there.

    blobs/sha256-<hex>    a whole blob
    partial/<random>      a file that is being written, read or kept until it is known to be in place
    pulls/                what is being pulled (`storage.sources`)
    partial/*.adding      digests that somebody is about to name in a manifest
    quarantine/           what was not what it should have been
    trash/                a blob on its way out

A blob gets its name by a rename, after all its bytes were hashed as they were written and are on disk. So whoever finds
one finds it whole, and two processes that write the same blob at once both succeed. No locks are used (NFS). What keeps
a blob that is being added from being collected meanwhile: who adds announces its digests first, keeps a copy of its
own until the manifest is written, and puts that in place if the blob has gone by then; who collects moves a blob
aside, looks again who names or announces it, and puts it back if somebody does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from scheduling.errors import ModelStoreError
from storage.blobfiles import (
    Progress,
    changed_s,
    copy_file,
    entries_of,
    hash_file,
    make_folder,
    nothing,
    removed,
    unusable,
)
from storage.digest import ALGORITHM, Digest
from storage.files import OsDisk

STALE_S = 24 * 3600.0
"""Partial files and announcements that have not changed for so long are nobody's."""
PULL_CHARACTERS = 25
"""With which the names of all files of one pull begin: 'pull-' and 20 digits."""
SPARE_BYTES = 64 << 20
"""Of the disk, left free when a blob is copied in."""


@dataclass(frozen=True)
class Ingested:
    """A file whose bytes are in the store. `spare`: a copy that stays until `Blobs.settle` or `Blobs.drop`."""

    digest: Digest
    size: int
    spare: Path


class Blobs:
    """The blobs below `root`. Folders are made when something is written."""

    def __init__(self, root: Path, wall_clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = wall_clock

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be. The only way from a digest to a path."""
        if not isinstance(digest, Digest):
            raise TypeError(f"a blob is named by a Digest, not by {digest!r:.100}")
        return self.root / "blobs" / digest.file_name

    def has(self, digest: Digest) -> bool:
        return self._size(digest) is not None

    def _size(self, digest: Digest) -> int | None:
        """Its bytes; None if it is not there. Raises ModelStoreError for what is no plain file, such as a link."""
        path = self.path(digest)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise ModelStoreError(f"{path} is no plain file; the store does not follow links. Remove it.")
        return found.st_size

    def checked(self, digest: Digest, size: int) -> Path:
        """The path of a blob that is to be read. Raises ModelStoreError if it is missing or of another size.

        Nothing is opened: one look at the file, or at a few folders where it is not.
        """
        found = self._size(digest)
        if found is None:
            self.rescue(digest)
            found = self._size(digest)
        if found is None:
            why = f": it was damaged, and lies in {kept}" if (kept := self._quarantined(digest)) else ""
            raise ModelStoreError(f"the store has lost {digest}{why}; add or pull the model again")
        if found != size:
            raise ModelStoreError(
                f"{self.path(digest)} has {found:,} bytes instead of {size:,}; remove it, and add or pull the model "
                "again"
            )
        return self.path(digest)

    def __iter__(self) -> Iterator[tuple[Digest, int]]:
        """(digest, bytes) of all blobs. Other files are passed over."""
        for entry in entries_of(self.root / "blobs"):
            name = entry.name.removeprefix(f"{ALGORITHM}-")
            with contextlib.suppress(ModelStoreError, FileNotFoundError):
                digest = Digest(name)
                if digest.file_name == entry.name and entry.is_file(follow_symlinks=False):
                    yield digest, entry.stat(follow_symlinks=False).st_size

    # ------------------------------------------------ in

    def scratch(self, prefix: str = "") -> tuple[int, Path]:
        """A new file of our own, open for writing."""
        folder = self.folder("partial")
        try:
            fd, name = tempfile.mkstemp(prefix=prefix, dir=folder)
        except OSError as error:
            raise unusable(folder, error) from error
        return fd, Path(name)

    @contextlib.contextmanager
    def scratch_folder(self, prefix: str) -> Iterator[Path]:
        """A new folder of our own, removed with all that is in it. Raises ModelStoreError if it cannot be made."""
        folder = self.folder("partial")
        try:
            made = tempfile.TemporaryDirectory(prefix=prefix, dir=folder)
        except OSError as error:
            raise unusable(folder, error) from error
        with made as name:
            yield Path(name)

    def ingest(
        self, source: Path, *, expected: Digest | None = None, link: bool = False, progress: Progress = nothing
    ) -> Ingested:
        """Copy `source` in, or give it a second name (`link`) where it is on the same file system.

        Raises ModelStoreError: not readable, no room, changed meanwhile, or not what was `expected`: then what came is
        in quarantine.
        """
        spare: Path | None = None
        try:
            with open(source, "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                spare = self._linked(source, before) if link else None
                if spare is None:
                    digest, size, spare = self._copied(file, before.st_size, progress)
                else:
                    digest, size = hash_file(file.fileno(), progress, before.st_size), before.st_size
                after = os.fstat(file.fileno())
        except BaseException as error:
            if spare is not None:
                spare.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ModelStoreError(f"{source} cannot be read: {error.strerror or error}") from error
            raise
        if size != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            spare.unlink(missing_ok=True)
            raise ModelStoreError(f"{source} changed while it was read; add it again when nobody writes to it")
        if expected is not None and digest != expected:
            kept = self.quarantine(spare, expected, digest)
            raise ModelStoreError(
                f"{source} is {digest} and should be {expected}: it is damaged, or another file. It lies in {kept}."
            )
        return Ingested(digest, size, spare)

    def _copied(self, file: FileIO, size: int, progress: Progress) -> tuple[Digest, int, Path]:
        self.need_room(size)
        fd, spare = self.scratch()
        try:
            with open(fd, "wb", buffering=0) as out:
                digest, written = copy_file(file.fileno(), out.fileno(), size, progress)
                os.fchmod(fd, 0o644)
                os.fsync(fd)
        except OSError as error:
            spare.unlink(missing_ok=True)
            raise unusable(spare, error) from error
        except BaseException:
            spare.unlink(missing_ok=True)
            raise
        return digest, written, spare

    def _linked(self, source: Path, opened: os.stat_result) -> Path | None:
        """A second name for `source`, which is open; None where that cannot be."""
        fd, spare = self.scratch()
        os.close(fd)
        spare.unlink()
        try:
            os.link(os.path.realpath(source), spare)
        except OSError:
            return None  # another file system, or one without links
        found = spare.lstat()
        if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino) or not stat.S_ISREG(found.st_mode):
            spare.unlink()
            return None
        return spare

    def need_room(self, size: int) -> None:
        """Raises ModelStoreError if the disk has no room for `size` bytes more."""
        folder = self.folder("partial")
        free = shutil.disk_usage(folder).free
        if free < size + SPARE_BYTES:
            raise ModelStoreError(
                f"{folder} has {free / 1e9:,.1f} GB free, and {size / 1e9:,.1f} GB are needed; `llmpi models gc` or "
                "`llmpi models rm` make room, LLMPI_HOME moves the store"
            )

    def hash(self, path: Path) -> Digest:
        """Of a file that need not be in the store. Raises ModelStoreError if it cannot be read."""
        try:
            with open(path, "rb", buffering=0) as file:
                return hash_file(file.fileno())
        except OSError as error:
            raise ModelStoreError(f"{path} cannot be read: {error.strerror or error}") from error

    def put(self, file: Ingested) -> None:
        """Give the blob its name, unless it is there. The spare copy stays."""
        path = self.path(file.digest)
        self.folder("blobs")
        try:
            if self._size(file.digest) == file.size:
                return
            again = file.spare.with_name(file.spare.name + ".put")
            try:
                os.link(file.spare, again)
            except OSError:
                again = file.spare  # no links here: what is spare is the blob
            os.replace(again, path)
            if again != file.spare:
                again.unlink(missing_ok=True)  # it stays where it is another name of what is there already
            OsDisk().sync_dir(path.parent)
        except OSError as error:
            raise unusable(path, error) from error

    def name(self, path: Path, digest: Digest) -> None:
        """Give a file of the store's, which is whole, its name. Raises OSError."""
        self.folder("blobs")
        os.replace(path, self.path(digest))

    def settle(self, files: tuple[Ingested, ...]) -> None:
        """After the manifest was written: put back what was collected meanwhile, and drop the spare copies."""
        for file in files:
            if not self.has(file.digest):
                self.put(file)
        self.drop(files)

    def drop(self, files: tuple[Ingested, ...]) -> None:
        for file in files:
            file.spare.unlink(missing_ok=True)

    @contextlib.contextmanager
    def announced(self, digests: list[Digest]) -> Iterator[None]:
        """While it lasts, nobody collects `digests`."""
        fd, path = self.scratch()
        marker = path.with_name(path.name + ".adding")
        try:
            try:
                with open(fd, "w", encoding="ascii") as file:
                    os.fchmod(fd, 0o644)  # for others who collect
                    file.write("".join(f"{digest}\n" for digest in digests))
                os.replace(path, marker)
            except OSError as error:
                raise unusable(marker, error) from error
            yield
        finally:
            path.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)

    def announcements(self) -> set[Digest]:
        """Raises ModelStoreError if one cannot be read: who knows what it is about."""
        found: set[Digest] = set()
        for entry in entries_of(self.root / "partial"):
            if not entry.name.endswith(".adding"):
                continue
            found.update(self._announced_in(Path(entry.path)))
        return found

    def _announced_in(self, marker: Path) -> list[Digest]:
        try:
            stale = self._clock() - marker.stat().st_mtime >= STALE_S
            text = "" if stale else marker.read_text(encoding="ascii")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unusable(marker, error) from error
        except UnicodeDecodeError:
            return []
        with contextlib.suppress(ModelStoreError):
            return [Digest.parse(line) for line in text.splitlines()]
        return []

    # ------------------------------------------------ out

    def quarantine(self, path: Path, expected: Digest, actual: Digest) -> Path:
        """Put `path` where nobody takes it for a blob. Returns where it lies."""
        kept = self.folder("quarantine") / f"{_quarantine_prefix(expected)}{actual.file_name}"
        try:
            os.replace(path, kept)
        except OSError as error:
            raise unusable(kept, error) from error
        return kept

    def _quarantined(self, digest: Digest) -> Path | None:
        """What should have been the blob, and was not; None if there is nothing such."""
        with contextlib.suppress(ModelStoreError):  # nobody lets us look
            for entry in entries_of(self.root / "quarantine"):
                if entry.name.startswith(_quarantine_prefix(digest)):
                    return Path(entry.path)
        return None

    def collect(self, digest: Digest, wanted: Callable[[], set[Digest]]) -> int:
        """Remove a blob that nobody wants; `wanted` is asked again once it is out of the way. Returns bytes freed."""
        size = self._size(digest)
        if size is None or digest in self.announcements() or digest in wanted():
            return 0
        path = self.path(digest)
        aside = self.folder("trash") / f"{digest.file_name}.{os.getpid()}.{time.time_ns()}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise unusable(path, error) from error
        try:
            keep = digest in self.announcements() or digest in wanted()
        except BaseException:
            self._put_back(aside, digest)
            raise
        if keep:
            self._put_back(aside, digest)
            return 0
        try:
            aside.unlink()
        except FileNotFoundError:
            return 0  # somebody has rescued it
        OsDisk().sync_dir(path.parent)
        return size

    def _put_back(self, aside: Path, digest: Digest) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody has rescued it
            if self.has(digest):
                aside.unlink()
            else:
                os.replace(aside, self.path(digest))

    def rescue(self, digest: Digest) -> bool:
        """Put back a blob that is needed, from where a collection has moved it. False if it is not there."""
        for entry in entries_of(self.root / "trash"):
            if entry.name.startswith(f"{digest.file_name}."):
                with contextlib.suppress(OSError):
                    os.replace(entry.path, self.path(digest))
                    return True
        return False

    def sweep(self, *, dry_run: bool = False) -> int:
        """Remove what interrupted work has left, as far as that is allowed. Returns the bytes freed."""
        freed = 0
        for folder in ("partial", "pulls", "trash"):
            entries = entries_of(self.root / folder)
            newest_s: dict[str, float] = {}
            for entry in entries:
                key = _together(entry.name)
                newest_s[key] = max(newest_s.get(key, 0.0), changed_s(entry))
            for entry in entries:
                if self._clock() - newest_s[_together(entry.name)] >= STALE_S:
                    with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                        freed += removed(entry, dry_run)
        return freed

    def folder(self, name: str) -> Path:
        """One of the store's own, which is there now."""
        folder = self.root / name
        try:
            make_folder(folder)
        except OSError as error:
            raise unusable(folder, error) from error
        return folder


def _quarantine_prefix(expected: Digest) -> str:
    return f"{expected.file_name}.is-"


def _together(name: str) -> str:
    """Files of one pull are as new as the newest of them."""
    return name[:PULL_CHARACTERS] if name.startswith("pull-") else name
