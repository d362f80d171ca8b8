"""Models by name and by content: the store of one machine, or of a file system that many share.

    manifests/<name>/<tag>.json   what a model is: `storage.manifest`
    manifests/<name>/<tag>.used   touched when it is used, for `gc`
    blobs/, partial/, quarantine/, trash/: `storage.blobs`
    views/<hex>/                  names under which llama.cpp finds the parts of a split model: links into blobs/

A model's files are checked before they are copied in (`storage.gguf`), hashed as they are copied, and named in a
manifest when they are all on disk.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scheduling.errors import ModelFileError, ModelStoreError
from storage.blobfiles import Progress, unusable, write_whole
from storage.blobs import Blobs, Ingested
from storage.digest import Digest, is_digest
from storage.files import OsDisk
from storage.gguf import GgufInfo, check_gguf
from storage.manifest import (
    MANIFEST_BYTES_MAX,
    Manifest,
    ModelName,
    StoredFile,
    manifest_of,
    suggested_name,
)
from storage.verifying import Damaged, Verification, Verified
from storage.views import Views

FACTS = (
    "architecture", "name", "parameters", "tensors", "context_tokens", "embedding_length", "blocks", "vocab_tokens",
    "quantization", "tokenizer", "tokenizer_pre", "chat_template_sha256",
)  # fmt: skip
"""Of `GgufInfo`: what a manifest keeps."""


def default_root(environment: Mapping[str, str]) -> Path:
    """Where models are kept: below $LLMPI_HOME, else the platform's place for data of programs."""
    if home := environment.get("LLMPI_HOME"):
        return Path(home).expanduser() / "models"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "llmpi" / "models"
    data = environment.get("XDG_DATA_HOME")
    base = Path(data) if data and os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "llmpi" / "models"


@dataclass(frozen=True)
class Collected:
    """What `ModelStore.gc` removed, or would remove. `problems`: files of models that it found to be no files."""

    models: tuple[ModelName, ...]
    blobs: int
    freed_bytes: int
    problems: tuple[str, ...] = ()


