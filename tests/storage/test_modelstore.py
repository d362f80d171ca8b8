"""The model store: what is put in is found, whole and under its name, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduling.errors import ModelFileError, ModelStoreError
from storage import blobs as blobs_module
from storage.digest import Digest
from storage.gguf import check_gguf
from storage.manifest import Manifest, ModelName, suggested_name
from storage.modelstore import ModelStore, default_root, one_model_in
from storage.verifying import Damaged
from tests.storage.small_models import small_model, split_model
from tests.storage.stores import digest_of, files_of

# ---------------------------------------------------------------- adding and finding


def test_a_model_is_found_by_its_name_and_by_its_digest(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    assert (str(added.name), added.digest, added.size) == ("small-1", digest_of(model), model.stat().st_size)
    for text in ("small-1", "small-1:latest", str(added.digest)):
        assert store.find(text) == added
    assert store.path(added).read_bytes() == model.read_bytes()
    assert added.gguf["architecture"] == "llama"
    assert files_of(store, "partial") == []


def test_the_same_bytes_are_stored_once(store: ModelStore, model: Path) -> None:
    first = store.add(model, name=ModelName("a"))
    second = store.add(model, name=ModelName("b", "q8_0"))
    assert first.digest == second.digest
    assert files_of(store, "blobs") == [first.digest.file_name]
    assert [str(found.name) for found in store.models() if isinstance(found, Manifest)] == ["a", "b:q8_0"]
    assert store.add(model, name=ModelName("a")) == first, "once more changes nothing"


def test_a_split_model_is_one_model(store: ModelStore, tmp_path: Path) -> None:
    parts = split_model(tmp_path / "files")
    added = store.add(parts[0])
    assert str(added.name) == "big"
    assert [file.name for file in added.files] == [part.name for part in parts]
    path = store.path(added)
    assert check_gguf(path).file_bytes == sum(part.stat().st_size for part in parts)
    assert store.find(str(added.digest)) == store.find(str(added.files[1].digest)) == added
    # What llama.cpp opens can be made again.
    path.unlink()
    assert check_gguf(store.path(added)).parts[2].read_bytes() == parts[2].read_bytes()


def test_another_model_does_not_take_a_name_unasked(store: ModelStore, model: Path, tmp_path: Path) -> None:
    first, other = store.add(model, name=ModelName("a")), small_model(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ModelStoreError, match="another model already"):
        store.add(other, name=ModelName("a"))
    assert store.find("a") == first
    assert store.add(other, name=ModelName("a"), replace_other=True).digest == digest_of(other)


def test_what_is_no_model_is_not_copied(store: ModelStore, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileError):
        store.add(bad)
    assert not store.root.exists()


def test_a_file_that_is_not_what_was_promised_goes_to_quarantine(store: ModelStore, model: Path) -> None:
    promised = Digest("0" * 64)
    with pytest.raises(ModelStoreError) as caught:
        store.add(model, expected=[promised])
    assert str(promised) in str(caught.value)
    assert str(digest_of(model)) in str(caught.value)
    assert files_of(store, "blobs") == files_of(store, "partial") == []
    assert files_of(store, "quarantine") == [f"{promised.file_name}.is-{digest_of(model).file_name}"]


def test_a_link_is_the_same_file_and_a_copy_is_not(store: ModelStore, model: Path) -> None:
    linked = store.add(model, link=True, name=ModelName("linked"))
    assert os.path.samefile(store.path(linked), model)
    store.remove(ModelName("linked"))
    assert model.exists()
    assert not os.path.samefile(store.path(store.add(model)), model)


def test_where_links_cannot_be_made_it_is_copied(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    added = store.add(model, link=True)
    assert not os.path.samefile(store.path(added), model)
    assert digest_of(store.path(added)) == added.digest
    assert files_of(store, "partial") == []


def test_a_file_that_changes_while_it_is_read_is_refused(store: ModelStore, model: Path) -> None:
    def change(_: int) -> None:
        with model.open("ab") as file:
            file.write(b"x")

    with pytest.raises(ModelStoreError, match="changed while"):
        store.add(model, progress=change)
    assert files_of(store, "blobs") == files_of(store, "partial") == []


def test_a_full_disk_is_said_before_anything_is_written(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "SPARE_BYTES", 1 << 62)
    with pytest.raises(ModelStoreError, match="GB are needed"):
        store.add(model)


def test_a_model_that_is_removed_while_it_is_listed_has_no_problem(store: ModelStore, model: Path) -> None:
    listed = store.add(model)
    assert store.problem(listed) is None
    store.remove(listed.name)
    assert store.problem(listed) is None


def test_an_unknown_name_says_what_there_is(store: ModelStore, model: Path) -> None:
    with pytest.raises(ModelStoreError, match="it is empty"):
        store.find("a")
    store.add(model)
    with pytest.raises(ModelStoreError, match="it has small-1"):
        store.find("a")


# ---------------------------------------------------------------- damage


def test_links_out_of_the_store_are_not_followed(store: ModelStore, model: Path, tmp_path: Path) -> None:
    added = store.add(model)
    path = store.path(added)
    secret = tmp_path / "secret"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(ModelStoreError, match="does not follow links"):
        store.path(added)


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_blob_that_is_cut_or_lost_is_said_and_can_be_added_again(store: ModelStore, model: Path, change: str) -> None:
    added = store.add(model)
    path = store.path(added)
    path.unlink() if change == "gone" else os.truncate(path, 100)
    with pytest.raises(ModelStoreError, match="lost" if change == "gone" else "instead of"):
        store.path(added)
    assert store.add(model) == added
    assert digest_of(store.path(added)) == added.digest


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"schema": 1}', b"\xff", b'{"schema": 2}', b"null", b"[" * 9999]
)
def test_a_damaged_manifest_is_listed_as_such_and_nothing_is_collected(
    store: ModelStore, model: Path, content: bytes
) -> None:
    store.add(model, name=ModelName("a"))
    (store.root / "manifests" / "a" / "latest.json").write_bytes(content)
    found = store.models()
    assert [type(one) for one in found] == [Damaged]
    with pytest.raises(ModelStoreError, match="nothing is collected"):
        store.gc()
    assert len(files_of(store, "blobs")) == 1
    assert store.add(model, name=ModelName("a")) == store.find("a")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_a_changed_manifest_is_refused_or_says_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = _stored(tmp_path_factory)
    path = store.root / "manifests" / "small" / "latest.json"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    before = store.find("small")
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        try:
            found = store.find("small")
        except ModelStoreError:
            return
        assert [file.digest for file in found.files] == [file.digest for file in before.files]
    finally:
        path.write_bytes(original)


_kept: list[ModelStore] = []


def _stored(factory: pytest.TempPathFactory) -> ModelStore:
    if not _kept:
        folder = factory.mktemp("manifest")
        _kept.append(ModelStore(folder / "store"))
        _kept[0].add(small_model(folder / "small.gguf"))
    return _kept[0]


# ---------------------------------------------------------------- strange names


@pytest.mark.parametrize("name", ["sha256", "sha256:q8", "m.gguf", "m:a.GGUF", "a/latest.used", "a:b.json"])
def test_names_that_would_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ModelStoreError, match="no name of a model"):
        ModelName.parse(name)


@pytest.mark.parametrize(
    ("stem", "name"), [("Model.gguf", "model"), ("a.used.json", "a"), (".gguf", "gguf"), ("sha256", "model")]
)
def test_a_name_is_suggested_that_can_be_used(stem: str, name: str) -> None:
    assert str(suggested_name(stem)) == name


def test_a_path_that_is_no_text_is_recorded_as_far_as_it_is(store: ModelStore, model: Path, tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"strange\xff.gguf")
    model.rename(strange)
    added = store.add(strange)
    assert added.files[0].name == "strange?.gguf"
    assert store.find("strange") == added


# ---------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"LLMPI_HOME": "/data/llmpi", "XDG_DATA_HOME": "/x"}, "/data/llmpi/models"),
        ({"XDG_DATA_HOME": "/x"}, "/x/llmpi/models"),
        ({"XDG_DATA_HOME": "relative"}, str(Path.home() / ".local/share/llmpi/models")),
        ({}, str(Path.home() / ".local/share/llmpi/models")),
    ],
)
@pytest.mark.skipif(os.uname().sysname != "Linux", reason="another platform has another place")
def test_the_store_is_where_the_environment_says(environment: dict[str, str], root: str) -> None:
    assert str(default_root(environment)) == root


def test_a_folder_holds_one_model_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no \.gguf"):
        one_model_in(tmp_path)
    parts = split_model(tmp_path)
    assert one_model_in(tmp_path) == parts[0]
    small_model(tmp_path / "other.gguf")
    with pytest.raises(ModelFileError, match="holds 2 models"):
        one_model_in(tmp_path)


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, model: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelStoreError, match="LLMPI_HOME"):
        ModelStore(blocked / "store").add(model)


def test_a_manifest_is_json_that_others_can_read(store: ModelStore, model: Path) -> None:
    store.add(model, licence="mit", source="https://example.org/m.gguf")
    state = json.loads((store.root / "manifests" / "small-1" / "latest.json").read_text())
    assert state["files"][0]["digest"] == state["digest"] == str(digest_of(model))
    assert (state["licence"], state["source"], state["schema"]) == ("mit", "https://example.org/m.gguf", 1)
    assert state["created_at"].endswith("Z")


def test_names_that_the_file_system_does_not_tell_apart_are_refused(store: ModelStore, tmp_path: Path) -> None:
    added = store.add(small_model(tmp_path / "a.gguf", 1), name=ModelName("some/small"))
    (store.root / "manifests" / "Some").symlink_to(store.root / "manifests" / "some")  # as such a file system has it
    for link in (True, False):
        with pytest.raises(ModelStoreError, match=r"Some/small is the name of another model but for upper and lower"):
            store.add(small_model(tmp_path / "b.gguf", 2), name=ModelName("Some/small"), link=link, replace_other=True)
    assert store.find("some/small") == added
    assert files_of(store, "blobs") == [added.digest.file_name]
    assert files_of(store, "partial") == []
