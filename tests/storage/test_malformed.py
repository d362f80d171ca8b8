"""Every kind of malformed GGUF is refused in words that say where, every kind of good one accepted, as ggml does."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from scheduling.errors import ModelFileError
from storage.ggmltypes import TENSOR_TYPES
from storage.ggufheader import read_header
from storage.ggufreader import GgufReader
from tests.storage.ggml import ask_ggml, ggml_library
from tests.storage.malformed import (
    ARRAY,
    CASES,
    KINDS_OF_LLAMA_CPP,
    STRING,
    U8,
    U32,
    Case,
    Draft,
    Pair,
    Tensor,
    text,
    texts,
)

SEEDS = range(3)


def refusal(path: Path) -> str | None:
    """What is said of a file; None if it is accepted."""
    try:
        read_header(path)
    except ModelFileError as error:
        return str(error)
    return None


def asked(paths: list[Path]) -> list[str]:
    library = ggml_library()
    if library is None:
        if os.environ.get("CI"):
            pytest.fail("llama-cpp-python's ggml is not there", pytrace=False)
        pytest.skip("llama-cpp-python's ggml is not there")
    return [str(verdict) for verdict in ask_ggml(library, paths)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_of_each_kind_is_accepted_or_refused_with_its_reason(tmp_path: Path, name: str, seed: int) -> None:
    case, path = CASES[name], tmp_path / "m.gguf"
    path.write_bytes(case.make(Random(seed)).build())
    said = refusal(path)
    if case.refused is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(str(path))
        assert case.refused in said
        assert "\n" not in said


def test_no_kind_of_llama_cpps_own_test_is_left_out() -> None:
    assert len(KINDS_OF_LLAMA_CPP) == 34
    assert {name for name, case in KINDS_OF_LLAMA_CPP.items() if case.refused is None} == {
        "HEADER_EMPTY", "KV_SUCCESS", "TENSORS_ZERO_DIM", "TENSORS_SUCCESS", "TENSORS_CUSTOM_ALIGN", "DATA_SUCCESS",
        "DATA_CUSTOM_ALIGN",
    }  # fmt: skip


@pytest.mark.system
@pytest.mark.slow
def test_ggml_agrees_but_where_the_table_says_why_not(tmp_path: Path) -> None:
    paths: list[tuple[str, Case, Path]] = []
    for name, case in CASES.items():
        for seed in SEEDS:
            path = tmp_path / f"{len(paths)}.gguf"
            path.write_bytes(case.make(Random(seed)).build())
            paths.append((name, case, path))
    for (name, case, _), verdict in zip(paths, asked([path for _, _, path in paths]), strict=True):
        assert verdict in expected_of_ggml(case), f"{name}: ggml says {verdict}, we say {case.refused}"


def expected_of_ggml(case: Case) -> tuple[str, ...]:
    if case.refused is None:
        return ("model",)
    return ("header", "model") if case.stricter else ("refused",)


@pytest.mark.system
@pytest.mark.slow
def test_ggml_knows_the_same_types_of_tensors_in_the_same_sizes(tmp_path: Path) -> None:
    paths = []
    for number in range(128):
        draft = Draft([Pair(b"general.alignment", U32, struct.pack("<I", 1))], alignment=1, data_bytes=1 << 14)
        draft.tensors = [Tensor(b"a", (512,), number)]
        if number in TENSOR_TYPES:
            # It begins where the first ends, or ggml refuses.
            draft.tensors.append(Tensor(b"b", (512,), number))
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(draft.build())
    known = {number for number, verdict in enumerate(asked(paths)) if verdict == "model"}
    assert known == TENSOR_TYPES.keys()
    assert known == {number for number, path in enumerate(paths) if refusal(path) is None}


def peak_bytes(path: Path) -> tuple[str | None, int]:
    tracemalloc.start()
    try:
        return refusal(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_what_is_kept_of_a_hostile_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    claim = struct.pack("<IQ", U8, 4096) + bytes(4096)
    many = [Pair(b"%d.head_count" % number, ARRAY, claim) for number in range(2000)]
    path.write_bytes(Draft(many).build())
    said, peak = peak_bytes(path)
    assert "take more than 8388608 bytes" in str(said)
    assert peak < 32 << 20

    long = "\U0001f600".encode() * 250
    path.write_bytes(Draft([Pair(b"%d" % number + long, STRING, text(long)) for number in range(8000)]).build())
    said, peak = peak_bytes(path)
    assert "take more than 8388608 bytes" in str(said)
    assert peak < 64 << 20


def test_strings_are_counted_over_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.ggufheader.STRINGS_MAX", 25)
    path = tmp_path / "m.gguf"
    path.write_bytes(Draft([Pair(b"%d" % number, ARRAY, texts(*[b""] * 10)) for number in range(3)]).build())
    assert "the array '2' claims 10 strings, 25 at most in a file" in str(refusal(path))


def test_numbers_are_counted_even_where_a_file_has_room_for_them(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(Draft([Pair(b"a", ARRAY, struct.pack("<IQ", U8, (1 << 30) + 1))]).build())
        file.truncate(2 << 30)
    assert "1073741824 at most" in str(refusal(path))


def test_names_are_shown_on_one_line_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(Draft([Pair(b"\n\x1b[2J" * 200, 99, b"")]).build())
    said = str(refusal(path))
    assert said.isprintable()
    assert len(said) < len(str(path)) + 400


@pytest.mark.parametrize("way", ["take", "skip_texts", "token_hashes"])
def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path, way: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(text(b"a" * 40) + text(b"b" * 40))
    with open(path, "rb") as file:
        reader = GgufReader(file, path)
        os.truncate(path, 30)
        with pytest.raises(ModelFileError, match="is truncated"):
            getattr(reader, way)(50 if way == "take" else 2)


def test_damage_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    draft = Draft([Pair(b"a", U8, b"\1"), Pair(b"b", 99, b"\1")])
    path.write_bytes(draft.build())
    # Magic, version and counts take 24 bytes, the first pair 8 + 1 + 4 + 1, key and type of the second 8 + 1 + 4.
    assert "near byte 51: the key 'b' has the unknown type 99" in str(refusal(path))
    draft.pairs[1] = Pair(b"b", STRING, struct.pack("<Q", 40))
    path.write_bytes(draft.build())
    assert f"it ends at byte {path.stat().st_size}, within the key 'b'" in str(refusal(path))
