"""What all sources share: the types of `pull`, names in scratch, what may be said aloud, sums over several files."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from scheduling.errors import ModelSourceError

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes that are there, and how many there will be if that is known."""

_SECRET_WORDS = ("sig", "token", "key", "secret", "passw", "credential", "auth")


class WrongBytesError(ModelSourceError):
    """A file came whole, and is not what its source promised. It lies at `path` in scratch, for whoever takes it."""

    def __init__(self, what: str, path: Path, *, promised: str, actual: str) -> None:
        super().__init__(f"{what} has the SHA-256 {actual}, not {promised} as promised: refused.")
        self.path, self.promised, self.actual = path, promised, actual


@dataclass(frozen=True)
class Fetched:
    """One file.

    `path` is in scratch, or with `adopt` a file of another program's store, which may be hard-linked or copied but
    neither moved nor changed. `name` is its original name. `sha256` is what the source promises (hexadecimal); a file
    in scratch has been checked against it. `digest` is the SHA-256 that was computed while the bytes came; None if they
    have not been read.
    """

    path: Path
    name: str
    sha256: str | None = None
    adopt: bool = False
    digest: str | None = None


@dataclass(frozen=True)
class Pulled:
    """A model: its files (the parts of a split GGUF in order), and where it is from.

    `source` says again what was asked for, pinned as far as the source allows (`hf:ORG/REPO@COMMIT:FILE`), without
    secrets. `notes` are sentences for the person who pulled.
    """

    files: tuple[Fetched, ...]
    source: str
    licence: str | None
    suggested_name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for.

    A read that brings less than `slow_bytes` in `stall_s` seconds is broken off. What may pass by itself is tried again
    after `backoff_s`, then twice that, and so on, up to `attempts` times without `renew_bytes` more than ever before.
    """

    stall_s: float = 30.0
    slow_bytes: int = 4096
    attempts: int = 6
    backoff_s: float = 1.0
    wait_max_s: float = 120.0
    renew_bytes: int = 1 << 24
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class TransientError(Exception):
    """Something that may pass by itself. `wait_s` is how long the other side asks to be left alone."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Failures:
    """Counts what went wrong in a row, and waits. In a row means: without bytes that were never there before."""

    def __init__(self, patience: Patience, shown: str, best: int = 0) -> None:
        self._patience, self._shown, self._best = patience, shown, best
        self._count = 0

    def wait(self, error: TransientError, size: int = 0) -> None:
        """Wait before the next attempt; ModelSourceError if it was the last one. `size` is what is there in bytes."""
        patience = self._patience
        if size >= self._best + patience.renew_bytes:
            self._best, self._count = size, 0
        self._count += 1
        kept = "What came is kept: pull again to go on." if size else "Pull again later."
        if self._count >= patience.attempts:
            raise ModelSourceError(f"{self._shown}: {error} ({self._count} attempts). {kept}") from error
        if error.wait_s > patience.wait_max_s:
            raise ModelSourceError(
                f"{self._shown}: {error}, and asks to be left alone for {error.wait_s:.0f} s. {kept}"
            ) from error
        patience.sleep(max(error.wait_s, patience.backoff_s * 2 ** (self._count - 1)))


def no_progress(done_bytes: int, total_bytes: int | None) -> None:
    """Say nothing."""


def key_of(source: str) -> str:
    """What the names of a source's files in scratch begin with."""
    return "pull-" + hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:20]


