from __future__ import annotations

from collections.abc import Callable
from importlib import metadata, util

import pytest

from coordinator.versions import MISSING, MODULES, UNTOLD, package_version, package_versions


def test_each_package_has_a_version() -> None:
    versions = package_versions()
    assert {"llmpi", "llama-cpp-python", "msgspec", "numpy"} <= versions.keys()
    assert versions["numpy"] == metadata.version("numpy")


@pytest.fixture
def without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)


@pytest.mark.usefixtures("without_metadata")
def test_what_lies_on_the_path_without_having_been_installed_is_not_missing() -> None:
    assert package_version("llmpi") == UNTOLD


@pytest.mark.usefixtures("without_metadata")
def test_what_is_nowhere_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere: Callable[[str], None] = lambda _name: None  # noqa: E731
    monkeypatch.setattr(util, "find_spec", nowhere)
    assert {package_version(name) for name in MODULES} == {MISSING}
