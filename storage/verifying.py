"""Hash blobs again: which are what their names say, and which are not any more.

What was found to be right is noted in `partial/verified`, a line a blob, so that a verification that was interrupted
goes on with the blobs that it had not finished. A blob in the middle of which it was interrupted is hashed from its
beginning: the state of a SHA-256 cannot be kept (hashlib does not give it out). A blob that is not what its name says
goes to quarantine.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from scheduling.errors import ModelStoreError
from storage.blobfiles import Progress, hash_file
from storage.blobs import STALE_S, Blobs
from storage.digest import Digest
from storage.manifest import Manifest

HASH_THREADS_MAX = 4


@dataclass(frozen=True)
class Damaged:
    """A manifest that cannot be read, or a blob that is not what its name says; `models` need it."""

    what: str
    why: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """What a verification found."""

    blobs: int
    hashed_bytes: int
    seconds: float
    damaged: tuple[Damaged, ...]


class _StoppedError(Exception):
    """Nobody waits for the result any more."""


class Verification:
    """Of blobs in `blobs`. `named` tells what the store's models need at the moment: some may be removed meanwhile."""

    def __init__(self, blobs: Blobs, named: Callable[[], set[Digest]], wall_clock: Callable[[], float]) -> None:
        self._blobs, self._named, self._clock = blobs, named, wall_clock
        self._notes = blobs.root / "partial" / "verified"

    def run(self, models: Iterable[Manifest], progress: Progress) -> Verified:
        """Hash all files of `models` that no earlier verification has finished."""
        sizes: dict[Digest, int] = {}
        needed_by: dict[Digest, list[str]] = {}
        for model in models:
            for file in model.files:
                sizes[file.digest] = file.size
                needed_by.setdefault(file.digest, []).append(str(model.name))
        began_s, done = time.monotonic(), self._finished()
        waiting = [digest for digest in sorted(sizes) if digest not in done]
        damaged: list[Damaged] = []
        total, stopped = 0, threading.Event()

        def heard(count: int) -> None:
            if stopped.is_set():
                raise _StoppedError
            progress(count)

        def check(digest: Digest) -> tuple[int, Damaged | None]:
            hashed, problem = self._check(digest, heard)
            if problem is None:
                self.note(digest)
                return hashed, None
            return hashed, replace(problem, models=tuple(dict.fromkeys(needed_by[digest])))

        threads = max(1, min(HASH_THREADS_MAX, os.cpu_count() or 1))
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(check, digest) for digest in waiting]
            try:
                for future in futures:
                    hashed, problem = future.result()
                    total += hashed
                    damaged += [problem] if problem is not None else []
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        with contextlib.suppress(OSError):  # where nobody may write, there is none of ours
            self._notes.unlink(missing_ok=True)
        return Verified(len(sizes), total, time.monotonic() - began_s, tuple(damaged))

    def _check(self, digest: Digest, progress: Progress) -> tuple[int, Damaged | None]:
        path = self._blobs.path(digest)
        try:
            self._blobs.has(digest)  # raises for a link: what it leads to is none of the store's
            with open(path, "rb", buffering=0) as file:
                opened = os.fstat(file.fileno())
                actual = hash_file(file.fileno(), progress)
        except FileNotFoundError:
            named = digest in self._named()
            if self._blobs.rescue(digest) or (named and self._blobs.has(digest)):
                return self._check(digest, progress)
            if not named:
                return 0, None  # removed meanwhile
            return 0, Damaged(str(digest), f"{path} is missing; add or pull the model again")
        except ModelStoreError as error:
            return 0, Damaged(str(digest), str(error))
        except OSError as error:
            return 0, Damaged(str(digest), f"{path} cannot be read: {error.strerror}")
        if actual == digest:
            return opened.st_size, None
        return self._put_away(path, digest, actual, opened, progress)

    def _put_away(
        self, path: Path, digest: Digest, actual: Digest, opened: os.stat_result, progress: Progress
    ) -> tuple[int, Damaged | None]:
        try:
            if not os.path.samestat(opened, path.lstat()):
                return self._check(digest, progress)  # somebody has put another one there meanwhile
            kept = self._blobs.quarantine(path, digest, actual)
        except (OSError, ModelStoreError) as error:
            return opened.st_size, Damaged(str(digest), f"{path} is {actual}, and could not be put away: {error}")
        return opened.st_size, Damaged(
            str(digest), f"it is {actual} and lies in {kept} now; add or pull the model again"
        )

    # ------------------------------------------------ what was done already

    def _finished(self) -> set[Digest]:
        """What a verification that was interrupted had found to be right, and nobody has touched since."""
        found: set[Digest] = set()
        with contextlib.suppress(OSError, ValueError):
            if self._clock() - self._notes.stat().st_mtime >= STALE_S:
                return found  # much may have happened to a disk since
            for line in self._notes.read_text(encoding="ascii").splitlines():
                text, _, when = line.partition(" ")
                with contextlib.suppress(ModelStoreError, OSError, ValueError):
                    digest = Digest.parse(text)
                    if self._blobs.path(digest).lstat().st_mtime_ns == int(when):
                        found.add(digest)
        return found

    def note(self, digest: Digest) -> None:
        """It is right; the next one need not look again, if this one is interrupted."""
        with contextlib.suppress(OSError):  # where nobody may write, it begins anew
            line = f"{digest} {self._blobs.path(digest).lstat().st_mtime_ns}\n"
            with open(self._notes, "a", encoding="ascii") as file:
                file.write(line)
