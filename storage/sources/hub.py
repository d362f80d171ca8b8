"""`hf:ORG/REPO[@REV][:FILE]`: the Hugging Face hub, or its cache on this machine.

huggingface_hub (extra `hub`) says who the user is and what the repository holds: the commit, names, sizes and digests.
The bytes come over http.py, which goes on after an interruption in another process too. A file that the cache has is
adopted from there: without asking the hub if the revision is a whole commit, and always when offline.
`HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scheduling.errors import ModelSourceError
from storage.sources.credentials import Credential, origin_of
from storage.sources.http import PASSING, PIECE_BYTES, Wanted, fetch, retry_after
from storage.sources.job import (
    Failures,
    Fetched,
    Job,
    Pulled,
    Sum,
    TransientError,
    check_adopted,
    is_sha256,
    stem_of,
)
from storage.sources.partial import Partial
from storage.sources.splits import choose

_SOURCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,255}))?(?::(?P<file>.+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES_MAX = 100_000


@dataclass(frozen=True)
class _Place:
    """What a source says."""

    repo: str
    revision: str
    file: str | None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def how(self) -> str:
        return f"{self}:FILE"


@dataclass(frozen=True)
class _Remote:
    """A file of a repository. `sha256` is None for small ones, which git keeps itself."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class _Listing:
    """What a repository holds at one commit."""

    commit: str
    files: dict[str, _Remote]
    licence: str | None


def pull(job: Job) -> Pulled:
    """Take the files from the cache, or fetch them."""
    place = _parse(job)
    environ = os.environ
    cache = cache_folder(environ)
    if job.offline or _true(environ, "HF_HUB_OFFLINE") or _true(environ, "TRANSFORMERS_OFFLINE"):
        return _from_cache(job, place, cache, _cached_commit(place, cache), why="This pull was offline")
    if _COMMIT.fullmatch(place.revision) and place.file is not None:
        try:
            return _from_cache(job, place, cache, place.revision, why="The revision is a commit")
        except ModelSourceError:
            # Not there, or not all of it: the hub has it.
            pass
    return _from_hub(job, place, cache, environ)


def _parse(job: Job) -> _Place:
    match = _SOURCE.fullmatch(job.rest)
    revision = (match["revision"] or "main") if match is not None else ""
    file = match["file"] if match is not None else None
    if match is None or _climbs(revision) or (file is not None and _climbs(file)):
        raise ModelSourceError(f"{job.shown!r} is not of the form hf:ORG/REPO[@REVISION][:FILE].")
    return _Place(match["repo"], revision, file)


