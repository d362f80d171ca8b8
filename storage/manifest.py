"""What the store knows of a model: a small JSON file, which names its blobs.

A model is called NAME or NAME:TAG. Names are one to three parts of letters, digits, '.', '_' and '-' between '/'.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scheduling.errors import ModelStoreError
from storage.digest import ALGORITHM, Digest

SCHEMA = 1
MEDIA_TYPE = "application/vnd.llmpi.model.manifest.v1+json"
GGUF_TYPE = "application/vnd.llmpi.model.gguf"
LATEST = "latest"
NAME_CHARACTERS_MAX = 128
MANIFEST_BYTES_MAX = 1 << 20
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_PARTS_MAX = 3
_ENDS = (".json", ".used", ".gguf")
"""Of no part of a name: the first two are those of the store's own files, the last says that a path is meant."""


@dataclass(frozen=True, order=True)
class ModelName:
    """NAME:TAG, well-formed: each part is a file name, none of them hidden. `sha256` is what digests begin with."""

    name: str
    tag: str = LATEST

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        whole = all(_PART.fullmatch(part) and not part.lower().endswith(_ENDS) for part in (*parts, self.tag))
        if (
            not whole
            or self.name == ALGORITHM
            or len(parts) > _PARTS_MAX
            or len(self.name) + len(self.tag) > NAME_CHARACTERS_MAX
        ):
            raise ModelStoreError(
                f"{f'{self.name}:{self.tag}'!r:.200} is no name of a model: use letters, digits, '.', '_' and '-', as "
                f"in llama-3.2-1b:q8_0 (no part may end with {', '.join(_ENDS)}, and none is called {ALGORITHM})"
            )

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Of 'NAME' or 'NAME:TAG'. Raises ModelStoreError."""
        name, _, tag = text.partition(":")
        return cls(name, tag if ":" in text else LATEST)

    def __str__(self) -> str:
        return self.name if self.tag == LATEST else f"{self.name}:{self.tag}"


def suggested_name(stem: str) -> ModelName:
    """A name for a file: its own, in lower case, with what a name cannot have left out."""
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[: NAME_CHARACTERS_MAX - len(LATEST)]
    while name.endswith(_ENDS):
        name = name.rpartition(".")[0].rstrip("-._")
    return ModelName("model" if name in ("", ALGORITHM) else name)


@dataclass(frozen=True)
class StoredFile:
    """One file of a model. `name`: what it was called."""

    digest: Digest
    size: int
    name: str
    media_type: str = GGUF_TYPE


@dataclass(frozen=True)
class Manifest:
    """A model of the store. `gguf`: what its header says, as plain values. `parent`: what it was quantised from."""

    name: ModelName
    files: tuple[StoredFile, ...]
    created_at: str
    source: str
    licence: str | None = None
    pinned: bool = False
    parent: Digest | None = None
    gguf: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> Digest:
        """The model's: of its file, or of the list of its files' digests if there are several."""
        if len(self.files) == 1:
            return self.files[0].digest
        return Digest.of(hashlib.sha256("".join(f"{file.digest}\n" for file in self.files).encode()))

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def to_json(self) -> bytes:
        state = asdict(self) | {
            "schema": SCHEMA,
            "media_type": MEDIA_TYPE,
            "name": self.name.name,
            "tag": self.name.tag,
            "digest": str(self.digest),
            "size": self.size,
            "parent": None if self.parent is None else str(self.parent),
            "files": [asdict(file) | {"digest": str(file.digest)} for file in self.files],
            "gguf": dict(self.gguf),
        }
        text = json.dumps(state, indent=1, sort_keys=True, ensure_ascii=False)
        return (text + "\n").encode(errors="replace")  # a path need not be text


def manifest_of(data: bytes, name: ModelName, where: object) -> Manifest:
    """What `data` says of the model `name`. Raises ModelStoreError if it is no manifest, or of another model."""
    try:
        state = json.loads(data)
        newer = state["schema"] > SCHEMA
        found = None if newer else _manifest(state)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelStoreError) as error:
        raise ModelStoreError(
            f"{where} is damaged ({type(error).__name__}: {error}); remove the model and add it again"
        ) from error
    if found is None:
        raise ModelStoreError(f"{where} was written by a newer version of llmpi; update this one")
    if found.name != name or not found.files or str(found.digest) != state.get("digest"):
        raise ModelStoreError(f"{where} is damaged: it is not what was written for {name}; add the model again")
    return found


def _manifest(state: dict[str, Any]) -> Manifest:
    return Manifest(
        name=ModelName(state["name"], state["tag"]),
        files=tuple(
            StoredFile(Digest.parse(file["digest"]), _size(file["size"]), str(file["name"]), str(file["media_type"]))
            for file in state["files"]
        ),
        created_at=str(state["created_at"]),
        source=str(state["source"]),
        licence=None if state["licence"] is None else str(state["licence"]),
        pinned=bool(state["pinned"]),
        parent=None if state["parent"] is None else Digest.parse(state["parent"]),
        gguf=dict(state["gguf"]),
    )


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a size of {value!r}")
    return value
