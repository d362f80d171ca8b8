"""A web server on loopback that misbehaves as told, and helpers to pull from it without waiting.

`Site.files` are served as they are, with ranges and ETags. Entries of `Site.script` answer the first requests instead,
one each, in order; `Site.always` answers all of them. What was asked is in `Site.asked`.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from storage.sources import Patience

STALL_S = 120.0
"""A server that stalls says nothing for so long, or until it is stopped."""


def gguf(size: int = 300_000, seed: int = 1) -> bytes:
    """Bytes that begin like a GGUF."""
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Waits:
    """Stands in for time.sleep: what was waited for, in seconds."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def patience(waits: Waits | None = None, **changes: Any) -> Patience:
    """No waiting between attempts, and not long for bytes."""
    return Patience(**{"stall_s": 5.0, "sleep": waits or Waits(), **changes})


@dataclass(frozen=True)
class Answer:
    """How to answer one request. Without `status` and `body`, with the file as the site holds it.

    `cut_after` bytes of the body the connection is closed, `stall_after` bytes nothing more comes. `announce` is the
    Content-Length instead of the true one, `chunked` sends none. `ranges=False` ignores Range, `if_range=False` ignores
    If-Range.
    """

    status: int = 0
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    stall_after: int | None = None
    announce: int | None = None
    chunked: bool = False
    ranges: bool = True
    if_range: bool = True
    etag: bool = True
    endless: bool = False


def redirect(where: str, status: int = 302) -> Answer:
    return Answer(status=status, body=b"", headers=(("Location", where),))


class Site:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.script: list[Answer] = []
        self.always: Answer | None = None
        self.answer: Callable[[_Handler], bool] = lambda handler: False
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent_bytes = 0
        self.stopped = threading.Event()
        site = self

        class Handler(_Handler):
            served = site

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def url(self, path: str = "/model.gguf") -> str:
        return self.root + path

    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for _, headers in self.asked]


class _Handler(BaseHTTPRequestHandler):
    served: Site
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        site = self.served
        site.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        try:
            if not site.answer(self):
                script = site.script.pop(0) if site.script else site.always or Answer()
                self._answer(script)
        except OSError:
            # The client has gone.
            pass
        self.close_connection = True

    def _answer(self, answer: Answer) -> None:
        body = answer.body
        status = answer.status or 200
        headers = list(answer.headers)
        if body is None:
            content = self.served.files.get(self.path.partition("?")[0])
            if content is None:
                status, body = 404, b"no such file"
            else:
                body, etag = content, f'"{sha256(content)[:16]}"'
                if answer.etag:
                    headers.append(("ETag", etag))
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                valid = not answer.if_range or self.headers.get("If-Range", etag) == etag
                if asked is not None and answer.ranges and valid and not answer.status:
                    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                    if first > last:
                        status, body = 416, b""
                    else:
                        status, body = 206, content[first : last + 1]
                        headers.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
        self.send(status, body, headers, answer)

    def send(self, status: int, body: bytes, headers: list[tuple[str, str]], answer: Answer = Answer()) -> None:
        """Write the answer, as far as it goes."""
        self.protocol_version = "HTTP/1.1"
        self.send_response(status)
        for name, value in [*headers, ("Connection", "close")]:
            self.send_header(name, value)
        if answer.chunked or answer.endless:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) if answer.announce is None else answer.announce))
        self.end_headers()
        if self.command == "HEAD":
            return
        limits = [limit for limit in (answer.cut_after, answer.stall_after) if limit is not None]
        part = body[: min(limits)] if limits else body
        if answer.chunked or answer.endless:
            for start in range(0, len(part), 4096):
                piece = part[start : start + 4096]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            while answer.endless and not self.served.stopped.is_set():
                self.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
                self.served.sent_bytes += 4096
            if answer.cut_after is None:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(part)
        self.wfile.flush()
        if answer.stall_after is not None:
            self.served.stopped.wait(STALL_S)
