"""Pulls from a `Site`, and what has come of them."""

from __future__ import annotations

from pathlib import Path

from storage.sources import Pulled, pull
from tests.storage.sources.site import Site, gguf, patience

MODEL = gguf()


def pull_from(site: Site, scratch: Path, path: str = "/model.gguf", **options: object) -> Pulled:
    return pull(site.url(path), scratch, patience=patience(), **options)  # type: ignore[arg-type]


def content_of(pulled: Pulled) -> bytes:
    (file,) = pulled.files
    return file.path.read_bytes()


def kept_bytes(scratch: Path) -> int:
    """Bytes of the one partial file in scratch."""
    (path,) = scratch.glob("*.partial")
    return path.stat().st_size
