"""Compressed bytes: read whole whatever their pieces; cut off or damaged they are refused; a bomb stays small."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.compressed import Stored, packing, stdin_for_ranks, unpacked
from scheduling.errors import ConfigError, InputError

PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress}
SAME_FOLDER = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: Path, size: int = 1 << 16) -> bytes:
    with Stored(path) as stored:
        file = unpacked(stored)
        pieces = []
        while piece := file.read(size):
            assert len(piece) <= size
            pieces.append(piece)
        assert file.tell() == sum(map(len, pieces))
        return b"".join(pieces)


@pytest.mark.parametrize("kind", PACK)
@SAME_FOLDER
@given(contents=st.lists(st.binary(max_size=300), min_size=1, max_size=4), size=st.integers(1, 40))
def test_members_after_one_another_are_one_text(tmp_path: Path, kind: str, contents: list[bytes], size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"".join(PACK[kind](content) for content in contents))
    assert read_all(path, size) == b"".join(contents)


@pytest.mark.parametrize("kind", PACK)
def test_more_than_one_chunk_is_read(tmp_path: Path, kind: str) -> None:
    content = b"".join(b"%d\n" % k for k in range(60_000))
    path = tmp_path / "f"
    path.write_bytes(PACK[kind](content))
    assert read_all(path) == content


@pytest.mark.parametrize("kind", PACK)
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    whole = PACK[kind](b"some text, some more text, and text " * 20)
    path = tmp_path / "cut"
    for size in range(4, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut is cut off"):
            read_all(path)


@pytest.mark.parametrize("kind", PACK)
def test_damage_is_refused_and_never_read_as_text(tmp_path: Path, kind: str) -> None:
    content = bytes(range(256)) * 4
    if kind == "zstd":
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    else:
        whole = gzip.compress(content)
    path = tmp_path / "bad"
    refused = 0
    for place in range(len(whole) // 2, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            assert read_all(path) == content
        except InputError:
            refused += 1
    assert refused > len(whole) // 3


def test_what_follows_compressed_data_is_refused_unless_it_is_padding(tmp_path: Path) -> None:
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(b"text") + bytes(600))
    assert read_all(path) == b"text"
    path.write_bytes(gzip.compress(b"text") + b"rubbish")
    with pytest.raises(InputError, match="damaged"):
        read_all(path)


def test_an_empty_file_with_the_name_of_a_compressed_one_is_cut_off(tmp_path: Path) -> None:
    for name in ("f.gz", "f.zst"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="cut off"):
            read_all(tmp_path / name)
    (tmp_path / "f.gz").write_bytes(b"not compressed")
    assert read_all(tmp_path / "f.gz") == b"not compressed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACK)
def test_a_bomb_takes_little_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb"
    block, count = bytes(1 << 20), 128
    with open(path, "wb") as file:
        pack = zstandard.ZstdCompressor().compressobj() if kind == "zstd" else zlib.compressobj(1, zlib.DEFLATED, 31)
        for _ in range(count):
            file.write(pack.compress(block))
        file.write(pack.flush())
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        with Stored(path) as stored:
            packed, size = unpacked(stored), 0
            while piece := packed.read(1 << 20):
                size += len(piece)
        assert size == count << 20
        assert tracemalloc.get_traced_memory()[1] < 96 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x53\x2a\x4d\x18", "zstd"),
        (b'{"a"', None),
        (b"", None),
    ],
)
def test_the_first_bytes_say_what_packed_a_file(head: bytes, kind: str | None) -> None:
    assert packing(head) == kind


def test_without_zstandard_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.zst"
    path.write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(ConfigError, match=r"llmpi\[zstd\]"):
        read_all(path)


def test_python_s_own_zstd_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        """What Python 3.14 calls compression.zstd, over the package."""

        ZstdError = zstandard.ZstdError

        @staticmethod
        def ZstdDecompressor() -> object:  # noqa: N802 - its name there
            return zstandard.ZstdDecompressor().decompressobj()

    path = tmp_path / "f.zst"
    path.write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(
        "coordinator.compressed.importlib.import_module", lambda name: Own if name == "compression.zstd" else None
    )
    assert read_all(path) == b"text"


def test_peeking_takes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abcdef")
    with Stored(path) as stored:
        assert stored.peek(4) == b"abcd"
        assert (stored.done, stored.tell()) == (0, 0)
        assert stored.read(3) + stored.read(9) + stored.read(9) == b"abcdef"
        assert stored.peek(4) == b""
        assert stored.done == 6


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing does not exist"):
        Stored(tmp_path / "nothing")


def test_standard_input_that_is_closed_is_not_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stdin__", None)
    with pytest.raises(InputError, match="standard input cannot be read: it is closed"):
        Stored(Path("-"))
    assert stdin_for_ranks() == {}
