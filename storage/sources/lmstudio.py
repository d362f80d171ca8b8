"""`lmstudio:PUBLISHER/REPO[/FILE]`: a model that LM Studio has downloaded on this machine, adopted where it lies.

The folders are `$LMSTUDIO_HOME/models`, or else `~/.lmstudio/models` and `~/.cache/lm-studio/models`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from scheduling.errors import ModelSourceError
from storage.sources.job import Fetched, Job, Pulled, Sum, check_adopted, stem_of
from storage.sources.splits import choose

_SHOWN = 40


def pull(job: Job) -> Pulled:
    """Find the model's files."""
    steps = job.rest.split("/")
    if len(steps) < 2 or any(step in ("", ".", "..") for step in steps):
        raise ModelSourceError(f"{job.shown!r} is not of the form lmstudio:PUBLISHER/REPO[/FILE].")
    repo, file = "/".join(steps[:2]), "/".join(steps[2:]) or None
    for store in stores(os.environ):
        folder = store / repo
        if folder.is_dir():
            return _from_folder(job, store, folder, repo, file)
    raise ModelSourceError(f"{job.shown} is not among LM Studio's models. {_there(stores(os.environ))}")


def stores(environ: Mapping[str, str]) -> list[Path]:
    """Where LM Studio's models may lie, the most specific place first."""
    given = environ.get("LMSTUDIO_HOME", "").strip()
    homes = [Path(given).expanduser()] if given else [Path.home() / ".lmstudio", Path.home() / ".cache" / "lm-studio"]
    return [home / "models" for home in homes]


def _from_folder(job: Job, store: Path, folder: Path, repo: str, file: str | None) -> Pulled:
    there = (
        (Path(where) / name).relative_to(folder).as_posix() for where, _, names in os.walk(folder) for name in names
    )
    names = choose(there, file, f"lmstudio:{repo}", f"lmstudio:{repo}/FILE")
    files = tuple(
        Fetched(check_adopted(folder / name, store, job.shown), name.rsplit("/", 1)[-1], adopt=True) for name in names
    )
    size = sum(fetched.path.stat().st_size for fetched in files)
    job.check_total(size)
    Sum(job, size).grow(size, size, last=True)
    return Pulled(files, f"lmstudio:{repo}/{names[0]}", None, stem_of(names[0]))


def _there(places: list[Path]) -> str:
    """What a person may have meant."""
    found = sorted(
        {path.relative_to(store).as_posix() for store in places for path in store.glob("*/*") if path.is_dir()}
    )
    if not found:
        return f"There are no models in {' or '.join(map(str, places))}. Set LMSTUDIO_HOME if they lie elsewhere."
    return f"There are: {', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''}."
