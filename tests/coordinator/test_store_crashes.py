"""`llmpi models …` whose world ends at each of its calls that change the store.

Whatever a crash leaves: a model that the store names is whole, or the store says what it lacks; other models are as
they were; the same command again does what it should; and what is left over goes with a collection a day later.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.modelnames import open_store
from coordinator.models import add_model, collect, pin_model, pull_model, remove_models
from storage.blobs import STALE_S
from storage.manifest import Manifest
from storage.modelstore import ModelStore
from tests.storage.crash_disk import MODELS, Model
from tests.storage.crash_os import CrashOs
from tests.storage.small_models import small_model, split_model
from tests.storage.sources.site import Site

pytestmark = pytest.mark.slow


@dataclass
class World:
    """A store with a model `other` in it, files of models beside it, and a web server that has one."""

    folder: Path
    site: Site
    files: dict[str, Path] = field(default_factory=dict)

    def begin(self) -> None:
        self.files = {
            name: small_model(self.folder / "files" / f"{name}.gguf", seed)
            for seed, name in enumerate(("other", "new", "newer"))
        } | {"split": split_model(self.folder / "files" / "split", "split")[0]}
        self.site.files = {"/pulled.gguf": self.files["newer"].read_bytes()}
        add(self, "other")

    @property
    def root(self) -> Path:
        return self.folder / "home" / "models"


def add(world: World, file: str, name: str | None = None, *, link: bool = False, replace: bool = False) -> None:
    add_model(world.files[file], name, None, link=link, pin=False, replace=replace, as_json=True)


def pull(world: World, path: str = "/pulled.gguf") -> None:
    pull_model(
        world.site.url(path), None, max_bytes=None, offline=False, pin=False, replace=False, as_json=True
    )  # fmt: skip


def remove(name: str) -> None:
    """Unless the first time was enough."""
    if any(str(there) == name for there in open_store().names()):
        remove_models([name], as_json=True)


def several(world: World) -> None:
    """Two models that may be evicted, and one that may not."""
    for file in ("new", "split"):
        add(world, file)
    pin_model("other", True)


@dataclass(frozen=True)
class Command:
    """`before` it, `run` is what is cut; whole, it leaves models called `leaves`."""

    run: Callable[[World], object]
    leaves: tuple[str, ...]
    before: Callable[[World], object] = lambda _: None


COMMANDS = {
    "add": Command(lambda world: add(world, "new"), ("new", "other")),
    "add --link": Command(lambda world: add(world, "new", link=True), ("new", "other")),
    "add a split model": Command(lambda world: add(world, "split"), ("other", "split")),
    "add under a second name": Command(lambda world: add(world, "other", "other:tag"), ("other", "other:tag")),
    "add --replace": Command(
        lambda world: add(world, "newer", "new", replace=True), ("new", "other"), lambda world: add(world, "new")
    ),
    "pin": Command(lambda _: pin_model("other", True), ("other",)),
    "pull": Command(pull, ("other", "pulled")),
    "rm": Command(lambda _: remove("new"), ("other",), lambda world: add(world, "new")),
    "rm one of two names": Command(
        lambda _: remove("other:tag"), ("other",), lambda world: add(world, "other", "other:tag")
    ),
    "gc": Command(
        lambda _: collect(0, dry_run=False, as_json=True), ("other",),
        several,
    ),
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("LLMPI_HOME", str(tmp_path / "home"))
    with Site() as site:
        made = World(tmp_path, site)
        made.begin()
        yield made


def check_whole(store: ModelStore, model: Manifest) -> None:
    for file in model.files:
        assert hashlib.sha256(store.blobs.path(file.digest).read_bytes()).hexdigest() == file.digest.hex


def check_left(survivor: Model) -> None:
    """What a crash has left."""
    store = open_store()
    for found in store.models():
        assert isinstance(found, Manifest), found
        problem = store.problem(found)
        if problem is None:
            check_whole(store, found)
        else:
            assert survivor == "torn", problem
            assert "the store has lost" in problem
    assert store.problem(store.find("other")) is None


class Runs:
    """One command again and again, each time on the store as it was before it."""

    def __init__(self, world: World, command: Command) -> None:
        self.world, self.command = world, command
        command.before(world)
        shutil.copytree(world.folder / "home", world.folder / "before", symlinks=True)
        self.crashing = CrashOs(world.root)

    def cut(self, place: int | None = None, *, half: bool = False) -> None:
        shutil.rmtree(self.world.folder / "home")
        shutil.copytree(self.world.folder / "before", self.world.folder / "home", symlinks=True)
        with self.crashing.session(place, half=half):
            self.command.run(self.world)
        assert self.crashing.dead == (place is not None)

    def check_done(self) -> None:
        """The models that should be there are, all whole, and no other one."""
        store = open_store()
        assert tuple(sorted(map(str, store.names()))) == self.command.leaves
        for found in store.models():
            assert isinstance(found, Manifest)
            assert store.problem(found) is None
            check_whole(store, found)

    def check_swept(self) -> None:
        """A day later a collection leaves what models need, and nothing else."""
        store = ModelStore(self.world.root, lambda: time.time() + STALE_S + 1)
        store.gc()
        self.check_done()
        for folder in ("partial", "pulls", "trash"):
            assert not any((store.root / folder).glob("*"))
        needed = {file.digest for found in store.models() if isinstance(found, Manifest) for file in found.files}
        assert {digest for digest, _ in store.blobs} == needed


@pytest.mark.parametrize("name", COMMANDS)
def test_wherever_the_world_ends_the_store_is_whole_and_the_command_can_be_given_again(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(world, COMMANDS[name])
    runs.cut()
    calls = list(runs.crashing.calls)
    assert len(calls) >= 3
    for place, call in enumerate(calls):
        for half in {False, call.startswith("write")}:
            for survivor in MODELS:
                runs.cut(place, half=half)
                runs.crashing.survive(survivor, seed=place)
                check_left(survivor)
                runs.command.run(world)
                runs.check_done()
                runs.check_swept()
        capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_has_done_a_power_cut_does_not_undo(world: World, name: str) -> None:
    runs = Runs(world, COMMANDS[name])
    runs.cut()
    runs.crashing.survive("synced")
    runs.check_done()
