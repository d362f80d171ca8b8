"""`https://…` and `http://…`: a file on a web server, all parts of it if its name says that it is split.

`#sha256=HEX` after the address is what the file must have, and what pins it once it has come. How it is fetched is in
http.py.
"""

from __future__ import annotations

from functools import partial as partial_of
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from scheduling.errors import ModelSourceError
from storage.sources import credentials
from storage.sources.http import Wanted, fetch
from storage.sources.job import Fetched, Job, Pulled, Sum, is_sha256, stem_of
from storage.sources.partial import Partial
from storage.sources.splits import parts_of

_SAFE = "/%:@!$&'()*+,;=~?[]"
"""What an address may hold as it is; the rest is written in hexadecimal, as browsers do."""


def pull(job: Job) -> Pulled:
    """Fetch what a URL names."""
    job.refuse_offline()
    addresses, sha256 = _addresses(job)
    credential, hint = credentials.find(addresses[0])
    added = Sum(job)
    files = []
    for address in addresses:
        path = job.partial_path(address)
        with Partial(path, added.read_again) as partial:
            wanted = Wanted(address, sha256=sha256, credential=credential, hint=hint, room=added.room)
            digest = fetch(wanted, partial, job.patience, partial_of(added.grow, last=address == addresses[-1]))
            added.close(partial.size)
        files.append(Fetched(path, _name(address), sha256=sha256, digest=digest))
    source = job.shown if len(files) > 1 else f"{job.shown.partition('#')[0]}#sha256={files[0].digest}"
    return Pulled(tuple(files), source, None, stem_of(files[0].name))


def _addresses(job: Job) -> tuple[list[str], str | None]:
    """The addresses of all parts, and the SHA-256 that is asked for."""
    try:
        parts = urlsplit(job.source)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ModelSourceError(f"{job.shown} is no web address: {error}.") from error
    if not host or not parts.path.strip("/"):
        raise ModelSourceError(f"{job.shown} names no file. A source is https://HOST/PATH/FILE.gguf.")
    if parts.username is not None or parts.password is not None:
        raise ModelSourceError(
            f"{job.shown} holds a login, which would end up in records and histories. Put it into ~/.netrc instead."
        )
    sha256 = None
    if parts.fragment:
        sha256 = parts.fragment.removeprefix("sha256=").lower()
        if not parts.fragment.startswith("sha256=") or not is_sha256(sha256):
            raise ModelSourceError(
                f"{job.shown}: after # there may be sha256= and 64 hexadecimal digits, nothing else."
            )
    whole = (parts.scheme, parts.netloc, quote(parts.path, safe=_SAFE), quote(parts.query, safe=_SAFE), "")
    paths = parts_of(whole[2])
    if len(paths) > 1 and sha256 is not None:
        raise ModelSourceError(f"{job.shown} is one of {len(paths)} parts: one sha256 cannot be of all. Leave it out.")
    return [urlunsplit((*whole[:2], path, *whole[3:])) for path in paths], sha256


def _name(address: str) -> str:
    """The file's own name; one that could be a path is made harmless."""
    name = unquote(urlsplit(address).path.rstrip("/").rsplit("/", 1)[-1])
    return name.replace("/", "_").replace("\0", "_") or "model"
