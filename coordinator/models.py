"""What `llmpi models …` does and prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from coordinator.bytesdone import BytesDone
from coordinator.modelnames import open_store
from coordinator.terminal import console_for
from scheduling.errors import EXIT_OK, EXIT_SOME_FAILED, ModelSourceError, ModelStoreError
from scheduling.wording import printable
from storage.digest import Digest
from storage.manifest import Manifest, ModelName, suggested_name
from storage.modelstore import ModelStore, one_model_in
from storage.sources import WrongBytesError, discard, pull
from storage.verifying import Damaged

UNUSABLE = "cannot be used"
"""Beside the name of a model that has lost a file."""


def add_model(
    path: Path, name: str | None, licence: str | None, *, link: bool, pin: bool, replace: bool, as_json: bool
) -> int:
    """Raises UserError if it cannot be added."""
    store = open_store()
    file = one_model_in(path) if os.path.isdir(path) else path
    called = None if name is None else ModelName.parse(name)
    with BytesDone(f"adding {file.name}", None) as progress:
        model = store.add(
            file, name=called, licence=licence, pinned=pin, link=link, replace_other=replace, progress=progress.more
        )
    return told(store, model, as_json)


def pull_model(
    source: str, name: str | None, *, max_bytes: int | None, offline: bool, pin: bool, replace: bool, as_json: bool
) -> int:
    """Raises UserError if it cannot be had."""
    store = open_store()
    called = None if name is None else ModelName.parse(name)
    scratch = store.blobs.folder("pulls")
    with BytesDone(f"pulling {source}", None) as progress:
        try:
            pulled = pull(source, scratch, progress=progress.at, max_bytes=max_bytes, offline=offline)
        except WrongBytesError as error:
            try:
                kept = store.blobs.quarantine(error.path, Digest(error.promised), Digest(error.actual))
            except ModelStoreError as unkept:
                raise ModelSourceError(f"{error} It is still {error.path}: {unkept}") from error
            raise ModelSourceError(
                f"{error} It lies in {kept}. Pull again, or see whether the file has been changed."
            ) from error
    for note in pulled.notes:
        print(f"llmpi: {note}", file=sys.stderr)
    with _under_names_of_parts(store, [file.path for file in pulled.files]) as path:
        model = store.add(
            path, name=called or suggested_name(pulled.suggested_name), source=pulled.source, licence=pulled.licence,
            pinned=pin, link=True, replace_other=replace, file_names=[file.name for file in pulled.files],
            expected=[None if file.sha256 is None else Digest(file.sha256) for file in pulled.files],
        )  # fmt: skip
    discard(source, scratch)
    return told(store, model, as_json)


@contextmanager
def _under_names_of_parts(store: ModelStore, paths: list[Path]) -> Iterator[Path]:
    """The first of `paths`; of several, under names by which the others are found."""
    if len(paths) == 1:
        yield paths[0]
        return
    with store.blobs.scratch_folder("parts-") as folder:
        links = [folder / f"model-{place:05d}-of-{len(paths):05d}.gguf" for place in range(1, len(paths) + 1)]
        for link, path in zip(links, paths, strict=True):
            link.symlink_to(path.absolute())
        yield links[0]


def told(store: ModelStore, model: Manifest, as_json: bool) -> int:
    """Print what has come into the store."""
    if as_json:
        print(json.dumps(as_data(store, model)))
    else:
        print(f"{model.name}  {model.digest}  {size_text(model.size)}")
    return EXIT_OK


def list_models(as_json: bool) -> int:
    store = open_store()
    found = store.models()
    listed = [(model, as_data(store, model)) for model in found if isinstance(model, Manifest)]
    damaged = [model for model in found if isinstance(model, Damaged)]
    damaged += [Damaged(str(model.name), data["problem"]) for model, data in listed if data["problem"]]
    if as_json:
        print(json.dumps([data for _, data in listed]))
    elif not found:
        print(f"no models in {store.root}; `llmpi models add FILE` and `llmpi models pull SOURCE` bring one in")
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("name", "size", "parameters", "type", "context", "digest", "last used"):
            right = column in ("size", "parameters", "context")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for model, data in listed:
            facts = model.gguf
            marks = ", ".join(mark for mark, set_ in ((UNUSABLE, data["problem"]), ("pinned", model.pinned)) if set_)
            table.add_row(
                f"{model.name}{f' ({marks})' if marks else ''}", size_text(model.size),
                _count(facts.get("parameters")), _plain(facts.get("quantization") or ""),
                _count(facts.get("context_tokens")), model.digest.short, _when(data["used_at"]),
                style="red" if data["problem"] else None,
            )  # fmt: skip
        console_for(sys.stdout).print(table)
    for one in damaged:
        print(f"llmpi: {one.what}: {one.why}", file=sys.stderr)
    return EXIT_SOME_FAILED if damaged else EXIT_OK


def show_model(name: str, as_json: bool) -> int:
    """Raises ModelStoreError if there is none."""
    store = open_store()
    model = store.find(name)
    data = as_data(store, model)
    if as_json:
        print(json.dumps(data))
        return EXIT_OK
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {key: value for key, value in data.items() if key not in ("files", "gguf") and value is not None}
    for key, value in {**rows, **{f"gguf {key}": value for key, value in data["gguf"].items()}}.items():
        table.add_row(key, _plain(_SHOWN.get(key, str)(value)))
    for file in data["files"]:
        table.add_row("file", _plain(f"{file['name']}  {size_text(file['size'])}  {file['digest']}"))
    console_for(sys.stdout).print(table)
    return EXIT_OK


def _plain(value: object) -> Text:
    """What others have written, as it is: no markup, and nothing that a terminal obeys."""
    return Text(printable(value))


def verify_models(names: list[str], as_json: bool) -> int:
    """Raises ModelStoreError for a name that is none."""
    store = open_store()
    found = [store.find(name) for name in names] if names else store.models()
    models = [model for model in found if isinstance(model, Manifest)]
    damaged = [model for model in found if isinstance(model, Damaged)]
    total = sum({file.digest: file.size for model in models for file in model.files}.values())
    with BytesDone("verifying", total) as progress:
        result = store.verify(models, progress.more)
    damaged += result.damaged
    speed = result.hashed_bytes / 1e9 / result.seconds if result.seconds else 0.0
    if as_json:
        data = {
            "files": result.blobs, "hashed_bytes": result.hashed_bytes, "seconds": result.seconds,
            "gigabytes_per_s": speed,
            "damaged": [{"what": one.what, "why": one.why, "models": list(one.models)} for one in damaged],
        }  # fmt: skip
        print(json.dumps(data))
    else:
        hashed = f"{size_text(result.hashed_bytes)} hashed at {speed:.2f} GB/s"
        print(f"{_files(result.blobs)}, {hashed}, {len(damaged)} damaged")
    for one in damaged:
        print(
            f"llmpi: {': '.join([*([', '.join(one.models)] if one.models else []), one.what, one.why])}",
            file=sys.stderr,
        )
    return EXIT_SOME_FAILED if damaged else EXIT_OK


def remove_models(names: list[str], as_json: bool) -> int:
    """Raises ModelStoreError for the first name that is none; none is removed then."""
    store = open_store()
    known = {str(name) for name in store.names()}
    # By name also where the manifest cannot be read.
    found = [
        ModelName.parse(name) if str(_parsed(name)) in known else store.find(name).name for name in dict.fromkeys(names)
    ]
    freed = sum(store.remove(name) for name in dict.fromkeys(found))
    removed = [str(name) for name in dict.fromkeys(found)]
    if as_json:
        print(json.dumps({"removed": removed, "freed_bytes": freed}))
    else:
        print(f"removed {', '.join(removed)}: {size_text(freed)} freed")
    return EXIT_OK


def _parsed(text: str) -> ModelName | None:
    try:
        return ModelName.parse(text)
    except ModelStoreError:
        return None


def pin_model(name: str, pinned: bool) -> int:
    """Raises ModelStoreError if there is none."""
    store = open_store()
    model = store.pin(store.find(name).name, pinned)
    print(f"{model.name} is {'' if pinned else 'not '}pinned")
    return EXIT_OK


def collect(keep_bytes: int | None, *, dry_run: bool, as_json: bool) -> int:
    """Exit 1 if a file of a model is none. Raises ModelStoreError if a manifest is damaged."""
    found = open_store().gc(keep_bytes, dry_run=dry_run)
    evicted = [str(name) for name in found.models]
    if as_json:
        data = {
            "evicted": evicted, "files": found.blobs, "freed_bytes": found.freed_bytes, "dry_run": dry_run,
            "problems": list(found.problems),
        }  # fmt: skip
        print(json.dumps(data))
    else:
        would = "would be " if dry_run else ""
        for name in evicted:
            print(f"{name} {would or 'is '}evicted")
        were = "was " if found.blobs == 1 else "were "
        print(f"{_files(found.blobs)} {would or were}removed, {size_text(found.freed_bytes)} {would}freed")
    for problem in found.problems:
        print(f"llmpi: {problem}", file=sys.stderr)
    return EXIT_SOME_FAILED if found.problems else EXIT_OK


def as_data(store: ModelStore, model: Manifest) -> dict[str, Any]:
    """Its manifest, with its `name`, `used_at` (seconds since 1970) and `problem`: why it cannot be used, or None."""
    data: dict[str, Any] = json.loads(model.to_json())
    return data | {"name": str(model.name), "used_at": store.used_at(model), "problem": store.problem(model)}


def size_text(count: int) -> str:
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("kB", 1)):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _count(value: Any) -> str:
    if not isinstance(value, int):
        return ""
    for unit, power in (("T", 4), ("B", 3), ("M", 2)):
        if value >= 1000**power:
            return f"{value / 1000**power:.1f}{unit}"
    return f"{value:,}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes") if seconds else ""


_SHOWN: dict[str, Callable[[Any], str]] = {
    "size": size_text, "used_at": _when, "gguf parameters": lambda count: f"{count:,}",
}  # fmt: skip
"""How `show` writes what is not for people as it stands."""
