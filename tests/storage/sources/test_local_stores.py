"""Models of Ollama and LM Studio on this machine: adopted where they lie, and nothing outside their stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import ModelSourceError
from storage.sources import Pulled, pull
from tests.storage.sources.site import gguf, sha256

MODEL = gguf(10_000)
_TYPE = "application/vnd.ollama.image."


def _layer(store: Path, kind: str, data: bytes) -> dict[str, Any]:
    """A blob of Ollama's store, and the layer that names it."""
    blob = store / "blobs" / f"sha256-{sha256(data)}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    return {"mediaType": _TYPE + kind, "digest": f"sha256:{sha256(data)}", "size": len(data)}


def _manifest(store: Path, name: str, layers: Any, host: str = "registry.ollama.ai/library") -> Path:
    path = store / "manifests" / host / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return path


@pytest.fixture
def ollama(home: Path) -> Path:
    """Ollama's store in the home directory, with one model."""
    store = home / ".ollama" / "models"
    licence = _layer(store, "license", b"\n  Apache License\nVersion 2.0, January 2004\n")
    _manifest(store, "smollm2/135m", [_layer(store, "model", MODEL), licence, _layer(store, "params", b"{}")])
    return store


def _pull(source: str, tmp_path: Path, **options: Any) -> Pulled:
    return pull(source, tmp_path / "scratch", **options)


def test_a_model_of_ollama_is_adopted_with_the_digest_of_its_blob(ollama: Path, tmp_path: Path) -> None:
    said: list[tuple[int, int | None]] = []
    pulled = _pull(
        "ollama:smollm2:135m", tmp_path, offline=True, progress=lambda done, total: said.append((done, total))
    )
    (file,) = pulled.files
    assert file.path == (ollama / "blobs" / f"sha256-{sha256(MODEL)}").resolve()
    assert (file.adopt, file.sha256, file.digest, file.name) == (True, sha256(MODEL), None, "smollm2-135m.gguf")
    assert (pulled.suggested_name, pulled.licence) == ("smollm2-135m", "Apache License")
    assert pulled.source == "ollama:smollm2:135m"
    assert pulled.notes == ()
    assert said == [(len(MODEL), len(MODEL))]


def test_the_tag_is_latest_unless_told(ollama: Path, tmp_path: Path) -> None:
    _manifest(ollama, "tiny/latest", [_layer(ollama, "model", MODEL)])
    assert _pull("ollama:tiny", tmp_path).suggested_name == "tiny"


def test_ollama_models_says_where_the_store_is(ollama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    assert _pull("ollama:smollm2:135m", tmp_path).files[0].path.is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("source", "host"),
    [("ollama:me/mine:q4", "registry.ollama.ai/me"), ("ollama:hf.co/org/mine:q4", "hf.co/org")],
)
def test_models_of_other_people_and_registries_are_found(ollama: Path, tmp_path: Path, source: str, host: str) -> None:
    _manifest(ollama, "mine/q4", [_layer(ollama, "model", MODEL)], host)
    assert _pull(source, tmp_path).files[0].path.read_bytes() == MODEL


def test_a_model_that_is_not_there_names_those_that_are(ollama: Path, tmp_path: Path) -> None:
    _manifest(ollama, "mine/q4", [], "hf.co/org")
    with pytest.raises(ModelSourceError, match=r"There are: hf\.co/org/mine:q4, smollm2:135m\."):
        _pull("ollama:smollm2:360m", tmp_path)


def test_without_a_store_the_error_says_where_it_was_looked_for(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ModelSourceError, match=f"There are no models in {home}.*OLLAMA_MODELS"):
        _pull("ollama:smollm2", tmp_path)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../../private",
        "sha256:" + "a" * 63 + "/",
        "/etc/passwd",
        "../private",
        "sha256:" + "A" * 64,
        "sha512:" + "a" * 64,
        None,
        ["sha256:" + "a" * 64],
    ],
)
def test_a_manifest_that_names_a_path_is_refused(ollama: Path, tmp_path: Path, digest: Any) -> None:
    _manifest(ollama, "evil/latest", [{"mediaType": _TYPE + "model", "digest": digest, "size": 10}])
    with pytest.raises(ModelSourceError, match="which is no digest: refused"):
        _pull("ollama:evil", tmp_path)


def test_blobs_and_manifests_that_lead_out_of_the_store_are_not_followed(
    ollama: Path, tmp_path: Path, home: Path
) -> None:
    private = home / "private"
    private.write_bytes(MODEL)
    blob = ollama / "blobs" / f"sha256-{sha256(MODEL)}"
    blob.unlink()
    blob.symlink_to(private)
    with pytest.raises(ModelSourceError, match="leads out of"):
        _pull("ollama:smollm2:135m", tmp_path)
    manifest = _manifest(ollama, "linked/latest", [])
    outside = home / "manifest"
    manifest.rename(outside)
    manifest.symlink_to(outside)
    with pytest.raises(ModelSourceError, match="leads out of"):
        _pull("ollama:linked", tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "ollama:",
        "ollama:../x",
        "ollama:a/../b",
        "ollama:a:..",
        "ollama:a:",
        "ollama:/a",
        "ollama:a/b/c/d",
        "ollama:a:b/c",
    ],
)
def test_malformed_names_of_ollama_are_refused(ollama: Path, tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match="not of the form ollama:"):
        _pull(source, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 1}', '{"layers": [1]}', "[" * 100_000, "\xff"])
