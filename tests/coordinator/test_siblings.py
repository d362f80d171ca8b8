"""llmpi's own packages are found, however they are stored, and what stands in their way is named."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import PATIENCE_S, ROOT
from workers.processes import HOME

STUBS = ("coordinator/__init__.py", "workers/__init__.py", "scheduling/__init__.py", "storage/__init__.py")


def run(*words: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What begins a command, and nothing else of llmpi."""
    made = tmp_path / "tree"
    for stub in STUBS:
        (made / stub).parent.mkdir(parents=True)
        (made / stub).touch()
    for name in ("llmpi.py", "coordinator/siblings.py"):
        shutil.copy(ROOT / name, made / name)
    (made / "coordinator/entry.py").write_text("def main():\n    raise SystemExit('it begins')\n")
    return made


def as_zip(tree: Path) -> Path:
    archive = tree.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in tree.rglob("*.py"):
            file.write(path, path.relative_to(tree))
    return archive


def without_source(tree: Path) -> Path:
    compileall.compile_dir(tree, quiet=2, legacy=True)
    for path in tree.rglob("*.py"):
        path.unlink()
    return tree


def of_links(tree: Path) -> Path:
    """Each file a link into a store, as some package managers have it."""
    store = tree.parent / "store"
    store.mkdir()
    for number, path in enumerate(tree.rglob("*.py")):
        shutil.move(path, store / str(number))
        path.symlink_to(store / str(number))
    return tree


def by_a_link(tree: Path) -> Path:
    link = tree.parent / "link"
    link.symlink_to(tree)
    return link


@pytest.mark.slow
@pytest.mark.parametrize("stored", [as_zip, without_source, of_links, by_a_link])
def test_a_command_begins_however_its_files_are_stored(
    tree: Path, stored: Callable[[Path], Path], tmp_path: Path
) -> None:
    done = run("-m", "llmpi", path=stored(tree), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "it begins\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("types.ModuleType('storage')", "the module storage that is loaded stands in the way"),
        ("types.SimpleNamespace(__spec__=None, __file__='/x/storage.py')", "/x/storage.py stands in the way"),
    ],
)
def test_a_module_that_was_loaded_before_is_named(tree: Path, tmp_path: Path, made: str, told: str) -> None:
    code = f"import sys, types; sys.modules['storage'] = {made}; import llmpi"
    done = run("-c", code, path=tree, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {told}")


def test_what_is_started_finds_our_packages_where_these_lie() -> None:
    assert Path(HOME) == ROOT
