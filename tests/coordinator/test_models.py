"""`llmpi models …` and what `-m` means, in this process, on a store in a temporary folder."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from coordinator import cli, models
from coordinator.commands.models import byte_count
from coordinator.config import JobConfig
from coordinator.modelnames import find_model, open_store
from coordinator.quantize import _quantised_name
from coordinator.setup import prepare
from scheduling.errors import ModelFileError, ModelStoreError
from storage.gguf import check_gguf
from storage.manifest import Manifest
from storage.modelstore import ModelStore
from tests.storage.small_models import small_model, split_model


class Llmpi:
    """Runs `llmpi WORDS…` here. Keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self._monkeypatch, self._capsys, self.home = monkeypatch, capsys, home
        self.err = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        self._monkeypatch.setattr(sys, "argv", ["llmpi", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, self.err = self._capsys.readouterr()
        assert ended.value.code == code, (out, self.err)
        assert "Traceback" not in self.err
        return out

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def llmpi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Llmpi:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_RANKID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMPI_HOME", str(tmp_path / "home"))
    return Llmpi(monkeypatch, capsys, tmp_path / "home")


def test_a_model_comes_is_listed_shown_verified_and_goes(llmpi: Llmpi, tmp_path: Path) -> None:
    path = small_model(tmp_path / "Some Model.gguf")
    assert "no models" in llmpi("models", "ls")
    assert llmpi.json("models", "ls") == []
    added = llmpi.json("models", "add", str(path))
    assert added["name"] == "some-model"
    listed = llmpi("models", "ls")
    assert "some-model" in listed
    assert added["digest"][7:19] in listed
    assert [one["digest"] for one in llmpi.json("models", "ls")] == [added["digest"]]
    shown = llmpi("models", "show", "some-model")
    assert "architecture" in shown
    assert llmpi.json("models", "show", added["digest"])["gguf"]["context_tokens"] == 512
    assert "0 damaged" in llmpi("models", "verify")
    assert "freed" in llmpi("models", "rm", "some-model")
    assert llmpi.json("models", "ls") == []


def test_a_folder_with_one_split_model_is_added(llmpi: Llmpi, tmp_path: Path) -> None:
    split_model(tmp_path / "folder", parts=2)
    assert len(llmpi.json("models", "add", str(tmp_path / "folder"))["files"]) == 2


def test_damage_is_said_and_counts_as_failure(llmpi: Llmpi, tmp_path: Path) -> None:
    llmpi("models", "add", str(small_model(tmp_path / "a.gguf")))
    llmpi("models", "add", str(small_model(tmp_path / "b.gguf", seed=1)))
    found = find_model("a")
    found.path.write_bytes(found.path.read_bytes()[:-1] + b"?")
    assert [one["what"] for one in llmpi.json("models", "verify", code=1)["damaged"]] == [found.digest]
    (llmpi.home / "models" / "manifests" / "b" / "latest.json").write_text("{")
    llmpi("models", "ls", code=1)
    assert "b" in llmpi.err
    assert "damaged" in llmpi.err
    assert "removed b" in llmpi("models", "rm", "b")


def test_a_model_whose_file_is_lost_or_in_quarantine_is_marked(llmpi: Llmpi, tmp_path: Path) -> None:
    for seed, name in enumerate(("whole", "lost", "damaged", "short")):
        llmpi("models", "add", str(small_model(tmp_path / f"{name}.gguf", seed)))
    llmpi("models", "pin", "lost")
    assert [one["problem"] for one in llmpi.json("models", "ls")] == [None] * 4
    damaged, short = find_model("damaged").path, find_model("short").path
    find_model("lost").path.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    llmpi("models", "verify", "damaged", code=1)
    short.write_bytes(b"GGUF")

    listed = {line.split()[0]: line for line in llmpi("models", "ls", code=1).splitlines()}
    assert [name for name, line in listed.items() if "cannot be used" in line] == ["damaged", "lost", "short"]
    assert "lost (cannot be used, pinned)" in listed["lost"]
    assert "llmpi: lost: the store has lost" in llmpi.err
    assert f"it was damaged, and lies in {llmpi.home / 'models' / 'quarantine'}" in llmpi.err
    problems = {one["name"]: one["problem"] for one in llmpi.json("models", "ls", code=1)}
    assert problems["whole"] is None
    assert problems["lost"].endswith("; add or pull the model again")
    assert "quarantine" not in problems["lost"]
    assert "quarantine" in problems["damaged"]
    assert "4 bytes instead of" in problems["short"]
    assert "liesin" in "".join(llmpi("models", "show", "damaged").split())
    llmpi("models", "add", str(tmp_path / "damaged.gguf"))
    assert llmpi.json("models", "show", "damaged")["problem"] is None


def test_a_split_model_that_has_lost_one_part_is_marked(llmpi: Llmpi, tmp_path: Path) -> None:
    split_model(tmp_path / "folder", parts=3)
    added = llmpi.json("models", "add", str(tmp_path / "folder"))
    find_model(added["name"]).blobs[2][0].unlink()
    assert "cannot be used" in llmpi("models", "ls", code=1)
    assert added["files"][2]["digest"] in llmpi.json("models", "ls", code=1)[0]["problem"]


def test_listing_reads_no_blob(llmpi: Llmpi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llmpi("models", "add", str(small_model(tmp_path / "a.gguf")))
    opened: list[str] = []

    def spy(open_: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return open_(path, *args, **kwargs)

    for name in ("builtins.open", "os.open"):
        monkeypatch.setattr(name, functools.partial(spy, open if name == "builtins.open" else os.open))
    llmpi("models", "ls")
    assert any("manifests" in path for path in opened)
    assert [path for path in opened if "blobs" in path] == []


def test_several_are_removed_or_none(llmpi: Llmpi, tmp_path: Path) -> None:
    llmpi("models", "add", str(small_model(tmp_path / "a.gguf")))
    llmpi("models", "rm", "a", "nope", code=2)
    assert "no model nope" in llmpi.err
    assert len(llmpi.json("models", "ls")) == 1
    assert llmpi.json("models", "rm", "a", "a:latest")["removed"] == ["a"]


def test_gc_keeps_pinned_models(llmpi: Llmpi, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        llmpi("models", "add", str(small_model(tmp_path / f"{name}.gguf", seed)))
    assert "a is pinned" in llmpi("models", "pin", "a")
    assert llmpi.json("models", "gc", "--keep-bytes", "0", "--dry-run")["evicted"] == ["b"]
    assert len(llmpi.json("models", "ls")) == 2
    assert "b is evicted" in llmpi("models", "gc", "--keep-bytes", "0")
    assert "not pinned" in llmpi("models", "pin", "a", "--off")
    assert llmpi.json("models", "gc", "--keep-bytes", "1k")["evicted"] == ["a"]


def test_gc_names_a_file_that_is_none_and_goes_on_with_the_rest(llmpi: Llmpi, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        llmpi("models", "add", str(small_model(tmp_path / f"{name}.gguf", seed)))
    store = open_store()
    link, orphan = find_model("b").path, find_model("c").path
    store._forget(store.find("c").name)
    link.unlink()
    link.symlink_to(tmp_path / "b.gguf")
    found = llmpi.json("models", "gc", "--dry-run", code=1)
    [problem] = found["problems"]
    assert (found["files"], problem.split(";")[0]) == (1, f"{link} is no plain file")
    assert "1 file was removed" in llmpi("models", "gc", code=1)
    assert f"llmpi: {link} is no plain file" in llmpi.err
    assert not orphan.exists()
    assert find_model("a").path.exists()
    assert (tmp_path / "b.gguf").exists()
    link.unlink()
    assert llmpi.json("models", "gc")["problems"] == []


def test_listing_looks_at_each_model_once(llmpi: Llmpi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llmpi("models", "add", str(small_model(tmp_path / "a.gguf")))
    looks: list[str] = []
    real = ModelStore.problem

    def counted(store: ModelStore, model: Manifest) -> str | None:
        looks.append(str(model.name))
        return real(store, model)

    monkeypatch.setattr(ModelStore, "problem", counted)
    llmpi.json("models", "ls")
    assert looks == ["a"]
    llmpi("models", "ls")
    assert looks == ["a", "a"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server over `tmp_path`. Yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()
        thread.join()


def test_a_model_is_pulled_from_a_web_server(llmpi: Llmpi, tmp_path: Path, server: str) -> None:
    path = small_model(tmp_path / "far.gguf")
    pulled = llmpi.json("models", "pull", f"{server}/far.gguf", "--name", "near:q8")
    assert pulled["name"] == "near:q8"
    # Pinned to what came.
    assert pulled["source"] == f"{server}/far.gguf#{pulled['digest'].replace(':', '=')}"
    assert find_model("near:q8").path.read_bytes() == path.read_bytes()
    assert list((llmpi.home / "models" / "pulls").iterdir()) == []
    llmpi("models", "pull", f"{server}/far.gguf", "--max-bytes", "10", "--name", "other", code=2)
    llmpi("models", "pull", f"{server}/far.gguf#sha256={'0' * 64}", "--name", "other", code=2)
    kept = llmpi.home / "models" / "quarantine" / f"sha256-{'0' * 64}.is-{pulled['digest'].replace(':', '-')}"
    assert f"It lies in {kept}." in llmpi.err
    assert kept.read_bytes() == path.read_bytes()
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.touch()
    llmpi("models", "pull", f"{server}/far.gguf#sha256={'0' * 64}", "--name", "other", code=2)
    [wrong] = (llmpi.home / "models" / "pulls").glob("*.wrong")
    assert f"not {'0' * 64} as promised: refused. It is still {wrong}: {kept.parent} cannot be used" in llmpi.err
    (tmp_path / "text.gguf").write_text("no model")
    llmpi("models", "pull", f"{server}/text.gguf", code=2)
    llmpi("models", "pull", "nowhere:x", code=2)
    assert "no source" in llmpi.err


def test_a_split_model_is_adopted_from_another_store(
    llmpi: Llmpi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMSTUDIO_HOME", str(tmp_path / "studio"))
    parts = split_model(tmp_path / "studio" / "models" / "someone" / "big-GGUF", parts=2)
    pulled = llmpi.json("models", "pull", "lmstudio:someone/big-GGUF")
    assert [file["name"] for file in pulled["files"]] == [part.name for part in parts]
    path = find_model(pulled["name"]).path
    assert path.resolve().samefile(parts[0]), "adopted, not copied"
    assert len(check_gguf(path).parts) == 2


# ---------------------------------------------------------------- -m


def test_m_takes_a_path_a_name_or_a_digest(llmpi: Llmpi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_model(tmp_path / "m.gguf")
    digest = llmpi.json("models", "add", str(path), "--name", "mine:q8")["digest"]
    assert find_model(str(path)).digest is None
    for text in ("mine:q8", digest):
        found = find_model(text)
        assert (found.name, found.digest) == ("mine:q8", digest)
    # A file of that name goes first, a folder does not.
    monkeypatch.chdir(tmp_path)
    Path("mine:q8").mkdir()
    assert find_model("mine:q8").digest == digest
    Path("mine:q8").rmdir()
    path.rename("mine:q8")
    assert find_model("mine:q8").digest is None


def test_a_rank_knows_a_stored_model_by_its_name(llmpi: Llmpi, tmp_path: Path) -> None:
    parts = split_model(tmp_path / "files", parts=2)
    llmpi("models", "add", str(parts[0]), "--name", "mine")
    setup = prepare(JobConfig(model="mine"))
    assert setup.problem is None
    assert setup.model_name == "mine"
    assert setup.model_digest == find_model("mine").digest
    # llama.cpp finds the other parts by this name.
    assert setup.model.path.endswith("model-00001-of-00002.gguf")
    assert setup.fingerprint == prepare(JobConfig(model=str(parts[0]))).fingerprint


@pytest.mark.parametrize("text", ["nope", "org/nope", "sha256:12"])
def test_what_is_neither_is_said(llmpi: Llmpi, text: str) -> None:
    with pytest.raises((ModelFileError, ModelStoreError)):
        find_model(text)
    assert prepare(JobConfig(model=text)).problem is not None


def test_a_model_that_the_store_has_and_cannot_give_is_not_looked_for_as_a_file(llmpi: Llmpi, tmp_path: Path) -> None:
    llmpi("models", "add", str(small_model(tmp_path / "m.gguf")), "--name", "mine")
    find_model("mine").path.unlink()
    with pytest.raises(ModelStoreError, match=r"^the store has lost sha256:.*; add or pull the model again$"):
        find_model("mine")


def test_what_is_much_too_long_for_a_path_is_no_model(llmpi: Llmpi) -> None:
    llmpi("models", "add", "a" * 5000, code=2)
    for text in ("a" * 5000, "/" + "a" * 5000):
        assert prepare(JobConfig(model=text)).problem is not None


def test_what_a_file_says_of_itself_is_printed_as_it_is(llmpi: Llmpi, tmp_path: Path) -> None:
    path = small_model(tmp_path / "[b]" / "m.gguf")
    llmpi("models", "add", str(path), "--licence", "[/red] \x1b[31m")
    printed = llmpi("models", "show", "m")
    assert "[/red] \N{REPLACEMENT CHARACTER}[31m" in printed
    assert "[b]/m.gguf" in printed.replace("\n", "").replace(" ", "")
    llmpi("models", "ls")


def test_a_folder_that_cannot_be_made_is_said(llmpi: Llmpi, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ModelStoreError, match="Read-only file system"), open_store().blobs.scratch_folder("a"):
        pass


def test_a_missing_file_is_a_missing_file(llmpi: Llmpi) -> None:
    assert "does not exist" in str(prepare(JobConfig(model="gone.gguf")).problem)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("text", "count"), [("20G", 20 * 10**9), ("1.5t", 15 * 10**11), ("500MB", 5 * 10**8), ("7", 7)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "nan", "inf", "x", "1e999"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        byte_count(text)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (10**12, "1.0 TB")]
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert models.size_text(count) == text


@pytest.mark.parametrize(
    ("name", "made"), [("llama-F16", "llama:q8_0"), ("llama:f16", "llama:q8_0"), ("org/x.bf16", "x:q8_0")]
)
def test_a_quantised_model_has_its_type_for_a_tag(name: str, made: str) -> None:
    assert str(_quantised_name(name, "Q8_0")) == made


def test_listing_models_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['llmpi', 'models', 'ls']\nfrom coordinator import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('mpi4py', 'llama_cpp', 'pynvml', 'pyarrow', 'matplotlib', 'huggingface_hub', 'fsspec')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
