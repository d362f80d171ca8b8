"""`ollama:NAME[:TAG]`: a model in Ollama's store on this machine, adopted where it lies.

    $OLLAMA_MODELS, ~/.ollama/models, /usr/share/ollama/.ollama/models (Ollama as a system service)
      manifests/HOST/NAMESPACE/NAME/TAG     JSON: layers with a media type, a digest and a size
      blobs/sha256-HEX                      their contents

NAME may be `NAMESPACE/NAME` or `HOST/NAMESPACE/NAME` (`hf.co/ORG/REPO`). Ollama does not have to run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduling.errors import ModelSourceError
from storage.files import OsDisk, read_all
from storage.sources.job import Fetched, Job, Pulled, Sum, check_adopted

_TYPE = "application/vnd.ollama.image."
_STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SYSTEM = Path("/usr/share/ollama/.ollama/models")
_MANIFEST_BYTES = 1 << 20
_LICENCE_BYTES = 1 << 16
_SHOWN = 40


def pull(job: Job) -> Pulled:
    """Find the model's file."""
    steps, tag = _parse(job)
    for store in stores(os.environ):
        path = store.joinpath("manifests", *steps, tag)
        if path.is_file():
            return _from_manifest(job, store, path, f"{steps[-1]}-{tag}" if tag != "latest" else steps[-1])
    raise ModelSourceError(f"{job.shown} is not in Ollama's store. {_there(stores(os.environ))}")


def stores(environ: Mapping[str, str]) -> list[Path]:
    """Where Ollama's models may lie, the most specific place first."""
    given = environ.get("OLLAMA_MODELS", "").strip()
    return [Path(given).expanduser()] if given else [Path.home() / ".ollama" / "models", _SYSTEM]


def _parse(job: Job) -> tuple[list[str], str]:
    """The folders of the manifest below `manifests`, and its name."""
    name, colon, tag = job.rest.partition(":")
    steps = name.split("/")
    if len(steps) > 3 or not all(_STEP.fullmatch(step) for step in [*steps, *([tag] if colon else [])]):
        raise ModelSourceError(f"{job.shown!r} is not of the form ollama:NAME[:TAG].")
    return ["registry.ollama.ai", "library"][: 3 - len(steps)] + steps, tag or "latest"


def _there(places: list[Path]) -> str:
    """What a person may have meant."""
    found = []
    for store in places:
        for path in sorted((store / "manifests").glob("*/*/*/*")):
            host, space, name, tag = path.relative_to(store / "manifests").parts
            steps = [step for step in (host, space) if step not in ("registry.ollama.ai", "library")]
            found.append("/".join([*steps, name]) + f":{tag}")
    if not found:
        return f"There are no models in {' or '.join(map(str, places))}. Set OLLAMA_MODELS, or run `ollama pull` first."
    return f"There are: {', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''}."


def _from_manifest(job: Job, store: Path, path: Path, name: str) -> Pulled:
    layers = _layers(job, store, path)
    models = [layer for layer in layers if layer.get("mediaType") == _TYPE + "model"]
    if len(models) != 1:
        raise ModelSourceError(
            f"{job.shown} has {len(models)} model layers where one GGUF was expected. Only models "
            "of one GGUF can be used."
        )
    real, sha256 = _blob(job, store, models[0])
    size = real.stat().st_size
    if size != models[0].get("size"):
        raise ModelSourceError(f"{job.shown} is not whole: {real} has {size:,} bytes. Run `ollama pull` again.")
    job.check_total(size)
    Sum(job, size).grow(size, size, last=True)
    kinds = {str(layer.get("mediaType")) for layer in layers}
    notes = [
        f"{job.shown} also has {what}, which was left out."
        for kind, what in (("adapter", "an adapter (LoRA)"), ("projector", "a projector for images"))
        if _TYPE + kind in kinds
    ]
    file = Fetched(real, f"{name}.gguf", sha256=sha256, adopt=True)
    return Pulled((file,), job.source, _licence(job, store, layers), name, tuple(notes))


def _layers(job: Job, store: Path, path: Path) -> list[dict[str, Any]]:
    """The layers of a manifest."""
    try:
        if not path.resolve(strict=True).is_relative_to(store.resolve(strict=True)):
            raise ModelSourceError(f"{job.shown}: {path} leads out of {store} and is not followed.")
        manifest = json.loads(read_all(OsDisk(), path, _MANIFEST_BYTES))
        layers = manifest["layers"]
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise ValueError("its layers are no list of objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelSourceError(
            f"{job.shown}: the manifest {path} cannot be read ({error}). Run `ollama pull` again."
        ) from error
    return layers


def _blob(job: Job, store: Path, layer: dict[str, Any]) -> tuple[Path, str]:
    """A layer's file and SHA-256. The digest is the only thing that may name a file."""
    match = _DIGEST.fullmatch(str(layer.get("digest")))
    if match is None:
        raise ModelSourceError(f"{job.shown}: its manifest names {layer.get('digest')!r}, which is no digest: refused.")
    return check_adopted(store / "blobs" / f"sha256-{match[1]}", store, job.shown), match[1]


def _licence(job: Job, store: Path, layers: list[dict[str, Any]]) -> str | None:
    """The first line of the licence that comes with a model."""
    for layer in layers:
        match = _DIGEST.fullmatch(str(layer.get("digest")))
        if layer.get("mediaType") == _TYPE + "license" and match is not None:
            path = store / "blobs" / f"sha256-{match[1]}"
            try:
                if path.resolve(strict=True).is_relative_to(store.resolve(strict=True)):
                    with path.open("rb") as file:
                        text = file.read(_LICENCE_BYTES).decode("utf-8", "replace")
                    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), None)
            except (OSError, RuntimeError):
                continue
    return None
