"""Who this machine's user is to a web server: a token of the environment, or an entry of the netrc file.

A credential is for one origin (scheme, host and port) and is sent nowhere else. `LLMPI_HTTP_TOKEN` is for the host that
the source names, or for `LLMPI_HTTP_TOKEN_HOST` alone if that is set too.
"""

from __future__ import annotations

import base64
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]


@dataclass(frozen=True)
class Credential:
    """The value of an Authorization header, and the origin that it is for."""

    origin: Origin
    header: str

    def header_for(self, url: str) -> str | None:
        """The header if `url` is of the credential's origin, or of the same host by https where that was http."""
        scheme, host, port = origin_of(url)
        mine = self.origin
        upgraded = (scheme, port) == ("https", 443) and mine == ("http", host, 80)
        return self.header if upgraded or (scheme, host, port) == mine else None


def origin_of(url: str) -> Origin:
    """Scheme, host and port of a URL. Raises ValueError if it has no host, or a port that is none."""
    parts: SplitResult = urlsplit(url)
    host = (parts.hostname or "").lower().rstrip(".")
    if not host:
        raise ValueError("no host")
    return parts.scheme, host, parts.port or _PORTS.get(parts.scheme, 0)


def find(url: str, environ: Mapping[str, str] = os.environ) -> tuple[Credential | None, str]:
    """The credential for `url`, if there is one, and what a person should know when the server wants another."""
    origin = origin_of(url)
    host = origin[1]
    hint = f"Set LLMPI_HTTP_TOKEN, or name {host} in ~/.netrc."
    token = environ.get("LLMPI_HTTP_TOKEN", "").strip()
    only = environ.get("LLMPI_HTTP_TOKEN_HOST", "").strip().lower()
    if token and only in ("", host):
        if not token.isascii() or not token.isprintable():
            return None, "LLMPI_HTTP_TOKEN was not sent: it holds characters that no token has."
        return Credential(origin, f"Bearer {token}"), "Is LLMPI_HTTP_TOKEN right?"
    if token:
        hint = f"LLMPI_HTTP_TOKEN was not sent: LLMPI_HTTP_TOKEN_HOST says it is for {only}."
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return None, hint
    try:
        # `default` is for every host there is, and so for none that a model should tell a password to.
        entry = netrc.netrc(path).hosts.get(host)
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read: {error}."
    if entry is None:
        return None, hint
    login, _, password = entry
    basic = base64.b64encode(f"{login}:{password}".encode()).decode()
    return Credential(origin, f"Basic {basic}"), f"Is the entry of {host} in {path} right?"
