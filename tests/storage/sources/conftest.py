"""Pulls that know nothing of the machine they run on: no home, proxies, tokens or caches but the test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.sources.site import Site

_OWN = ("HF_", "HUGGING", "LLMPI_HTTP", "OLLAMA", "LMSTUDIO", "TRANSFORMERS_", "XDG_CACHE", "NETRC")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of the test, empty."""
    for name in list(os.environ):
        if name.startswith(_OWN) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on loopback."""
    with Site() as server:
        yield server


@pytest.fixture
def other_site() -> Iterator[Site]:
    """Another one: another port is another origin."""
    with Site() as server:
        yield server
