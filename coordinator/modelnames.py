"""What `-m` means: a file, or a model of the store by name or digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import ModelFileError, ModelStoreError
from storage.digest import is_digest
from storage.modelstore import ModelStore, default_root

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Named:
    """A model's file, what to call the model, and its digest if it is of the store."""

    path: Path
    name: str
    digest: str | None = None


def open_store(environment: Mapping[str, str] = os.environ) -> ModelStore:
    return ModelStore(default_root(environment))


def find_model(text: str, environment: Mapping[str, str] = os.environ) -> Named:
    """The file at `text`, if there is one, else the store's model of that name.

    Raises:
        ModelStoreError: a digest that is none, or that the store does not have.
        ModelFileError: neither a file nor a model of the store. What is plainly a path is not looked at here.
    """
    path = Path(text)
    if not is_digest(text) and (os.path.isfile(text) or path.is_absolute() or path.suffix.lower() == SUFFIX):
        return Named(path, path.stem)
    store = open_store(environment)
    try:
        model = store.find(text)
        found = Named(store.path(model), str(model.name), str(model.digest))
    except ModelStoreError as error:
        if is_digest(text):
            raise
        if os.path.exists(text) or text.startswith("."):
            return Named(path, path.stem)  # a folder, say: whoever reads it says what is wrong
        raise ModelFileError(f"there is no file {text}, and {error}") from None
    store.use(model)
    return found
