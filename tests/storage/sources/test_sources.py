"""What all sources share: prefixes, secrets, parts of split models, and the partial file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import EXIT_USAGE, ModelSourceError
from storage.sources import is_source, pull
from storage.sources import partial as partial_module
from storage.sources.job import stem_of, without_secrets
from storage.sources.partial import Partial
from storage.sources.splits import choose, parts_of
from tests.launch import ROOT
from tests.storage.sources.site import gguf, sha256

MODEL = gguf(10_000)


@pytest.mark.parametrize(
    "text",
    [
        "hf:a/b",
        "HF:a/b",
        "https://h/x.gguf",
        "http://h/x",
        "pypi:llm",
        "ollama:m:t",
        "lmstudio:a/b",
        "s3://b/k",
        "gs://b/k",
    ],
)
def test_sources_are_known_by_their_prefix(text: str) -> None:
    assert is_source(text)


@pytest.mark.parametrize(
    "text", ["", "model.gguf", "/a/model.gguf", "hf", "a:b", "https:x", "s3:b/k", "sha256:ab", "C:\\m"]
)
def test_paths_names_and_digests_are_no_sources(text: str, tmp_path: Path) -> None:
    assert not is_source(text)
    with pytest.raises(ModelSourceError, match="A source begins with one of hf:, pypi:") as caught:
        pull(text, tmp_path)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("letter", ["\n", "\0", "\x7f", "\x1b"])
def test_control_characters_are_refused(letter: str, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="control characters"):
        pull(f"https://host/a{letter}b.gguf", tmp_path)


@settings(max_examples=40)
@given(st.text("abc:/?#[]@%&= \n\0é"))
def test_any_text_is_a_source_or_none_and_can_be_shown(text: str) -> None:
    for source in (text, f"https://{text}", f"hf:{text}"):
        is_source(source)
        without_secrets(source)


def test_a_scratch_directory_that_cannot_be_made_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelSourceError, match="cannot be pulled into"):
        pull("https://host/x.gguf", tmp_path / "file" / "scratch")


@pytest.mark.slow
@pytest.mark.system
def test_importing_sources_loads_no_client_of_any() -> None:
    program = "import sys, storage.sources; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {"huggingface_hub", "fsspec", "pyarrow", "numpy", "urllib.request"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://me:pw@host/x?sig=1&a=2#sha256=ff", "https://…@host/x?sig=…&a=2#sha256=ff"),
        (
            "https://host/x?X-Amz-Security-Token=1&AWSAccessKeyId=2",
            "https://host/x?X-Amz-Security-Token=…&AWSAccessKeyId=…",
        ),
        ("https://host:bad/x?download=true", "https://host:bad/x?download=true"),
        ("hf:org/repo@main:file?token=x", "hf:org/repo@main:file?token=x"),
        ("https://[bad/x?token=secret", "https://…"),
    ],
)
def test_secrets_are_not_shown(source: str, shown: str) -> None:
    assert without_secrets(source) == shown


def test_parts_are_counted_from_any_of_them() -> None:
    names = [f"d/m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    assert all(parts_of(name) == names for name in names)
    assert parts_of("m.gguf") == ["m.gguf"]


@pytest.mark.parametrize("name", ["m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-99999.gguf"])
def test_parts_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ModelSourceError, match="cannot be part"):
        parts_of(name)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q8_0", "big/m-Q8_0-00001-of-00002.gguf"),
        ("K_M", "m-Q4_K_M.gguf"),
        ("4_K_M", None),
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("big/m-Q8_0-00002-of-00002.gguf", "big/m-Q8_0-00001-of-00002.gguf"),
        ("README.md", None),
    ],
)
def test_a_model_is_named_by_file_or_quantisation(wanted: str, chosen: str | None) -> None:
    names = ["README.md", "m-Q4_K_M.gguf", *(f"big/m-Q8_0-{number:05d}-of-00002.gguf" for number in (1, 2))]
    if chosen is None:
        with pytest.raises(ModelSourceError, match="there is no file"):
            choose(names, wanted, "it", "FILE")
    else:
        assert choose(names, wanted, "it", "FILE")[0] == chosen


@pytest.mark.parametrize(
    ("name", "stem"), [("a/b.Q4.gguf", "b.Q4"), ("b-00001-of-00002.GGUF", "b"), (".gguf", "model"), ("b", "b")]
)
def test_a_model_is_called_like_its_file(name: str, stem: str) -> None:
    assert stem_of(name) == stem


def _write(path: Path, data: bytes, validator: str | None = '"v1"', total: int | None = 10_000) -> None:
    with Partial(path) as partial:
        partial.expect(validator, total)
        partial.write(data, "it")


def test_a_partial_file_remembers_its_version_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    _write(path, MODEL[:6000])
    read: list[int] = []
    with Partial(path, read.append) as partial:
        assert (partial.size, partial.validator, partial.total) == (6000, '"v1"', 10_000)
        partial.write(MODEL[6000:], "it")
        assert partial.finish("it") == sha256(MODEL)
    assert read == [6000]
    assert path.read_bytes() == MODEL


@pytest.mark.parametrize(
    "note",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"validator": 1, "total": 2, "synced": 6000}',
        b'{"validator": null, "total": 10000}',
        b"\xff",
    ],
)
def test_bytes_without_a_readable_version_are_not_continued(tmp_path: Path, note: bytes | None) -> None:
    path = tmp_path / "x.partial"
    _write(path, MODEL[:6000])
    if note is None:
        (tmp_path / "x.json").unlink()
    else:
        (tmp_path / "x.json").write_bytes(note)
    with Partial(path) as partial:
        assert partial.size == 0
    assert path.read_bytes() == b""


def test_a_partial_file_longer_than_its_version_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    _write(path, MODEL, total=5000)
    with Partial(path) as partial:
        assert (partial.size, partial.total) == (0, None)


def test_a_file_that_a_store_has_taken_over_is_not_cut_when_another_version_comes(tmp_path: Path) -> None:
    path, blob = tmp_path / "x.partial", tmp_path / "blob"
    _write(path, MODEL)
    os.link(path, blob)
    with Partial(path) as partial:
        partial.restart()
        partial.expect('"v2"', 10_000)
        partial.write(MODEL[:100], "it")
    assert blob.read_bytes() == MODEL
    assert path.read_bytes() == MODEL[:100]


def test_a_version_is_noted_before_the_first_byte(tmp_path: Path) -> None:
    with Partial(tmp_path / "x.partial") as partial:
        partial.expect('"v2"', None)
        assert json.loads((tmp_path / "x.json").read_text()) == {"validator": '"v2"', "total": None, "synced": 0}
        assert (tmp_path / "x.partial").read_bytes() == b""


def test_a_file_that_is_started_again_forgets_the_version_it_was_of(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    _write(path, MODEL[:6000])
    with Partial(path) as partial:
        partial.restart()
        partial.expect(None, None)
        partial.write(MODEL[:10], "it")
    assert json.loads((tmp_path / "x.json").read_text()) == {"validator": None, "total": None, "synced": 10}


def test_bytes_that_a_power_cut_may_have_lost_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    _write(path, MODEL[:6000])
    with path.open("ab") as file:
        file.write(bytes(1000))  # what was not synced any more
    with Partial(path) as partial:
        assert partial.size == 6000
        partial.write(MODEL[6000:], "it")
        assert partial.finish("it") == sha256(MODEL)
    assert path.read_bytes() == MODEL
    path.write_bytes(MODEL[:5000])  # what had been synced is not all there
    with Partial(path) as partial:
        assert partial.size == 0


def test_bytes_are_synced_now_and_then_so_that_a_kill_loses_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(partial_module, "SYNC_BYTES", 3000)
    with Partial(tmp_path / "x.partial", clock=lambda: now) as partial:
        partial.expect('"v1"', 10_000)
        synced = []
        for start in range(0, 10_000, 1000):
            now = partial_module.SYNC_S + 1 if start >= 8000 else 0.0
            partial.write(MODEL[start : start + 1000], "it")
            synced.append(json.loads((tmp_path / "x.json").read_text())["synced"])
    assert synced == [0, 0, 3000, 3000, 3000, 6000, 6000, 6000, 9000, 9000]
    assert json.loads((tmp_path / "x.json").read_text())["synced"] == 10_000
