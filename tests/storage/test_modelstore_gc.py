"""Removing from the model store and collecting what is no longer needed, also while others add, read and collect."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import ModelStoreError
from storage.blobs import STALE_S, Blobs
from storage.digest import Digest
from storage.manifest import Manifest, ModelName
from storage.modelstore import ModelStore
from storage.verifying import Damaged, Verification
from tests.storage.small_models import small_model, split_model
from tests.storage.stores import digest_of, files_of


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


# ---------------------------------------------------------------- removing


def test_removing_keeps_what_another_model_needs(store: ModelStore, model: Path) -> None:
    added = store.add(model, name=ModelName("a"))
    store.add(model, name=ModelName("b"))
    assert store.remove(ModelName("a")) == 0
    assert store.path(store.find("b")).exists()
    assert store.remove(ModelName("b")) == added.size
    assert files_of(store, "blobs") == files_of(store, "trash") == files_of(store, "manifests") == []
    with pytest.raises(ModelStoreError, match="no model b"):
        store.remove(ModelName("b"))


def test_gc_evicts_the_least_recently_used_but_no_pinned_ones(store: ModelStore, tmp_path: Path) -> None:
    models = [store.add(small_model(tmp_path / f"m{seed}.gguf", seed), pinned=seed == 0) for seed in range(4)]
    for age, model in enumerate(reversed(models)):
        store.use(model)
        make_old(store.root / "manifests" / model.name.name / "latest.used", 100.0 * (age + 1))
    store.use(models[1])
    size = models[0].size
    tried = store.gc(2 * size, dry_run=True)
    assert [str(name) for name in tried.models] == ["m2", "m3"]
    assert len(files_of(store, "blobs")) == 4
    done = store.gc(2 * size)
    assert (done.models, done.blobs, done.freed_bytes) == (tried.models, 2, 2 * size)
    assert sorted(str(name) for name in store.names()) == ["m0", "m1"]
    assert [str(name) for name in store.gc(0).models] == ["m1"]


def test_gc_sweeps_what_is_old_and_nobodys(store: ModelStore, model: Path) -> None:
    store.add(model)
    fd, _ = store.blobs.scratch()
    os.write(fd, b"12345")
    os.close(fd)
    orphan = store.blobs.path(Digest("1" * 64))
    orphan.write_bytes(b"123")
    assert store.gc().freed_bytes == 3, "somebody may still write the partial file"
    later = ModelStore(store.root, lambda: time.time() + STALE_S + 1)
    assert later.gc().freed_bytes == 5
    assert files_of(store, "partial") == []


# ---------------------------------------------------------------- at once


def test_two_that_add_the_same_model_at_once_both_succeed(store: ModelStore, model: Path) -> None:
    barrier, found, errors = threading.Barrier(4), [], []

    def run() -> None:
        barrier.wait()
        try:
            for _ in range(10):
                found.append(ModelStore(store.root).add(model).digest)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(found) == {digest_of(model)}
    assert files_of(store, "partial") == []


STEPS: list[str] = ["announced", "put", "written", "settled"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_model_is_whole_wherever_a_collection_falls_into_its_adding(
    store: ModelStore, model: Path, step: str, links: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gc runs from beginning to end at some point of an add, the blob being there already as nobody's, or not."""
    if not links:
        real = os.link
        monkeypatch.setattr(os, "link", lambda *_: real("/nowhere", "/nowhere"))
    if there:
        path = store.blobs.path(digest_of(model))
        path.parent.mkdir(parents=True)
        path.write_bytes(model.read_bytes())
    interrupt_at(monkeypatch, step, lambda: ModelStore(store.root).gc())
    added = store.add(model)
    assert store.path(added).read_bytes() == model.read_bytes()
    assert files_of(store, "partial") == files_of(store, "trash") == []


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: str, what: Callable[[], object]) -> None:
    """Call `what` once, right after the named step of an add."""
    fired: list[str] = []

    def wrap(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: object, **options: object) -> object:
            result = real(*args, **options)
            if not fired:
                fired.append(name)
                what()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    if step == "announced":
        wrap(Blobs, "ingest")
    elif step == "put":
        wrap(Blobs, "put")
    elif step == "written":
        wrap(ModelStore, "_write")
    else:
        wrap(Blobs, "settle")


