"""One file from a web server, however often the line breaks.

Each attempt asks for what is missing (`Range`), provided that it is of the version that is there: `If-Range` with the
server's ETag or date, or a SHA-256 that is known beforehand. A server that sends all of it again, or another version,
starts the file again. Attempts follow each other until the file is whole or `Failures` gives up; nothing waits longer
than `Patience` says. Redirects are followed here and not by urllib: few, to http and https alone, never from https to
http, and never with a credential to another origin. Proxies come from the environment (`https_proxy`, `no_proxy`).
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast
from urllib.parse import quote, urljoin, urlsplit

from scheduling.errors import ModelSourceError
from scheduling.wording import printable
from storage.sources.credentials import Credential
from storage.sources.job import Failures, Patience, TransientError, WrongBytesError, without_secrets
from storage.sources.partial import Partial

REDIRECTS_MAX = 5
PIECE_BYTES = 32 << 30
"""Asked for at once. Content networks refuse whole files over about 50 GB, but not pieces of them."""
_BLOCK_BYTES = 1 << 18
_PRINTABLE = "".join(map(chr, range(33, 127)))
PASSING = {408, 425, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)$")


@dataclass(frozen=True)
class Wanted:
    """A file and what is known of it beforehand. `hint` is what to do when the server wants another credential."""

    url: str
    sha256: str | None = None
    size: int | None = None
    credential: Credential | None = None
    hint: str = ""
    room: int | None = None
    piece_bytes: int = PIECE_BYTES

    @property
    def shown(self) -> str:
        return without_secrets(self.url)


def fetch(wanted: Wanted, partial: Partial, patience: Patience, grow: Callable[[int, int | None], None]) -> str:
    """Make `partial` the whole file. Returns its SHA-256. Raises ModelSourceError; what came stays then."""
    failures = Failures(patience, wanted.shown, partial.size)
    distrusted = False
    while True:
        resumed = partial.size > 0
        try:
            while not (partial.size == wanted.size and wanted.sha256) and not _attempt(wanted, partial, patience, grow):
                pass
        except TransientError as error:
            failures.wait(error, partial.size)
            continue
        digest = partial.finish(wanted.shown)
        if wanted.size not in (None, partial.size):
            size = partial.size
            partial.restart()
            raise ModelSourceError(f"{wanted.shown} has {size:,} bytes, not {wanted.size:,} as promised: refused.")
        if wanted.sha256 in (None, digest):
            return digest
        if not resumed or distrusted:
            raise WrongBytesError(wanted.shown, partial.set_aside(), promised=wanted.sha256, actual=digest)
        partial.restart()
        distrusted = True


def _attempt(wanted: Wanted, partial: Partial, patience: Patience, grow: Callable[[int, int | None], None]) -> bool:
    """Ask once, and append what comes. Whether the file is whole then. Raises TransientError."""
    if partial.size and partial.validator is None and wanted.sha256 is None:
        partial.restart()
    # Of a file that is whole the last byte is asked for: that tells whether it is still the same version.
    start = partial.size - (partial.size > 0 and partial.size == partial.total)
    headers = {}
    if start or partial.size or wanted.piece_bytes < (wanted.size or 0):
        headers["Range"] = f"bytes={start}-{start + wanted.piece_bytes - 1}"
        if partial.size and wanted.sha256 is None and partial.validator is not None:
            headers["If-Range"] = partial.validator
    response = _open(wanted, headers, patience)
    try:
        if response.status == 416:
            partial.restart()
            raise TransientError("the file is shorter on the server than what is there of it")
        total = _agree(wanted, partial, start, response)
        if total is None and wanted.room is None:
            # A body without an announced end must not fill the disk for everybody else.
            wanted = replace(wanted, room=partial.size + partial.space_bytes() * 9 // 10)
        _check_room(wanted, partial, total)
        partial.expect(_validator(response), total)
        grow(partial.size, total)
        # All of it comes if the file was started again.
        _copy(wanted, partial, min(start, partial.size), response, patience, lambda: grow(partial.size, total))
    finally:
        response.close()
    return total is None or partial.size == total


def _agree(wanted: Wanted, partial: Partial, start: int, response: http.client.HTTPResponse) -> int | None:
    """See that the answer fits what is there already, or start again. Returns the whole file's length if it is told."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise ModelSourceError(f"{wanted.shown} is sent compressed, though that was not asked for. Use another server.")
    if response.status == 200:
        partial.restart()
        total = response.length
    else:
        match = _CONTENT_RANGE.match(response.headers.get("Content-Range", "").strip())
        total = int(match[3]) if match is not None and match[3] != "*" else None
        if match is None or total is None or not start == int(match[1]) <= int(match[2]) < total:
            partial.restart()
            raise TransientError("the server sent another part of the file than was asked for")
        changed = partial.total not in (None, total) or (
            wanted.sha256 is None and partial.validator not in (None, _validator(response))
        )
        if partial.size and changed:
            partial.restart()
            raise TransientError("the file has changed on the server, so it is fetched from its start again")
    if wanted.size is not None and total not in (None, wanted.size):
        raise ModelSourceError(f"{wanted.shown} has {total:,} bytes, not {wanted.size:,} as promised: refused.")
    return total


