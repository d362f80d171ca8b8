"""`s3://…`, `gs://…` and what else fsspec knows: a file in an object store, all parts of it if it is split.

fsspec (extra `objects`) and the package for the store (s3fs, gcsfs, …) bring the credentials and the protocol. The file
comes in pieces, each asked for by its offset, so that a broken pull goes on where it stood. What the store says of the
file (ETag, version, date, size) must be the same before, after, and when a pull goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from scheduling.errors import ModelSourceError
from storage.sources.job import Failures, Fetched, Job, Patience, Pulled, Sum, TransientError, stem_of
from storage.sources.partial import Partial
from storage.sources.splits import parts_of

PIECE_BYTES = 1 << 24
_LOCAL = ("file://", "memory://")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_MARKS = ("ETag", "etag", "VersionId", "version_id", "generation", "LastModified", "last_modified", "updated", "mtime")

T = TypeVar("T")


def pull(job: Job) -> Pulled:
    """Fetch what a URL of an object store names."""
    if "::" in job.source or "?" in job.source:
        raise ModelSourceError(f"{job.shown}: chained addresses and those with options are not taken. Name one file.")
    if not job.source.lower().startswith(_LOCAL):
        job.refuse_offline()
    system, path = _open(job)
    names = parts_of(path)
    marks = [_mark(job, system, name) for name in names]
    total = sum(size for _, size in marks)
    job.check_total(total)
    added = Sum(job, total)
    files = tuple(_fetch(job, system, name, *mark, added) for name, mark in zip(names, marks, strict=True))
    return Pulled(files, job.shown, None, stem_of(names[0]))


def _open(job: Job) -> tuple[Any, str]:
    """The file system, and the file's path in it."""
    scheme = job.source.partition(":")[0].lower()
    try:
        import fsspec.core
    except ImportError as error:
        raise ModelSourceError(
            f"{job.shown} needs the package fsspec, which is not installed: pip install 'llmpi[objects]'."
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(scheme + job.source[len(scheme) :])
        # What it remembers of an earlier listing may be old.
        system.invalidate_cache()
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"pip install {package}" if package else str(error)
        raise ModelSourceError(
            f"{job.shown} needs a package for {scheme}://, which is not installed: {advice}."
        ) from error
    except Exception as error:
        raise ModelSourceError(f"{job.shown} cannot be opened ({type(error).__name__}: {error}).") from error
    if not stem_of(path) or path.endswith("/"):
        raise ModelSourceError(f"{job.shown} names no file.")
    return system, path


def _mark(job: Job, system: Any, path: str) -> tuple[str, int]:
    """What tells one version of a file from another, and its size in bytes."""
    info = _patiently(job, path, lambda: system.info(path))
    size = info.get("size")
    if info.get("type") == "directory" or not isinstance(size, int):
        raise ModelSourceError(f"{job.shown}: {path} is no file, or its size is not known.")
    return repr([(mark, str(info[mark])) for mark in _MARKS if info.get(mark) is not None]), size


def _fetch(job: Job, system: Any, path: str, mark: str, size: int, added: Sum) -> Fetched:
    target = job.partial_path(path)
    with Partial(target, added.read_again) as partial:
        if (partial.validator, partial.total) != (mark, size):
            partial.restart()
        if size - partial.size > (space := partial.space_bytes()):
            raise ModelSourceError(
                f"{job.shown} needs {size - partial.size:,} bytes more, and {target.parent} has {space:,} left. "
                "Make room."
            )
        partial.expect(mark, size)
        added.grow(partial.size, size, last=False)
        while partial.size < size:
            partial.write(_piece(job, system, path, partial.size, min(PIECE_BYTES, size - partial.size)), job.shown)
            added.grow(partial.size, size, last=False)
        if _mark(job, system, path) != (mark, size):
            partial.restart()
            raise ModelSourceError(f"{job.shown}: {path} was changed while it was fetched. Pull again.")
        digest = partial.finish(job.shown)
        added.close(partial.size)
    return Fetched(target, path.rsplit("/", 1)[-1], digest=digest)


def _piece(job: Job, system: Any, path: str, start: int, length: int) -> bytes:
    """Bytes `start` to `start + length` of a file; a piece of another length is asked for again."""

    def read() -> bytes:
        piece = system.cat_file(path, start=start, end=start + length)
        if len(piece) != length:
            raise TransientError(f"the store sent {len(piece):,} bytes instead of {length:,}")
        return bytes(piece)

    return _patiently(job, path, read, start)


def _patiently(job: Job, path: str, call: Callable[[], T], size: int = 0) -> T:
    """What `call` returns, tried again after what may pass. Raises ModelSourceError."""
    failures = Failures(job.patience, job.shown, size)
    while True:
        try:
            return _in_time(call, job.patience)
        except TransientError as error:
            failures.wait(error, size)
        except FileNotFoundError as error:
            raise ModelSourceError(f"{job.shown}: {path} is not there. Check the address.") from error
        except PermissionError as error:
            raise ModelSourceError(f"{job.shown}: {path} may not be read ({error}). Check the credentials.") from error
        except Exception as error:
            # Each store has errors of its own.
            if "credential" in f"{type(error).__name__} {error}".lower():
                raise ModelSourceError(f"{job.shown}: no credentials ({error}). Set up those of the store.") from error
            failures.wait(TransientError(f"the store fails ({type(error).__name__}: {error})"), size)


def _in_time(call: Callable[[], T], patience: Patience) -> T:
    """Run `call` in a thread that nobody waits for at the end: some stores' clients know no time-out.

    A piece of 16 MiB gets four times the patience for a read, that is 0.14 MB/s by default.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="llmpi-fetch", daemon=True)
    thread.start()
    thread.join(4 * patience.stall_s)
    if thread.is_alive():
        raise TransientError(f"nothing came for {4 * patience.stall_s:.0f} s")
    if failed:
        raise failed[0]
    return done[0]
