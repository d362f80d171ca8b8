"""Names under which llama.cpp finds the parts of a split model: links into the folder of blobs, made when needed.

views/<hex>/model-00001-of-00003.gguf   hex is the model's digest
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from storage.blobfiles import MOVES_MAX, unusable
from storage.blobs import Blobs
from storage.digest import Digest


class Views:
    """Those of the store that `blobs` belong to."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._root = blobs.root / "views"

    def first_part(self, model: Digest, paths: Sequence[Path]) -> Path:
        """The name of the first of `paths`, under which the others are found. Raises ModelStoreError."""
        folder = self._root / model.hex
        links = [folder / f"model-{place:05d}-of-{len(paths):05d}.gguf" for place in range(1, len(paths) + 1)]
        try:
            for _ in range(MOVES_MAX):
                with contextlib.suppress(
                    FileNotFoundError, FileExistsError
                ):  # a collection removes views of models just removed
                    self._link(links, paths)
                    return links[0]
            self._link(links, paths)
        except OSError as error:
            raise unusable(folder, error) from error
        return links[0]

    def _link(self, links: Sequence[Path], paths: Sequence[Path]) -> None:
        for link, path in zip(links, paths, strict=True):
            target = os.path.relpath(path, link.parent)
            if not link.is_symlink() or os.readlink(link) != target:
                link.parent.mkdir(parents=True, exist_ok=True)
                fd, temporary = self._blobs.scratch()
                os.close(fd)
                temporary.unlink()
                temporary.symlink_to(target)
                try:
                    os.replace(temporary, link)
                except OSError:
                    temporary.unlink(missing_ok=True)
                    raise

    def drop_others(self, needed: set[Digest]) -> None:
        """Remove those of models that are not `needed`, as far as that is allowed."""
        names = {digest.hex for digest in needed}
        with contextlib.suppress(OSError):
            for folder in list(self._root.iterdir()):
                if folder.name not in names:
                    for link in list(folder.iterdir()):
                        link.unlink()
                    folder.rmdir()
