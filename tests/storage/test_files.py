"""The real disk: appends, cuts, replaces at once, and locks that belong to an opening."""

from __future__ import annotations

import errno
import os
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


def test_a_disk_that_fails_does_not_say_that_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there would be taken for new, and written over."""
    (tmp_path / "a").write_bytes(b"1")
    assert DISK.exists(tmp_path / "a")
    assert not DISK.exists(tmp_path / "b")
    assert not DISK.exists(tmp_path / "a" / "b")
    assert DISK.is_dir(tmp_path)
    assert not DISK.is_dir(tmp_path / "a")
    assert not DISK.is_dir(tmp_path / "b")

    def gone(path: Path) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(os, "lstat", gone)
    monkeypatch.setattr(os, "stat", gone)
    for look in (DISK.exists, DISK.is_dir):
        with pytest.raises(OSError, match="not connected"):
            look(tmp_path / "a")


def test_closing_says_nothing_of_a_disk_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes has synced before, or does not count what was written."""
    file, lock = DISK.open_append(tmp_path / "a"), DISK.try_lock(tmp_path / "lock")
    assert lock is not None
    close = os.close

    def refuses(fd: int) -> None:
        close(fd)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(os, "close", refuses)
    file.close()
    lock.release()
