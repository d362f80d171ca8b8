"""Hashing blobs again: what is damaged is told and put away, what was done is not done again."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from storage.blobs import STALE_S
from storage.digest import Digest
from storage.manifest import ModelName
from storage.modelstore import ModelStore
from storage.verifying import Verification
from tests.storage.small_models import small_model


def test_verify_finds_a_flipped_bit_and_puts_the_file_away(store: ModelStore, model: Path, tmp_path: Path) -> None:
    added = store.add(model)
    other = store.add(small_model(tmp_path / "other.gguf", seed=1))
    data = bytearray(store.path(added).read_bytes())
    data[-1] ^= 1
    store.path(added).write_bytes(data)
    result = store.verify([added, other])
    assert (result.blobs, result.hashed_bytes) == (2, added.size + other.size)
    assert [(one.what, one.models) for one in result.damaged] == [(str(added.digest), (str(added.name),))]
    assert str(Digest(hashlib.sha256(data).hexdigest())) in result.damaged[0].why
    assert not store.blobs.has(added.digest)
    assert store.verify([other]).damaged == ()


def test_verify_goes_on_where_it_was_interrupted(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.verifying.HASH_THREADS_MAX", 1)
    added = [store.add(small_model(tmp_path / f"{seed}.gguf", seed)) for seed in range(4)]
    seen = 0

    def interrupt(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.verify(added, interrupt)
    again: list[int] = []
    result = store.verify(added, again.append)
    assert result.blobs == 4
    # Two were done, and perhaps the one after that before the thread heard of it.
    assert 1 <= len(again) <= 2
    assert store.verify(added).hashed_bytes == sum(model.size for model in added), "a whole one begins anew"


def test_a_file_that_is_removed_while_it_is_verified_is_not_damaged(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    store.remove(added.name)
    assert store.verify([added]).damaged == ()


def test_what_is_replaced_while_it_is_verified_is_not_put_away(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    blob = store.blobs.path(added.digest)
    blob.write_bytes(b"damaged")
    fired: list[bool] = []

    def mend(_: int) -> None:
        if not fired:
            fired.append(True)
            store.add(model)

    assert store.verify([added], mend).damaged == ()
    assert store.path(added).read_bytes() == model.read_bytes()


def test_two_that_verify_at_once_both_tell_the_damage(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    store.blobs.path(added.digest).write_bytes(b"damaged")
    found: list[int | None] = []

    def too(_: int) -> None:
        if not found:
            found.append(None)
            found[:] = [len(ModelStore(store.root).verify([added]).damaged)]

    assert len(store.verify([added], too).damaged) == 1
    assert found == [1]


def test_a_verification_of_long_ago_is_not_gone_on_with(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    verification = Verification(store.blobs, set, time.time)
    verification.note(added.digest)
    assert store.verify([added]).hashed_bytes == 0
    verification.note(added.digest)
    then = time.time() - STALE_S - 1
    os.utime(store.root / "partial" / "verified", (then, then))
    assert store.verify([added]).hashed_bytes == added.size


def test_a_link_in_a_blobs_place_is_damage_wherever_it_leads(store: ModelStore, model: Path) -> None:
    added = store.add(model)
    blob = store.blobs.path(added.digest)
    blob.unlink()
    blob.symlink_to(model)
    for _ in range(2):  # whatever is noted of the file that it leads to
        [found] = store.verify([added]).damaged
        assert "does not follow links" in found.why
    assert model.exists()


def test_a_blob_that_is_missing_is_said_to_be(store: ModelStore, model: Path) -> None:
    first = store.add(model)
    second = store.add(model, name=ModelName("again"))
    store.blobs.path(first.digest).unlink()
    [found] = store.verify([first, second]).damaged
    assert "is missing; add or pull the model again" in found.why
    assert found.models == (str(first.name), "again")