def _climbs(path: str) -> bool:
    return any(step in ("", ".", "..") for step in path.split("/"))


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps its cache. It reads these variables once, when it is imported; here it is now."""
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def _repo_folder(place: _Place, cache: Path) -> Path:
    return cache / f"models--{place.repo.replace('/', '--')}"


def _cached_commit(place: _Place, cache: Path) -> str:
    """The commit that the cache knows for a revision. ModelSourceError if it knows none."""
    if _COMMIT.fullmatch(place.revision):
        return place.revision
    folder = _repo_folder(place, cache)
    try:
        commit = (folder / "refs" / place.revision).read_text()[:64].strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if not _COMMIT.fullmatch(commit):
        there = "other revisions of it" if folder.is_dir() else "nothing of it"
        raise ModelSourceError(
            f"this pull is offline, and the cache {cache} has {there}: {place} is not there. Pull it once with the "
            "network (without HF_HUB_OFFLINE and --offline), or bring the cache here."
        )
    return commit


def _walk(snapshot: Path) -> Iterator[str]:
    """The files of a snapshot, as paths below it; folders that are links are not entered."""
    for folder, _, names in os.walk(snapshot):
        for name in names:
            yield (Path(folder) / name).relative_to(snapshot).as_posix()


def _from_cache(job: Job, place: _Place, cache: Path, commit: str, why: str) -> Pulled:
    """The model as it lies in the cache."""
    snapshot = _repo_folder(place, cache) / "snapshots" / commit
    shown = f"{place}, as far as it is in the cache {cache},"
    names = choose(_walk(snapshot), place.file, shown, place.how)
    adopted = tuple(_adopted(snapshot, name, cache, str(place)) for name in names)
    job.check_total(sum(file.path.stat().st_size for file in adopted))
    note = f"{why}, so the files are those of the cache {cache}; the hub was not asked."
    return _pulled(place, commit, names, adopted, None, (note,))


def _adopted(snapshot: Path, name: str, cache: Path, shown: str) -> Fetched:
    """A file of the cache. What git does not keep itself lies in a blob that is named by its SHA-256."""
    link = snapshot / name
    blob = os.path.basename(os.readlink(link)) if link.is_symlink() else ""
    real = check_adopted(link, cache, shown)
    return Fetched(real, name.rsplit("/", 1)[-1], sha256=blob if is_sha256(blob) else None, adopt=True)


def _pulled(
    place: _Place,
    commit: str,
    names: list[str],
    files: tuple[Fetched, ...],
    licence: str | None,
    notes: tuple[str, ...],
) -> Pulled:
    return Pulled(files, f"hf:{place.repo}@{commit}:{names[0]}", licence, stem_of(names[0]), notes)


def _from_hub(job: Job, place: _Place, cache: Path, environ: Mapping[str, str]) -> Pulled:
    """Fetch what the cache does not have."""
    endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint) is None:
        raise ModelSourceError(f"HF_ENDPOINT={endpoint!r} is no address of a hub. It is like https://huggingface.co.")
    listing, credential = _ask(job, place, endpoint)
    names = choose(listing.files, place.file, str(place), place.how)
    if any(_climbs(name) for name in names):
        raise ModelSourceError(f"{place} lists a file {names[0]!r}, which is no path below it.")
    sizes = [listing.files[name].size for name in names]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    job.check_total(sum(known))
    added = Sum(job, total)
    files = tuple(
        _file(job, place, listing, name, cache, endpoint, credential, added, last=name == names[-1]) for name in names
    )
    return _pulled(place, listing.commit, names, files, listing.licence, ())


def _file(
    job: Job,
    place: _Place,
    listing: _Listing,
    name: str,
    cache: Path,
    endpoint: str,
    credential: Credential | None,
    added: Sum,
    *,
    last: bool,
) -> Fetched:
    remote = listing.files[name]
    snapshot = _repo_folder(place, cache) / "snapshots" / listing.commit
    if (snapshot / name).is_file():
        try:
            adopted = _adopted(snapshot, name, cache, str(place))
            size = adopted.path.stat().st_size
            if size == remote.size and adopted.sha256 in (None, remote.sha256):
                added.grow(size, size, last)
                added.close(size)
                return Fetched(adopted.path, adopted.name, sha256=remote.sha256, adopt=True)
        except (ModelSourceError, OSError):
            # The cache is damaged or leads elsewhere: the hub's file is as good.
            pass
    # Named by the commit, so that bytes of one commit are never continued with those of another.
    path = job.partial_path(f"{listing.commit}/{name}")
    wanted = Wanted(
        f"{endpoint}/{place.repo}/resolve/{listing.commit}/{quote(name)}",
        sha256=remote.sha256,
        size=remote.size,
        credential=credential,
        hint=_HINT.format(page=f"{endpoint}/{place.repo}"),
        room=added.room,
        piece_bytes=PIECE_BYTES,
    )
    with Partial(path, added.read_again) as partial:
        digest = fetch(wanted, partial, job.patience, lambda done, total: added.grow(done, total, last))
        added.close(partial.size)
    return Fetched(path, name.rsplit("/", 1)[-1], sha256=remote.sha256, digest=digest)


_HINT = "Set HF_TOKEN to a token that may read it, and accept the terms at {page} if it has any."


def _ask(job: Job, place: _Place, endpoint: str) -> tuple[_Listing, Credential | None]:
    """Ask the hub what there is. Raises ModelSourceError."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ModelSourceError(
            f"{place} needs the package huggingface_hub, which is not installed: pip install 'llmpi[hub]'."
        ) from error
    failures = Failures(job.patience, str(place))
    api = huggingface_hub.HfApi(endpoint=endpoint)
    page = f"{endpoint}/{place.repo}"
    while True:
        try:
            info = api.model_info(
                place.repo, revision=place.revision, files_metadata=True, timeout=job.patience.stall_s
            )
            break
        except errors.GatedRepoError as error:
            raise ModelSourceError(f"{place} is gated. {_HINT.format(page=page)}") from error
        except errors.RepositoryNotFoundError as error:
            raise ModelSourceError(
                f"{place}: {page} is not there, or is private. Check the name. {_HINT.format(page=page)}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelSourceError(f"{place}: {page} has no revision {place.revision!r}.") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status not in PASSING:
                hint = _HINT.format(page=page) if status in (401, 403) else ""
                raise ModelSourceError(f"{place}: the hub answers {status}. {hint}".rstrip()) from error
            wait_s = retry_after(error.response.headers.get("Retry-After"))
            failures.wait(TransientError(f"the hub answers {status}", wait_s))
        except Exception as error:
            # Which network errors there are depends on the library that huggingface_hub is built upon.
            failures.wait(TransientError(f"{endpoint} cannot be asked ({type(error).__name__}: {error})"))
    token = huggingface_hub.get_token()
    credential = Credential(origin_of(endpoint), f"Bearer {token}") if token else None
    return _listing(place, info), credential


def _listing(place: _Place, info: Any) -> _Listing:
    """What huggingface_hub found, checked."""
    commit = str(info.sha or "")
    if not _COMMIT.fullmatch(commit):
        raise ModelSourceError(f"{place}: the hub names no commit for {place.revision!r}. Is HF_ENDPOINT a hub?")
    files = {}
    models = [one for one in info.siblings or [] if str(one.rfilename).lower().endswith(".gguf")]
    for sibling in models[:_FILES_MAX]:
        lfs = sibling.lfs
        sha256 = str(lfs.sha256).lower() if lfs is not None and is_sha256(str(lfs.sha256).lower()) else None
        size = sibling.size if sibling.size is not None else getattr(lfs, "size", None)
        files[str(sibling.rfilename)] = _Remote(size if isinstance(size, int) else None, sha256)
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    card = getattr(info, "card_data", None)
    licence = (getattr(card, "license", None) if card is not None else None) or (tags[0] if tags else None)
    return _Listing(commit, files, str(licence)[:200] if licence else None)
