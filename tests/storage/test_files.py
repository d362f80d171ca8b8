"""The real disk: appends, cuts, replaces at once, and locks that belong to an opening."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.files import OsDisk, read_all, replace_file

DISK = OsDisk()


def test_an_append_file_grows_and_is_cut(tmp_path: Path) -> None:
    file = DISK.open_append(tmp_path / "a")
    file.write(b"hello ")
    file.write(b"world")
    file.sync()
    assert file.size() == 11
    file.truncate(5)
    file.write(b"!")
    file.close()
    file.close()
    assert read_all(DISK, tmp_path / "a") == b"hello!"


def test_replacing_leaves_no_temporary_file_and_survives_an_old_one(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"left over from a crash, and longer")
    replace_file(DISK, tmp_path / "a", b"one")
    replace_file(DISK, tmp_path / "a", b"two")
    assert DISK.list_dir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"


def test_reading_a_small_file_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_all(DISK, tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="over 4 bytes"):
        read_all(DISK, tmp_path / "a", 4)


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    DISK.remove(tmp_path / "a")


def test_a_lock_is_held_by_one_opening_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not DISK.locked(path)
    lock = DISK.try_lock(path)
    assert lock is not None
    assert DISK.locked(path)
    assert DISK.try_lock(path) is None
    read_all(DISK, path)
    assert DISK.locked(path), "closing another descriptor of the file releases nothing"
    lock.release()
    lock.release()
    assert not DISK.locked(path)
    again = DISK.try_lock(path)
    assert again is not None
    again.release()
