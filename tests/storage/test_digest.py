from __future__ import annotations

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
from tests.storage.blob_paths import ways_to_blobs

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


OWN_WAYS = {
    "storage/digest.py": {"file_name"},
    # Beside `path`: the folder of blobs as such, and names in quarantine/ and trash/.
    "storage/blobs.py": {"path", "__iter__", "put", "name", "_quarantine_prefix", "quarantine", "collect", "rescue"},
    # Ollama's store has blobs of its own.
    "storage/sources/ollama.py": {"_blob", "_licence"},
}


def test_nothing_else_in_the_code_makes_a_path_of_a_blob() -> None:
    found = {}
    for folder in ("coordinator", "scheduling", "storage", "workers"):
        for file in sorted((TOP / folder).rglob("*.py")):
            if ways := ways_to_blobs(file.read_text()):
                found[file.relative_to(TOP).as_posix()] = ways
    assert {file: set(ways) for file, ways in found.items()} == OWN_WAYS, found


@pytest.mark.parametrize(
    "planted",
    [
        'root / "blobs" / name', 'f"{root}/blobs/{name}"', 'f"{root}/blobs/sha256-{hex}"',
        'f"{root}/{digest.file_name}"',
        'root + "/blobs/" + name', '"blo" + "bs"', 'f"{ALGORITHM}-{hex}"', 'ALGORITHM + "-" + hex',
        'root / f"sha256-{x}"',
        '"{}/blobs/{}".format(root, name)', '"{}-{}".format(ALGORITHM, hex)', '"%s-%s" % (ALGORITHM, hex)',
        'os.path.join(root, "blobs", name)', 'root.joinpath("blobs")', '"-".join((ALGORITHM, hex))', 'Path("blobs", x)',
        '"/".join([root, "blobs", name])', 'str(digest).replace(":", "-")', 'f"{root}/{\'blobs\'}/{name}"',
    ],
)  # fmt: skip
def test_a_path_of_a_blob_is_found_however_it_is_made(planted: str) -> None:
    assert ways_to_blobs(f"def made():\n    return {planted}\n") == {"made": [2]}
    assert ways_to_blobs(f"KIND = {planted}\n") == {"": [1]}


def test_a_path_of_a_blob_is_found_behind_a_constant() -> None:
    assert ways_to_blobs('KIND = "sha256"\ndef made(x):\n    return f"{KIND}-{x}"\n') == {"made": [3]}


@pytest.mark.parametrize(
    "harmless",
    [
        '"""The files in blobs/sha256-HEX."""', 'print(f"{count} blobs")', "store.blobs.path(digest)", "root / name",
        'f"sha256:{hex}"', 'text.replace(":", "_")', '"blobstore"', "found.blobs",
    ],
)  # fmt: skip
def test_what_makes_no_path_of_a_blob_is_passed_over(harmless: str) -> None:
    assert ways_to_blobs(f"def harmless():\n    {harmless}\n") == {}