@dataclass(frozen=True)
class Job:
    """One pull: what was asked, and how. `shown` is the source as it may be printed and recorded."""

    source: str
    scratch: Path
    progress: Progress = no_progress
    max_bytes: int | None = None
    offline: bool = False
    patience: Patience = field(default_factory=Patience)

    @property
    def shown(self) -> str:
        return without_secrets(self.source)

    @property
    def rest(self) -> str:
        """The source without its prefix."""
        return self.source.partition(":")[2]

    @property
    def lock_path(self) -> Path:
        return self.scratch / f"{key_of(self.source)}.lock"

    def partial_path(self, name: str) -> Path:
        """Where the file `name` of this source grows: the same place in each pull of it."""
        part = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return self.scratch / f"{key_of(self.source)}-{part}.partial"

    def refuse_offline(self) -> None:
        """Raise ModelSourceError if the network may not be touched."""
        if self.offline:
            raise ModelSourceError(
                f"{self.shown} needs the network, and this pull is offline. Pull it where there is a network, and add "
                "the file here by its path."
            )

    def check_total(self, total_bytes: int) -> None:
        """Raise ModelSourceError if a model of `total_bytes` is over the cap."""
        if self.max_bytes is not None and total_bytes > self.max_bytes:
            raise ModelSourceError(
                f"{self.shown} has {total_bytes:,} bytes, over the limit of {self.max_bytes:,}. Raise the limit to "
                "have it."
            )


class Sum:
    """Progress and the cap over the files of one model, of which one grows at a time."""

    def __init__(self, job: Job, total_bytes: int | None = None) -> None:
        self._job, self._total, self._before = job, total_bytes, 0

    @property
    def room(self) -> int | None:
        """How many bytes the file that grows may have; None if there is no limit."""
        return None if self._job.max_bytes is None else self._job.max_bytes - self._before

    def grow(self, done: int, file_total: int | None, last: bool) -> None:
        """The file that grows has `done` bytes. Its own total is the model's if it is the last."""
        total = self._total
        if total is None and last and file_total is not None:
            total = self._before + file_total
        self._job.progress(self._before + done, total)

    def read_again(self, done: int) -> None:
        """Of the file that grows `done` bytes of an earlier pull have been read, for its digest."""
        self._job.progress(self._before + done, self._total)

    def close(self, size: int) -> None:
        """The file that grew is whole."""
        self._before += size


def check_start(data: bytes, what: str) -> None:
    """Refuse what does not begin like a GGUF. `data` are its first four bytes or more."""
    if data[:4] != b"GGUF":
        looks = " It looks like a web page: is a login or a consent needed?" if data.lstrip()[:1] == b"<" else ""
        raise ModelSourceError(f"{what} is no GGUF file: it begins with {bytes(data[:8])!r}.{looks}")


def check_adopted(path: Path, root: Path, what: str) -> Path:
    """The plain file behind `path`, links resolved. ModelSourceError if it lies outside `root` or is no GGUF."""
    try:
        real, top = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelSourceError(f"{what}: {path} cannot be opened ({error}).") from error
    if not real.is_relative_to(top):
        raise ModelSourceError(
            f"{what}: {path} leads out of {root}, to {real}, and is not followed. Add that file by its path instead."
        )
    if not real.is_file():
        raise ModelSourceError(f"{what}: {real} is no plain file.")
    with real.open("rb") as file:
        check_start(file.read(8), f"{what} ({real})")
    return real


def is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def without_secrets(source: str) -> str:
    """A source as it may be printed: passwords and signatures in its URL replaced."""
    prefix, _, rest = source.partition(":")
    if not rest.startswith("//"):
        return source
    try:
        parts = urlsplit(source)
        userinfo, at, host = parts.netloc.rpartition("@")
    except ValueError:
        return f"{prefix}://…"
    fields = [
        f"{item.partition('=')[0]}=…" if _secret(item.partition("=")[0]) else item for item in parts.query.split("&")
    ]
    return urlunsplit(
        (parts.scheme, f"…@{host}" if at and userinfo else host, parts.path, "&".join(fields), parts.fragment)
    )


def _secret(name: str) -> bool:
    return any(word in name.lower() for word in _SECRET_WORDS)


def stem_of(name: str) -> str:
    """A name for a model from its file's: without folders, ending, and the number of a part."""
    stem = name.rsplit("/", 1)[-1]
    stem = re.sub(r"\.gguf$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem) or "model"