def test_a_blob_that_is_named_while_it_is_collected_comes_back(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    store._forget(added.name)
    answers = iter([set(), {added.digest}])
    assert store.blobs.collect(added.digest, lambda: next(answers)) == 0
    assert store.blobs.has(added.digest)


def test_a_blob_comes_back_if_it_cannot_be_known_whether_it_is_named(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    answers: list[set[Digest]] = [set()]

    def wanted() -> set[Digest]:
        if not answers:
            raise ModelStoreError("a manifest is damaged")
        return answers.pop()

    with pytest.raises(ModelStoreError):
        store.blobs.collect(added.digest, wanted)
    assert store.path(added).read_bytes() == model.read_bytes()


@pytest.mark.parametrize("by", ["use", "gc", "verify"])
def test_a_blob_that_a_killed_collection_left_in_the_trash_is_put_back(store: ModelStore, model: Path, by: str) -> None:
    added = store.add(model)
    blob = store.blobs.path(added.digest)
    os.rename(blob, store.blobs.folder("trash") / f"{blob.name}.1.2")
    if by == "gc":
        later = ModelStore(store.root, lambda: time.time() + STALE_S + 1)
        assert later.gc().freed_bytes == 0
    elif by == "verify":
        assert store.verify([added]).damaged == ()
    assert store.path(added).read_bytes() == model.read_bytes()


def test_gc_does_not_take_what_another_gc_has_just_moved_aside(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    make_old(store.blobs.path(added.digest), 2 * STALE_S)
    store._forget(added.name)
    first = True

    def wanted() -> set[Digest]:
        nonlocal first
        if first:
            first = False
            return set()
        ModelStore(store.root).gc()
        return {added.digest}

    assert store.blobs.collect(added.digest, wanted) == 0
    assert store.blobs.has(added.digest)


def test_gc_leaves_the_second_name_of_an_old_file_that_is_being_added(store: ModelStore, model: Path) -> None:
    make_old(model, 2 * STALE_S)
    added = store.add(model, link=True, progress=lambda _: print(ModelStore(store.root).gc()))
    assert store.path(added).read_bytes() == model.read_bytes()


def test_gc_leaves_all_files_of_a_pull_that_goes_on(store: ModelStore) -> None:
    pulls, key = store.blobs.folder("pulls"), "pull-" + "0" * 20
    for name in (f"{key}.lock", f"{key}-123.json", f"{key}-123.partial"):
        (pulls / name).write_bytes(b"12345")
    day_after = time.time() + 2 * STALE_S
    os.utime(pulls / f"{key}-123.partial", (day_after, day_after))
    ModelStore(store.root, lambda: day_after).gc()
    assert len(files_of(store, "pulls")) == 3
    ModelStore(store.root, lambda: day_after + 2 * STALE_S).gc()
    assert files_of(store, "pulls") == []


def test_an_add_that_is_interrupted_leaves_no_second_name(store: ModelStore, model: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(model, link=True, progress=interrupt)
    assert files_of(store, "partial") == []


def test_a_model_that_is_removed_while_others_look_is_not_damaged(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = store.add(model, name=ModelName("a"))
    store.add(model, name=ModelName("b"))
    names = list(store.names())
    monkeypatch.setattr(ModelStore, "_names", lambda *_: iter(names))
    store._forget(added.name)
    assert [str(found.name) for found in store.models() if isinstance(found, Manifest)] == ["b"]
    assert len(store.models()) == 1
    store.gc()


@pytest.mark.parametrize("while_it_is_made", [False, True])
def test_a_folder_that_another_removes_is_made_again(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch, while_it_is_made: bool
) -> None:
    real = Path.mkdir
    fired: list[bool] = []

    def made_and_removed(self: Path, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if self.name == "small-1" and not fired:
            fired.append(True)
            self.rmdir()
            if while_it_is_made:
                raise FileExistsError(errno.EEXIST, "File exists", str(self))

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    added = store.add(model)
    assert fired
    assert store.find("small-1") == added


def test_a_view_that_a_collection_removes_while_it_is_made_leaves_nothing_behind(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    fired: list[bool] = []

    def replace(old: Any, new: Any) -> None:
        if Path(new).parent.parent.name == "views" and not fired:
            fired.append(True)
            Path(new).parent.rmdir()
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    added = store.add(split_model(tmp_path / "files")[0])
    assert fired
    assert store.path(added).exists()
    assert files_of(store, "partial") == []


# ---------------------------------------------------------------- who may do what


def refusing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, what: Path) -> None:
    """Have `owner.name` refuse `what`, as it would for another user."""
    real = getattr(owner, name)

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(path, int) and os.fspath(path) == str(what):
            raise PermissionError(errno.EACCES, "Permission denied", str(what))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, name, refuse)


def test_nothing_is_collected_where_manifests_cannot_be_looked_at(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = store.add(model, name=ModelName("theirs/a"))
    refusing(monkeypatch, os, "scandir", store.root / "manifests" / "theirs")
    with pytest.raises(ModelStoreError, match=r"theirs .*Permission denied.*nothing is collected"):
        store.gc()
    assert store.blobs.has(added.digest)
    assert [type(found) for found in store.models()] == [Damaged]


def test_nothing_is_collected_where_an_announcement_cannot_be_read(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = store.add(model)
    store._forget(added.name)
    with store.blobs.announced([added.digest]):
        (marker,) = (store.root / "partial").iterdir()
        assert marker.stat().st_mode & 0o444 == 0o444
        refusing(monkeypatch, Path, "read_text", marker)
        with pytest.raises(ModelStoreError, match="Permission denied"):
            store.gc()
    assert store.blobs.has(added.digest)


def test_what_is_anothers_is_not_swept(store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(model)
    fd, left = store.blobs.scratch()
    os.close(fd)
    refusing(monkeypatch, os, "unlink", left)
    assert ModelStore(store.root, lambda: time.time() + STALE_S + 1).gc().freed_bytes == 0
    assert left.exists()


def test_a_store_that_may_only_be_read_is_verified_and_used(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = store.add(split_model(tmp_path / "files")[0])
    Verification(store.blobs, set, time.time).note(added.files[0].digest)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in ((Path, "unlink"), (Path, "mkdir"), (Path, "touch"), (os, "replace"), (os, "rename")):
        monkeypatch.setattr(owner, name, refuse)
    assert store.path(added).is_file()
    assert store.verify([added]).damaged == ()
    store.use(added)


def test_a_disk_that_is_full_when_files_are_announced_is_said(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.blobs.folder("partial")
    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(ModelStoreError, match=r"No space left.*make room"):
        store.add(model, link=True)
    assert files_of(store, "partial") == []