def _check_room(wanted: Wanted, partial: Partial, total: int | None) -> None:
    if total is None:
        return
    if wanted.room is not None and total > wanted.room:
        raise _too_large(wanted, f"{total:,} bytes")
    if total - partial.size > (space := partial.space_bytes()):
        raise ModelSourceError(
            f"{wanted.shown} needs {total - partial.size:,} bytes more, and {partial.path.parent} has {space:,} left. "
            "Make room there."
        )


def _too_large(wanted: Wanted, size: str) -> ModelSourceError:
    return ModelSourceError(
        f"{wanted.shown} has {size}, over the limit of {wanted.room:,} that is left for it. Raise the limit, or "
        "make room, to have it."
    )


def _copy(
    wanted: Wanted,
    partial: Partial,
    start: int,
    response: http.client.HTTPResponse,
    patience: Patience,
    grown: Callable[[], None],
) -> None:
    """Append the body as it comes. Raises TransientError for a cut or a stall; what came before it is kept."""
    shown, skip = wanted.shown, partial.size - start
    empty, since, since_size = True, patience.clock(), partial.size
    while True:
        try:
            block = response.read1(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error, patience) from error
        if not block:
            break
        empty = False
        block, skip = block[skip:], max(0, skip - len(block))
        if wanted.room is not None and partial.size + len(block) > wanted.room:
            partial.restart()
            raise _too_large(wanted, f"more than {wanted.room:,} bytes")
        if partial.total is not None and partial.size + len(block) > partial.total:
            partial.restart()
            raise ModelSourceError(f"{wanted.shown} sends more bytes than it says the file has: refused.")
        if block:
            partial.write(block, shown)
            grown()
        if (now := patience.clock()) - since >= patience.stall_s:
            if partial.size - since_size < patience.slow_bytes:
                raise TransientError(f"less than {patience.slow_bytes:,} bytes came in {patience.stall_s:.0f} s")
            since, since_size = now, partial.size
    if response.length:
        raise TransientError(f"the connection ended {response.length:,} bytes too early")
    if empty and response.status == 206:
        raise TransientError("the server sent nothing")


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What `If-Range` may hold: a strong ETag, or else a date; None if the server names no version."""
    etag: str | None = response.headers.get("ETag")
    if etag is not None and etag.startswith('"'):
        return etag
    date: str | None = response.headers.get("Last-Modified")
    return date


def _open(wanted: Wanted, headers: dict[str, str], patience: Patience) -> http.client.HTTPResponse:
    """The answer to a GET with 200, 206 or 416, redirects followed. Raises TransientError, ModelSourceError."""
    url, credential = wanted.url, wanted.credential
    for _ in range(REDIRECTS_MAX + 1):
        authorization = credential.header_for(url) if credential is not None else None
        if authorization is None:
            # Once an answer has led elsewhere, nobody there can lead back and have the credential used.
            credential = None
        response = _get(url, headers, authorization, patience)
        if response.status in (200, 206, 416):
            return response
        with response:
            if response.status not in _REDIRECTS:
                raise _refusal(wanted, response)
            url = _next(wanted, url, response.headers.get("Location"))
    raise ModelSourceError(f"{wanted.shown} redirects more than {REDIRECTS_MAX} times. Name the file's own address.")


def _next(wanted: Wanted, url: str, location: str | None) -> str:
    """Where a redirect leads, if that may be followed."""
    try:
        following = urljoin(url, location or "")
        parts = urlsplit(following)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not location or not host or parts.scheme not in ("http", "https"):
        raise ModelSourceError(
            f"{wanted.shown} redirects to {without_secrets(location or 'nowhere')!r}, which is not followed."
        )
    if parts.scheme == "http" and url.startswith("https:"):
        raise ModelSourceError(
            f"{wanted.shown} redirects from https to {without_secrets(following)}, which anybody on the way could "
            "change: not followed. If you trust it, name that address."
        )
    # Headers are read as Latin-1: what is no ASCII are bytes that the server has not written in hexadecimal.
    return quote(following.partition("#")[0], safe=_PRINTABLE, encoding="latin-1")


def _refusal(wanted: Wanted, response: http.client.HTTPResponse) -> Exception:
    """What an answer without a file comes to."""
    status = response.status
    said = f"the server answers {status} {printable(response.reason)}".rstrip()
    if status in PASSING:
        return TransientError(said, retry_after(response.headers.get("Retry-After")))
    if status in (401, 403, 407):
        hint = "The proxy wants a login: set https_proxy." if status == 407 else wanted.hint
        return ModelSourceError(f"{wanted.shown}: {said}. {hint}".rstrip())
    if status in (404, 410):
        return ModelSourceError(f"{wanted.shown} is not there ({said}). Check the address.")
    return ModelSourceError(f"{wanted.shown}: {said}.")


def retry_after(value: str | None) -> float:
    """Seconds to wait, from a Retry-After header in either of its forms."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