class ModelStore:
    """The store below `root`. Nothing is written until something is added."""

    def __init__(self, root: Path, wall_clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self.blobs = Blobs(root, wall_clock)
        self._views = Views(self.blobs)
        self._clock = wall_clock

    # ------------------------------------------------ looking

    def names(self) -> Iterator[ModelName]:
        """Of all manifests, by name. Folders that nobody lets us look into are passed over."""
        return self._names(lambda _: None)

    def _names(self, refused: Callable[[OSError], object]) -> Iterator[ModelName]:
        top = self.root / "manifests"
        for folder, folders, files in os.walk(top, onerror=refused):
            folders.sort()
            name = Path(folder).relative_to(top).as_posix()
            for file in sorted(files):
                if file.endswith(".json"):
                    with contextlib.suppress(ModelStoreError):  # nothing that we wrote
                        yield ModelName(name, file[: -len(".json")])

    def models(self) -> list[Manifest | Damaged]:
        """All models; manifests that cannot be read, and folders of them, are in the list as such."""
        found: list[Manifest | Damaged] = []
        refusals: list[OSError] = []
        for name in self._names(refusals.append):
            try:
                model = self._read(name)
            except ModelStoreError as error:
                found.append(Damaged(str(name), str(error)))
                continue
            if model is not None:  # else it was removed just now
                found.append(model)
        for refusal in refusals:
            if not isinstance(refusal, FileNotFoundError):
                found.append(Damaged(str(refusal.filename), str(unusable(Path(refusal.filename), refusal))))
        return found

    def read(self, name: ModelName) -> Manifest:
        """The manifest of `name`. Raises ModelStoreError: there is none, or it is damaged."""
        found = self._read(name)
        if found is None:
            raise self._unknown(str(name))
        return found

    def _read(self, name: ModelName) -> Manifest | None:
        """None if there is none. Raises ModelStoreError if it is damaged."""
        path = self._manifest_path(name)
        try:
            with open(path, "rb") as file:
                data = file.read(MANIFEST_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(path, error) from error
        if len(data) > MANIFEST_BYTES_MAX:
            raise ModelStoreError(f"{path} is no manifest: it is over {MANIFEST_BYTES_MAX:,} bytes")
        return manifest_of(data, name, path)

    def find(self, text: str) -> Manifest:
        """The model called `text`: NAME, NAME:TAG or sha256:…, of a model or of one of its files. Raises
        ModelStoreError."""
        if not is_digest(text):
            return self.read(ModelName.parse(text))
        digest = Digest.parse(text)
        models = [model for model in self.models() if isinstance(model, Manifest)]
        for model in models:
            if model.digest == digest:
                return model
        for model in models:
            if any(file.digest == digest for file in model.files):
                return model
        raise self._unknown(text)

    def path(self, model: Manifest) -> Path:
        """The file to load it from. Raises ModelStoreError if a blob is missing or of another size."""
        paths = [self.blobs.checked(file.digest, file.size) for file in model.files]
        return paths[0] if len(paths) == 1 else self._views.first_part(model.digest, paths)

    def problem(self, model: Manifest) -> str | None:
        """Why the model cannot be used: a file is lost, in quarantine or of another size. None if all are there.

        Nothing is read, let alone hashed: `verify` does that.
        """
        try:
            for file in model.files:
                self.blobs.checked(file.digest, file.size)
        except ModelStoreError as error:
            return str(error) if self._manifest_path(model.name).exists() else None  # else it was removed just now
        return None

    def use(self, model: Manifest) -> None:
        """Note that it is used. Where nobody may write, nothing is noted."""
        with contextlib.suppress(OSError):
            self._used_path(model.name).touch()

    def used_at(self, model: Manifest) -> float:
        """Seconds since 1970 of its last use, or of its adding."""
        for path in (self._used_path(model.name), self._manifest_path(model.name)):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return 0.0

    # ------------------------------------------------ adding

    def add(
        self,
        path: Path,
        *,
        name: ModelName | None = None,
        source: str | None = None,
        licence: str | None = None,
        parent: Digest | None = None,
        pinned: bool = False,
        link: bool = False,
        replace_other: bool = False,
        expected: Sequence[Digest | None] = (),
        file_names: Sequence[str] = (),
        progress: Progress = lambda _: None,
    ) -> Manifest:
        """Put the model at `path`, with all its parts if it is split, into the store.

        `expected`: what its files should be. `file_names`: what they were called, if not as they are now. `link`: give
        them a second name instead of copying, where that can be.

        Raises:
            ModelFileError: it is no model that can be used.
            ModelStoreError: another model has this name, a file is not what was expected, or there is no room.
        """
        info = check_gguf(path)
        called = name or suggested_name(_stem(path))
        ingested: list[Ingested] = []
        try:
            for place, part in enumerate(info.parts):
                promised = expected[place] if place < len(expected) else None
                ingested.append(self.blobs.ingest(part, expected=promised, link=link, progress=progress))
            names = file_names or [part.name for part in info.parts]
            files = tuple(
                StoredFile(one.digest, one.size, original) for one, original in zip(ingested, names, strict=True)
            )
            model = Manifest(
                name=called, files=files, created_at=_rfc3339(self._clock()), source=source or str(path.resolve()),
                licence=licence or info.license, pinned=pinned, parent=parent, gguf=facts(info),
            )  # fmt: skip
            return self._name(model, tuple(ingested), replace_other)
        finally:
            self.blobs.drop(tuple(ingested))

    def _name(self, model: Manifest, ingested: tuple[Ingested, ...], replace_other: bool) -> Manifest:
        """Write the manifest. If the same model has that name, that one stays."""
        there = self._same_name(model, replace_other)
        with self.blobs.announced([file.digest for file in model.files]):
            for one in ingested:
                self.blobs.put(one)
            if there is None or (model.pinned and not there.pinned):
                self._write(model if there is None else replace(there, pinned=True))
            self.blobs.settle(ingested)
        if len(model.files) > 1:
            with contextlib.suppress(ModelStoreError):  # removed again meanwhile
                self.path(model)  # its view is there for those who may not write
        return self._read(model.name) or model

    def _same_name(self, model: Manifest, replace_other: bool) -> Manifest | None:
        """The model that has this name already, if it is the same. Raises ModelStoreError if it is another one."""
        try:
            there = self.read(model.name)
        except ModelStoreError:
            if self._manifest_path(model.name).exists() and model.name not in set(self.names()):
                raise ModelStoreError(
                    f"{model.name} is the name of another model but for upper and lower case, which the file system of "
                    f"{self.root} does not tell apart; choose a --name"
                ) from None
            return None  # none, or a damaged one
        if there.digest == model.digest:
            return there
        if replace_other:
            return None
        raise ModelStoreError(
            f"{model.name} is another model already ({there.digest.short}…, from {there.source}); choose a --name, or "
            "give --replace"
        )

    def _write(self, model: Manifest) -> None:
        path = self._manifest_path(model.name)
        write_whole(self.blobs.scratch(), path, model.to_json())

    def pin(self, name: ModelName, pinned: bool) -> Manifest:
        """Have `gc` keep it, or no longer. Raises ModelStoreError."""
        model = replace(self.read(name), pinned=pinned)
        self._write(model)
        return model

    # ------------------------------------------------ removing

    def remove(self, name: ModelName) -> int:
        """Forget a model, and remove what no other one needs. Returns the bytes freed. Raises ModelStoreError."""
        path = self._manifest_path(name)
        if not path.exists():
            raise self._unknown(str(name))
        try:
            digests = [file.digest for file in self.read(name).files]
        except ModelStoreError:
            digests = []  # damaged: gc finds what it has left
        self._forget(name)
        return sum(self.blobs.collect(digest, self._referenced) for digest in digests)

    def _forget(self, name: ModelName) -> None:
        try:
            self._manifest_path(name).unlink(missing_ok=True)
            self._used_path(name).unlink(missing_ok=True)
        except OSError as error:
            raise unusable(self._manifest_path(name), error) from error
        top = self.root / "manifests"
        folders = [folder for folder in self._manifest_path(name).parents if folder.is_relative_to(top)]
        for folder in folders[:-1]:
            with contextlib.suppress(OSError):  # not empty, as a rule
                folder.rmdir()
        for folder in folders:
            # Before a file of the model goes: a power cut must not bring back what needs it.
            with contextlib.suppress(OSError):  # removed just now, or not ours to read
                OsDisk().sync_dir(folder)
                break

    def gc(self, keep_bytes: int | None = None, *, dry_run: bool = False) -> Collected:
        """Remove what no model needs, and with `keep_bytes` first the least recently used models, until the others take
        no more than that. Pinned models stay.

        Raises ModelStoreError if a manifest is damaged: who knows what it needs.
        """
        models = self._all()
        evicted: list[Manifest] = []
        if keep_bytes is not None:
            waiting = sorted((model for model in models if not model.pinned), key=self.used_at)
            while waiting and _bytes_of(models) > keep_bytes:
                evicted.append(waiting.pop(0))
                models = [model for model in models if model is not evicted[-1]]
            if not dry_run:
                for model in evicted:
                    self._forget(model.name)
        needed = {file.digest for model in models for file in model.files}
        count = freed = 0
        for digest, size in list(self.blobs):
            if digest in needed or digest in self.blobs.announcements():
                continue
            gone = size if dry_run else self.blobs.collect(digest, self._referenced)
            count, freed = count + bool(gone), freed + gone
        problems = self._put_back(needed, dry_run)
        if not dry_run:
            self._views.drop_others({model.digest for model in models})
        freed += self.blobs.sweep(dry_run=dry_run)
        return Collected(tuple(model.name for model in evicted), count, freed, problems)

    def _put_back(self, needed: set[Digest], dry_run: bool) -> tuple[str, ...]:
        """Put back blobs that a killed collection has left aside. Returns what is wrong with those that are there."""
        problems = []
        for digest in sorted(needed):
            try:
                if not self.blobs.has(digest) and not dry_run:
                    self.blobs.rescue(digest)
            except ModelStoreError as error:
                problems.append(str(error))
        return tuple(problems)

    def _all(self) -> list[Manifest]:
        models = []
        for model in self.models():
            if isinstance(model, Damaged):
                raise ModelStoreError(f"{model.why}. Until then nothing is collected, it may need any blob.")
            models.append(model)
        return models

    def _referenced(self) -> set[Digest]:
        """What any model needs. Raises ModelStoreError if a manifest is damaged."""
        return {file.digest for model in self._all() for file in model.files}

    def _named(self) -> set[Digest]:
        """What the models need whose manifests can be read."""
        return {file.digest for model in self.models() if isinstance(model, Manifest) for file in model.files}

    def verify(self, models: Iterable[Manifest], progress: Progress = lambda _: None) -> Verified:
        """Hash all files of `models` again: see `storage.verifying`."""
        return Verification(self.blobs, self._named, self._clock).run(models, progress)

    # ------------------------------------------------ paths

    def _manifest_path(self, name: ModelName) -> Path:
        return self.root / "manifests" / name.name / f"{name.tag}.json"

    def _used_path(self, name: ModelName) -> Path:
        return self.root / "manifests" / name.name / f"{name.tag}.used"

    def _unknown(self, text: str) -> ModelStoreError:
        some = [str(name) for _, name in zip(range(5), self.names(), strict=False)]
        there = f"it has {', '.join(some)}{', …' if len(some) == 5 else ''}" if some else "it is empty"
        return ModelStoreError(
            f"there is no model {text} in the store {self.root} ({there}); `llmpi models ls` lists them, `llmpi models "
            "add` and `llmpi models pull` bring one in"
        )


def facts(info: GgufInfo) -> dict[str, Any]:
    """What a manifest keeps of a model's header."""
    return {key: value for key in FACTS if (value := getattr(info, key)) is not None}


def one_model_in(folder: Path) -> Path:
    """The only model in a folder, its first part if it is split. Raises ModelFileError."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and os.path.isfile(path))
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be looked into: {error.strerror}") from error
    first = [path for path in found if "-of-" not in path.stem or path.stem.rsplit("-of-", 1)[0].endswith("-00001")]
    if len(first) == 1:
        return first[0]
    if not found:
        raise ModelFileError(f"{folder} holds no .gguf file")
    raise ModelFileError(f"{folder} holds {len(first)} models; name one: {', '.join(path.name for path in first[:10])}")


def _stem(path: Path) -> str:
    return path.stem.rsplit("-00001-of-", 1)[0]


def _bytes_of(models: Iterable[Manifest]) -> int:
    """What they take together; files that several need count once."""
    return sum({file.digest: file.size for model in models for file in model.files}.values())


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
