"""What is staged, as ranks tell it each other, and what came of it, as it is told to people and kept in run.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.digest import Digest
from storage.stagedir import StageFile


@dataclass(frozen=True)
class Model:
    """A model that rank 0 can read. `key` names it where no store does: path, size and time of change of its files."""

    role: str
    name: str
    files: tuple[StageFile, ...]
    digest: str | None = None
    key: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def model_of(role: str, name: str, files: Sequence[tuple[Path, Digest | None]], digest: str | None) -> Model:
    """Raises OSError if a file cannot be looked at."""
    hashed, found = hashlib.sha256(), []
    for path, known in files:
        real = os.path.realpath(path)
        stat = os.stat(real)
        hashed.update(f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        found.append(StageFile(real, stat.st_size, known))
    return Model(role, name, tuple(found), digest, hashed.hexdigest())


# ---------------------------------------------------------------- messages


def as_message(model: Model) -> dict[str, Any]:
    files = [[file.path, file.size, None if file.digest is None else str(file.digest)] for file in model.files]
    return {"role": model.role, "name": model.name, "files": files, "digest": model.digest, "key": model.key}


def of_message(said: Mapping[str, Any]) -> Model:
    files = tuple(
        StageFile(path, size, None if text is None else Digest.parse(text)) for path, size, text in said["files"]
    )
    return Model(said["role"], said["name"], files, said["digest"], said["key"])


# ---------------------------------------------------------------- what came of it


@dataclass(frozen=True)
class Reading:
    """What rank 0 has read of the source, and how long the calls took that read it."""

    bytes: int = 0
    seconds: float = 0.0


def facts_of(
    model: Model, places: Mapping[int, Mapping[str, Any]], received: int, seconds: float, read: Reading
) -> dict[str, Any]:
    """Figures of one model. `reads_saved`: of a read on each node, those that were not needed; the node that loads it
    from where it is does read it. `saved_s`: what it would take all nodes to read the file from the source, if that
    gave them together what it gave one reader, less what staging took."""
    nodes = len(places)
    direct = sum(bool(place["direct"]) for place in places.values())
    return {
        "role": model.role, "model": model.name, "digest": model.digest, "source": model.files[0].path,
        "bytes": model.size, "source_bytes_read": read.bytes, "read_s": round(read.seconds, 3),
        "nodes": nodes, "nodes_staged": received,
        "nodes_direct": direct,
        "seconds": round(seconds, 3), "bytes_per_s": round(read.bytes / seconds) if read.bytes else None,
        "reads_saved": nodes - (1 if received or direct else 0),
        "saved_s": round(max(0.0, nodes * read.seconds - seconds), 1) if received else None,
        "folders": sorted({str(place["folder"]) for place in places.values() if not place["direct"]}),
    }  # fmt: skip


def told_as_line(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    nodes, had = facts["nodes_staged"], facts["nodes"] - facts["nodes_staged"] - facts["nodes_direct"]
    size = f"{facts['bytes'] / 1e9:.1f} GB" if facts["bytes"] >= 1e8 else f"{facts['bytes'] / 1e6:.1f} MB"
    if not nodes:
        return f"{facts['model']} ({size}) is on {_nodes(facts['nodes'])} already: nothing was read"
    reads = facts["reads_saved"]
    saved = f", {reads} read{'' if reads == 1 else 's'} saved" if reads else ""
    saved += f", about {facts['saved_s']:.1f} s" if facts["saved_s"] else ""
    there = f"; {_nodes(had)} had it" if had else ""
    rate = (facts["bytes_per_s"] or 0) / 1e9
    return f"staged {size} to {_nodes(nodes)} in {facts['seconds']:.1f} s ({rate:.2f} GB/s; read once{saved}){there}"


def _nodes(count: int) -> str:
    return f"{count} node{'' if count == 1 else 's'}"