def test_a_damaged_manifest_is_an_error_for_people(ollama: Path, tmp_path: Path, text: str) -> None:
    path = _manifest(ollama, "bad/latest", [])
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelSourceError, match="cannot be read"):
        _pull("ollama:bad", tmp_path)


def test_a_blob_that_is_missing_or_not_whole_is_refused(ollama: Path, tmp_path: Path) -> None:
    blob = ollama / "blobs" / f"sha256-{sha256(MODEL)}"
    blob.write_bytes(MODEL[:-1])
    with pytest.raises(ModelSourceError, match="not whole"):
        _pull("ollama:smollm2:135m", tmp_path)
    blob.unlink()
    with pytest.raises(ModelSourceError, match="cannot be opened"):
        _pull("ollama:smollm2:135m", tmp_path)


@pytest.mark.parametrize("count", [0, 2])
def test_a_model_of_ollama_that_is_not_one_gguf_is_refused(ollama: Path, tmp_path: Path, count: int) -> None:
    _manifest(ollama, "odd/latest", [_layer(ollama, "model", gguf(100, seed)) for seed in range(count)])
    with pytest.raises(ModelSourceError, match=f"has {count} model layers"):
        _pull("ollama:odd", tmp_path)


def test_a_blob_that_is_no_gguf_is_refused(ollama: Path, tmp_path: Path) -> None:
    _manifest(ollama, "odd/latest", [_layer(ollama, "model", b"safetensors")])
    with pytest.raises(ModelSourceError, match="is no GGUF file"):
        _pull("ollama:odd", tmp_path)


def test_what_is_left_out_is_said(ollama: Path, tmp_path: Path) -> None:
    _manifest(ollama, "tuned/latest", [_layer(ollama, "model", MODEL), _layer(ollama, "adapter", b"GGUF")])
    assert "also has an adapter" in _pull("ollama:tuned", tmp_path).notes[0]


def test_the_limit_holds_for_adopted_models_too(ollama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="over the limit"):
        _pull("ollama:smollm2:135m", tmp_path, max_bytes=9_999)


@pytest.fixture(params=[".lmstudio", ".cache/lm-studio"])
def lmstudio(home: Path, request: pytest.FixtureRequest) -> Path:
    """LM Studio's models in the home directory, where newer and older versions keep them."""
    folder = home / str(request.param) / "models" / "pub" / "A-GGUF"
    folder.mkdir(parents=True)
    (folder / "a-Q4.gguf").write_bytes(MODEL)
    (folder / "mmproj-a.gguf").write_bytes(MODEL)
    return folder


def test_a_model_of_lm_studio_is_adopted(lmstudio: Path, tmp_path: Path) -> None:
    for source in ("lmstudio:pub/A-GGUF", "lmstudio:pub/A-GGUF/a-Q4.gguf", "lmstudio:pub/A-GGUF/Q4"):
        pulled = _pull(source, tmp_path, offline=True)
        (file,) = pulled.files
        assert (file.path, file.adopt, file.name) == ((lmstudio / "a-Q4.gguf").resolve(), True, "a-Q4.gguf")
        assert (pulled.source, pulled.suggested_name) == ("lmstudio:pub/A-GGUF/a-Q4.gguf", "a-Q4")


def test_parts_of_lm_studio_come_in_order(lmstudio: Path, tmp_path: Path) -> None:
    for number in (2, 1):
        (lmstudio / f"b-{number:05d}-of-00002.gguf").write_bytes(MODEL)
    pulled = _pull("lmstudio:pub/A-GGUF/b-00002-of-00002.gguf", tmp_path)
    assert [file.name for file in pulled.files] == ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]
    with pytest.raises(ModelSourceError, match=r"2 models. Name one as lmstudio:pub/A-GGUF/FILE"):
        _pull("lmstudio:pub/A-GGUF", tmp_path)


def test_a_model_that_lm_studio_lacks_names_those_that_are_there(lmstudio: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"There are: pub/A-GGUF\."):
        _pull("lmstudio:pub/B-GGUF", tmp_path)


def test_lmstudio_home_says_where_its_models_are(
    lmstudio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMSTUDIO_HOME", str(tmp_path / "none"))
    with pytest.raises(ModelSourceError, match=f"There are no models in {tmp_path / 'none'}"):
        _pull("lmstudio:pub/A-GGUF", tmp_path)


def test_links_out_of_lm_studios_models_are_not_followed(lmstudio: Path, tmp_path: Path, home: Path) -> None:
    (home / "private.gguf").write_bytes(MODEL)
    (lmstudio / "c-Q8.gguf").symlink_to(home / "private.gguf")
    with pytest.raises(ModelSourceError, match="leads out of"):
        _pull("lmstudio:pub/A-GGUF/c-Q8.gguf", tmp_path)


@pytest.mark.parametrize(
    "source", ["lmstudio:", "lmstudio:pub", "lmstudio:../x", "lmstudio:a/b/../c.gguf", "lmstudio:/a/b"]
)
def test_malformed_names_of_lm_studio_are_refused(lmstudio: Path, tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match="not of the form lmstudio:"):
        _pull(source, tmp_path)
