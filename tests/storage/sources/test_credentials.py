"""Who is told a token or a password: the host it is for, and nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scheduling.errors import ModelSourceError
from storage.sources import credentials, pull
from storage.sources.credentials import Credential
from storage.sources.http import Wanted, _next
from tests.storage.sources.site import Answer, Site, gguf, patience, redirect

MODEL = gguf(10_000)


def _told(site: Site) -> list[str | None]:
    return [headers.get("authorization") for _, headers in site.asked]


def test_a_token_is_sent_to_the_host_that_is_named_and_to_no_other(
    site: Site, other_site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPI_HTTP_TOKEN", "t0ken")
    site.script = [redirect("/here"), redirect(other_site.url("/there"))]
    other_site.files["/there"] = MODEL
    pull(site.url(), scratch, patience=patience())
    assert _told(site) == ["Bearer t0ken", "Bearer t0ken"]
    assert _told(other_site) == [None]


def test_a_token_is_not_sent_again_once_another_host_has_led_back(
    site: Site, other_site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPI_HTTP_TOKEN", "t0ken")
    site.files["/back"] = MODEL
    site.script = [redirect(other_site.url("/there"))]
    other_site.script = [redirect(site.url("/back"))]
    pull(site.url(), scratch, patience=patience())
    assert _told(site) == ["Bearer t0ken", None]
    assert _told(other_site) == [None]


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", "Bearer t0ken"), ("models.example.org", None)])
def test_a_token_for_one_host_stays_with_it(
    site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch, host: str, told: str | None
) -> None:
    monkeypatch.setenv("LLMPI_HTTP_TOKEN", "t0ken")
    monkeypatch.setenv("LLMPI_HTTP_TOKEN_HOST", host)
    site.files["/model.gguf"] = MODEL
    pull(site.url(), scratch, patience=patience())
    assert _told(site) == [told]


def test_the_reason_is_told_when_a_token_was_for_another_host(
    site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPI_HTTP_TOKEN", "t0ken")
    monkeypatch.setenv("LLMPI_HTTP_TOKEN_HOST", "models.example.org")
    site.always = Answer(status=401, body=b"")
    with pytest.raises(ModelSourceError, match=r"it is for models\.example\.org") as caught:
        pull(site.url(), scratch, patience=patience())
    assert "t0ken" not in str(caught.value)


def _netrc(home: Path, text: str) -> None:
    path = home / ".netrc"
    path.write_text(text)
    path.chmod(0o600)


def test_a_netrc_entry_is_sent_to_its_host(site: Site, other_site: Site, scratch: Path, home: Path) -> None:
    _netrc(home, "machine 127.0.0.1 login me password secret\n")
    site.script = [redirect(other_site.url("/there"))]
    other_site.files["/there"] = MODEL
    pull(site.url(), scratch, patience=patience())
    assert _told(site) == ["Basic bWU6c2VjcmV0"]
    assert _told(other_site) == [None]


@pytest.mark.parametrize("text", ["default login me password secret\n", "machine example.org login a password b\n"])
def test_entries_for_others_are_not_sent(site: Site, scratch: Path, home: Path, text: str) -> None:
    _netrc(home, text)
    site.files["/model.gguf"] = MODEL
    pull(site.url(), scratch, patience=patience())
    assert _told(site) == [None]


def test_a_broken_netrc_is_told_only_if_a_login_is_wanted(site: Site, scratch: Path, home: Path) -> None:
    _netrc(home, "machine\n  what is this")
    site.files["/model.gguf"] = MODEL
    pull(site.url(), scratch, patience=patience())
    site.always = Answer(status=401, body=b"")
    with pytest.raises(ModelSourceError, match=r"netrc cannot be read"):
        pull(site.url("/other.gguf"), scratch, patience=patience())


def test_a_token_with_a_line_break_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    found, hint = credentials.find("https://host/x", {"LLMPI_HTTP_TOKEN": "a\r\nX: b"})
    assert found is None
    assert "characters" in hint


@pytest.mark.parametrize(
    ("origin", "url", "sent"),
    [
        ("https://host/a", "https://HOST/b", True),
        ("https://host/a", "https://host:443/b", True),
        ("https://host/a", "https://host:8443/b", False),
        ("https://host/a", "http://host/b", False),
        ("http://host/a", "https://host/b", True),
        ("http://host:8080/a", "https://host/b", False),
        ("https://host/a", "https://host.example/b", False),
        ("https://host/a", "https://a.host/b", False),
        ("https://host/a", "https://host@evil/b", False),
    ],
)
def test_a_credential_is_for_one_origin(origin: str, url: str, sent: bool) -> None:
    credential = Credential(credentials.origin_of(origin), "Bearer x")
    assert (credential.header_for(url) is not None) is sent


def test_a_redirect_from_https_to_http_is_not_followed() -> None:
    wanted = Wanted("https://host/m.gguf")
    with pytest.raises(ModelSourceError, match="redirects from https to"):
        _next(wanted, wanted.url, "http://host/m.gguf")
    assert _next(wanted, wanted.url, "//other/m.gguf") == "https://other/m.gguf"
    assert _next(replace(wanted, url="http://host/m"), "http://host/m", "https://host/n") == "https://host/n"
