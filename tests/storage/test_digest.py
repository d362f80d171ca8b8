from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ModelStoreError
from storage.blobs import Blobs
from storage.digest import Digest
from storage.manifest import ModelName, suggested_name

HEX = "0123456789abcdef" * 4
TOP = Path(__file__).resolve().parents[2]


def test_a_digest_survives_being_written_and_read() -> None:
    digest = Digest.of(hashlib.sha256(b"x"))
    assert Digest.parse(str(digest)) == digest
    assert digest.file_name == f"sha256-{digest.hex}"


@pytest.mark.parametrize(
    "text",
    [
        "", HEX, f"sha256:{HEX[:-1]}", f"sha256:{HEX}0", f"sha256:{HEX.upper()}", f"SHA256:{HEX}", f"sha512:{HEX}",
        f"sha256:{'../' * 21}a", f"sha256:/{HEX[1:]}", f"sha256:{HEX[:-1]}\0", f"sha256:{HEX}\n", f" sha256:{HEX}",
        f"sha256-{HEX}", f"sha256:{'٠' * 64}", f"sha256:{'..' * 32}", f"sha256:sha256:{HEX}",
    ],
)  # fmt: skip
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ModelStoreError):
        Digest.parse(text)


@given(st.text())
def test_a_digest_is_made_of_64_digits_or_not_at_all(text: str) -> None:
    makers: list[Callable[[], Digest]] = [lambda: Digest(text), lambda: Digest.parse(f"sha256:{text}")]
    for made in makers:
        try:
            digest = made()
        except ModelStoreError:
            continue
        assert len(digest.hex) == 64
        assert set(digest.hex) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "text",
    ["", "../x", "a/../b", "/etc/passwd", "a//b", ".hidden", "a/.b", "a\0b", "a b", "x:", "x:../y", "x:y/z", "a/b/c/d",
     "x" * 200, "ä", "a:b:c", "a\\b", "x.json", "a/b.json/c", "-x", "x\n"],
)  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ModelStoreError):
        ModelName.parse(text)


@given(st.text())
def test_a_name_is_a_path_below_the_manifests_or_refused(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except ModelStoreError:
        return
    path = Path("/store/manifests") / name.name / f"{name.tag}.json"
    assert path.is_relative_to("/store/manifests")
    assert ".." not in path.parts
    assert ModelName.parse(str(name)) == name


@given(st.text())
def test_every_file_name_suggests_a_name(stem: str) -> None:
    name = suggested_name(stem)
    assert ModelName.parse(str(name)) == name


def test_only_a_digest_leads_to_the_path_of_a_blob(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Blobs(tmp_path).path(f"sha256:{HEX}")  # type: ignore[arg-type]


def test_nothing_else_in_the_code_makes_a_path_of_a_blob() -> None:
    """The folder of blobs is named in `Blobs.path` and where it is listed, and no digest is cut out of a string."""
    found = []
    for folder in ("coordinator", "scheduling", "storage", "workers"):
        for file in sorted((TOP / folder).rglob("*.py")):
            # Other programs' stores have blobs of their own.
            if "sources" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                    continue
                text = node.value
                if text == "blobs" or "blobs/" in text.strip("/").split("\n")[0] or text.startswith("sha256-"):
                    found.append(f"{file.name}:{node.lineno}")
    names = [place.split(":")[0] for place in found]
    # path, its folder in put and in name, and the listing.
    assert names == ["blobs.py"] * len(names), found
    assert len(names) == 4, found
