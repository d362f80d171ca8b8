"""What tests ask of a model store on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

from storage.digest import Digest
from storage.modelstore import ModelStore


def digest_of(path: Path) -> Digest:
    return Digest(hashlib.sha256(path.read_bytes()).hexdigest())


def files_of(store: ModelStore, folder: str) -> list[str]:
    top = store.root / folder
    return sorted(path.name for path in top.iterdir()) if top.is_dir() else []
