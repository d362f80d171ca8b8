"""What `-m` means: a file, or a model of the store by name or digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import ModelFileError, ModelStoreError
from storage.digest import Digest, is_digest
from storage.ggufparts import named_part, part_names
from storage.modelstore import ModelStore, default_root

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Named:
    """A model's file, what to call the model, and its digest if it is of the store.

    `blobs`: of a model of the store, each file with its digest.
    """

    path: Path
    name: str
    digest: str | None = None
    blobs: tuple[tuple[Path, Digest], ...] = ()

    def files(self) -> tuple[tuple[Path, Digest | None], ...]:
        """All files of the model, with their digests where the store knows them. Nothing is opened."""
        if self.blobs:
            return self.blobs
        named = named_part(self.path)
        return tuple((path, None) for path in (part_names(self.path, named[1]) if named else (self.path,)))


def open_store(environment: Mapping[str, str] = os.environ) -> ModelStore:
    return ModelStore(default_root(environment))


def find_model(text: str, environment: Mapping[str, str] = os.environ) -> Named:
    """The file at `text`, if there is one, else the store's model of that name.

    Raises:
        ModelStoreError: a digest that is none, or that the store does not have; a model that it has lost files of.
        ModelFileError: neither a file nor a model of the store. What is plainly a path is not looked at here.
    """
    path = Path(text)
    if _is_path(text):
        return Named(path, path.stem)
    store = open_store(environment)
    try:
        model = store.find(text)
    except ModelStoreError as error:
        if is_digest(text):
            raise
        if os.path.exists(text) or text.startswith("."):
            return Named(path, path.stem)  # a folder, say: whoever reads it says what is wrong
        # Of a name that cannot be one, the store says other things.
        said = str(error).removeprefix("there is ")
        raise ModelFileError(f"there is no file {text}, and {said}") from None
    blobs = tuple((store.blobs.path(file.digest), file.digest) for file in model.files)
    found = Named(store.path(model), str(model.name), str(model.digest), blobs)
    store.use(model)
    return found


def whole_name(text: str, folder: Path) -> str:
    """What means the same from anywhere as `text` does in `folder`."""
    return str(folder / text) if _is_path(text, folder) else text


def _is_path(text: str, folder: Path = Path()) -> bool:
    path = folder / text
    return not is_digest(text) and (os.path.isfile(path) or Path(text).is_absolute() or path.suffix.lower() == SUFFIX)
