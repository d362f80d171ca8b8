"""Object stores through fsspec: in memory, on disk, and one that fails as told."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from scheduling.errors import ModelSourceError
from storage.sources import Pulled, objects, pull
from tests.storage.sources.site import Answer, Site, Waits, gguf, patience, sha256

pytest.importorskip("fsspec.implementations.memory", reason="fsspec (extra: objects) opens object stores")

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

MODEL = gguf()


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store whose next answers can be set: an exception to raise, or bytes to return."""

    protocol = "oss"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    answers: ClassVar[list[Exception | bytes | None]] = []
    asked: ClassVar[list[tuple[int, int]]] = []
    etag: ClassVar[str] = "v1"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("oss://", "memory://")))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {**super().info(path, **kwargs), "ETag": Flaky.etag}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        Flaky.asked.append((start or 0, end or 0))
        answer = Flaky.answers.pop(0) if Flaky.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer if answer is not None else bytes(super().cat_file(path, start=start, end=end))


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces, and an empty store."""
    monkeypatch.setattr(objects, "PIECE_BYTES", 100_000)
    fsspec.register_implementation("oss", Flaky, clobber=True)
    Flaky.answers, Flaky.asked, Flaky.etag = [], [], "v1"
    yield
    MemoryFileSystem.store.clear()
    Flaky.store.clear()


def _pull(scratch: Path, source: str = "oss://bucket/m.gguf", waits: Waits | None = None, **options: Any) -> Pulled:
    return pull(source, scratch, patience=patience(waits, attempts=3), **options)


def _hold(name: str, data: bytes) -> None:
    Flaky().pipe_file(f"/bucket/{name}", data)


def test_an_object_comes_in_pieces(scratch: Path) -> None:
    _hold("m.gguf", MODEL)
    said: list[tuple[int, int | None]] = []
    pulled = _pull(scratch, progress=lambda done, total: said.append((done, total)))
    (file,) = pulled.files
    assert file.path.read_bytes() == MODEL
    assert (file.name, file.adopt, file.digest) == ("m.gguf", False, sha256(MODEL))
    assert (pulled.source, pulled.suggested_name) == ("oss://bucket/m.gguf", "m")
    assert said == [(done, len(MODEL)) for done in (0, 100_000, 200_000, 300_000)]
    assert Flaky.asked == [(0, 100_000), (100_000, 200_000), (200_000, 300_000)]


@pytest.mark.parametrize("source", ["memory://bucket/m.gguf", "file://{}/m.gguf"])
def test_local_file_systems_work_offline_too(source: str, tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(MODEL)
    MemoryFileSystem().pipe_file("/bucket/m.gguf", MODEL)
    assert _pull(scratch, source.format(tmp_path), offline=True).files[0].path.read_bytes() == MODEL


def test_a_broken_pull_goes_on_where_it_stood(scratch: Path) -> None:
    _hold("m.gguf", MODEL)
    Flaky.answers = [None, *[OSError("gone")] * 3]
    waits = Waits()
    with pytest.raises(ModelSourceError, match=r"OSError: gone\) \(3 attempts\). What came is kept"):
        _pull(scratch, waits=waits)
    assert waits.seconds == [1, 2]
    Flaky.asked.clear()
    assert _pull(scratch).files[0].path.read_bytes() == MODEL
    assert Flaky.asked[0] == (100_000, 200_000)


def test_a_piece_of_another_length_is_asked_for_again(scratch: Path) -> None:
    _hold("m.gguf", MODEL)
    Flaky.answers = [MODEL[:10], MODEL[:100_001]]
    assert _pull(scratch).files[0].path.read_bytes() == MODEL


def test_an_object_that_changed_between_pulls_is_fetched_from_its_start(scratch: Path) -> None:
    _hold("m.gguf", MODEL)
    Flaky.answers = [None, *[OSError("gone")] * 3]
    with pytest.raises(ModelSourceError):
        _pull(scratch)
    Flaky.etag = "v2"
    newer = gguf(seed=2)
    _hold("m.gguf", newer)
    assert _pull(scratch).files[0].path.read_bytes() == newer


def test_an_object_that_changes_during_the_pull_is_refused(scratch: Path) -> None:
    _hold("m.gguf", MODEL)

    def change(done: int, total: int | None) -> None:
        Flaky.etag = "v2" if done else "v1"

    with pytest.raises(ModelSourceError, match="was changed while it was fetched"):
        _pull(scratch, progress=change)
    (path,) = scratch.glob("*.partial")
    assert path.stat().st_size == 0


@pytest.mark.slow
def test_a_store_that_stalls_is_given_up(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hold("m.gguf", MODEL)
    stopped = threading.Event()
    monkeypatch.setattr(Flaky, "cat_file", lambda self, path, **_: stopped.wait(20))
    with pytest.raises(ModelSourceError, match="nothing came for"):
        pull("oss://bucket/m.gguf", scratch, patience=patience(stall_s=0.05, attempts=2))
    stopped.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("x"), "is not there"),
        (PermissionError("x"), "may not be read"),
        (RuntimeError("Unable to locate credentials"), "no credentials"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(scratch: Path, error: Exception, words: str) -> None:
    _hold("m.gguf", MODEL)
    Flaky.answers = [error]
    waits = Waits()
    with pytest.raises(ModelSourceError, match=words):
        _pull(scratch, waits=waits)
    assert waits.seconds == []


def test_an_object_that_is_not_there_or_a_folder_is_refused(scratch: Path) -> None:
    _hold("folder/m.gguf", MODEL)
    with pytest.raises(ModelSourceError, match="is not there"):
        _pull(scratch, "oss://bucket/other.gguf")
    with pytest.raises(ModelSourceError, match="is no file"):
        _pull(scratch, "oss://bucket/folder")


def test_all_parts_come_in_order_and_under_one_limit(scratch: Path) -> None:
    for number in (1, 2):
        _hold(f"m-{number:05d}-of-00002.gguf", gguf(1000 + number, number))
    source = "oss://bucket/m-00001-of-00002.gguf"
    with pytest.raises(ModelSourceError, match="2,003 bytes, over the limit of 2,002"):
        _pull(scratch, source, max_bytes=2_002)
    pulled = _pull(scratch, source, max_bytes=2_003)
    assert [len(file.path.read_bytes()) for file in pulled.files] == [1001, 1002]


def test_what_is_no_gguf_is_refused_after_its_first_piece(scratch: Path) -> None:
    _hold("m.gguf", bytes(300_000))
    with pytest.raises(ModelSourceError, match="is no GGUF file"):
        _pull(scratch)
    assert len(Flaky.asked) == 1


@pytest.mark.parametrize("source", ["s3://b/m.gguf", "gs://b/m.gguf"])
def test_offline_opens_no_store(scratch: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match="this pull is offline"):
        _pull(scratch, source, offline=True)


@pytest.mark.parametrize("source", ["memory://a::file:///etc/passwd", "s3://b/k?versionId=1"])
def test_chained_addresses_are_refused(scratch: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match="chained addresses"):
        _pull(scratch, source)


def test_a_store_without_its_package_says_what_to_install(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ModelSourceError, match="pip install s3fs"):
        _pull(scratch, "s3://bucket/m.gguf")


def test_without_fsspec_the_error_says_what_to_install(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ModelSourceError, match=r"pip install 'llmpi\[objects\]'"):
        _pull(scratch)


@pytest.mark.slow
def test_s3_asks_for_pieces_and_says_what_is_refused(
    site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("s3fs") is None:
        # The extra `test` brings it: where all tests run, this one does.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("s3fs (extra: test) speaks to S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", site.root)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    site.files["/bucket/folder/m.gguf"] = MODEL
    assert _pull(scratch, "s3://bucket/folder/m.gguf").files[0].path.read_bytes() == MODEL
    assert [ranges for ranges in site.ranges() if ranges] == [
        "bytes=0-99999",
        "bytes=100000-199999",
        "bytes=200000-299999",
    ]
    with pytest.raises(ModelSourceError, match="is not there"):
        _pull(scratch, "s3://bucket/folder/none.gguf")
    site.always = Answer(status=403, body=b"")
    with pytest.raises(ModelSourceError, match="may not be read"):
        _pull(scratch, "s3://bucket/folder/m.gguf")