class _InTime(http.client.HTTPConnection):
    """A connection whose answer's head comes within its time: that limits each reading alone, so that a server could
    send a letter now and then for hours."""

    def getresponse(self) -> http.client.HTTPResponse:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            if self.sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # of TLS, too: not its own, which would wait

        timer = threading.Timer(cast("float", self.timeout), give_up)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set():
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()


class _InTimeTls(_InTime, http.client.HTTPSConnection):
    """The same over TLS."""


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_InTime, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_InTimeTls, req)


def _get(url: str, headers: dict[str, str], authorization: str | None, patience: Patience) -> http.client.HTTPResponse:
    """One request, answered with whatever status."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, _HttpHandler, _HttpsHandler):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "llmpi", "Accept-Encoding": "identity", **headers})
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)
    try:
        response = opener.open(request, timeout=patience.stall_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise ModelSourceError(
                f"{without_secrets(url)}: the server's certificate is not trusted ({reason.verify_message}). If it is "
                "your site's own, name its authority's file in SSL_CERT_FILE."
            ) from error
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise ModelSourceError(f"{without_secrets(url)}: the host is not known ({reason.strerror}).") from error
        if isinstance(error, (ValueError, http.client.InvalidURL)):
            raise ModelSourceError(f"{without_secrets(url)} is no address that can be asked: {error}.") from error
        raise _broken(reason, patience) from error
    if not isinstance(response, http.client.HTTPResponse):
        raise ModelSourceError(f"{without_secrets(url)} cannot be asked for over http or https.")
    return response


def _broken(error: object, patience: Patience) -> TransientError:
    if isinstance(error, TimeoutError):
        return TransientError(f"nothing came for {patience.stall_s:.0f} s")
    return TransientError(f"the connection broke ({printable(error) or type(error).__name__})")
