"""The package as users get it: a wheel, in a fresh environment, used outside the checkout."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from tests.launch import ROOT

pytestmark = [pytest.mark.system, pytest.mark.slow]

PACKAGES = ("coordinator", "workers", "scheduling", "storage", "slurm", "hostfiles")
# Loading one of these costs seconds, or touches MPI, CUDA or llama.cpp.
HEAVY_MODULES = ("mpi4py.MPI", "llama_cpp", "pynvml")
SLOW_MODULES = ("h5py", "msgspec", "numpy", "rich")
"""Each takes longer to load than all that `llmpi --help` needs of our own."""
DATA_SUFFIXES = (".sbatch", ".sh", ".j2", ".txt", ".md")

PRINT_MODULES_AFTER_HELP = """
import sys
sys.argv = ["llmpi", "--help"]
from coordinator.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", *sys.modules)
"""


@dataclass(frozen=True)
class Installed:
    """A fresh environment with llmpi in it, and a directory that is not the checkout."""

    bin: Path
    outside: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.bin / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.outside,
            env=env,
            timeout=300,
            check=False,
        )


def _isolation() -> list[str]:
    """Build with this environment's setuptools where it can make wheels alone, else let pip fetch one."""
    version = tuple(int(part) for part in metadata.version("setuptools").split(".")[:2])
    return ["--no-build-isolation"] if version >= (70, 1) else []


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building in the checkout would leave files, or pack stale ones."""
    source = tmp_path_factory.mktemp("source") / "llmpi"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--quiet", "--no-deps", *_isolation(), "--wheel-dir", str(target), str(source))
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a new environment that sees the dependencies of this one, which take minutes to build."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _pip("--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last and its own .pth files are not read: the checkout, if it is
    # installed for development here, stays invisible.
    lookups = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(lookups)) + "\n")
    return Installed(folder / "bin", tmp_path_factory.mktemp("outside"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _normalized(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


OPTIONAL = ("parquet", "zstd", "hub", "objects", "report")
"""Extras whose packages are imported where they are needed."""


def _required(*extras: str) -> set[str]:
    """Names of the distributions that setup.cfg requires in any case, or for `extras`."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options.extras_require"][extra] for extra in extras] or [config["options"]["install_requires"]]
    lines = "\n".join(texts).split("\n")
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {_normalized(name.group()) for name in found if name}


def _imported(source: bytes, *, within_functions: bool = True) -> set[str]:
    """Top-level names of all absolute imports, those within functions too, or only those outside."""
    names: set[str] = set()
    module = ast.parse(source)
    for node in ast.walk(module) if within_functions else module.body:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in _names(wheel) if ".dist-info/" not in name}
    assert tops == {*PACKAGES, "llmpi.py"}


def test_wheel_holds_every_module_and_data_file_of_the_packages(wheel: Path) -> None:
    suffixes = (".py", "py.typed")
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.name.endswith(suffixes if package not in ("slurm", "hostfiles") else (*suffixes, *DATA_SUFFIXES))
        and "__pycache__" not in path.parts
    }
    assert expected - _names(wheel) == set()


def test_wheel_holds_hostfile_examples(wheel: Path) -> None:
    assert {name for name in _names(wheel) if name.startswith("hostfiles/") and name.endswith(".txt")}


def test_llama_cpp_is_pinned_to_one_minor_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    (pin,) = (line for line in requirements if line.startswith("llama-cpp-python"))
    assert ">=0.3.36" in pin
    assert "<0.4" in pin


def test_every_folder_with_code_for_users_is_named_in_setup_cfg() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert folders | set(PACKAGES) == named


def test_every_package_that_is_imported_is_required(wheel: Path) -> None:
    # What a development environment happens to hold would hide a missing requirement until a user's first run.
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
    owners = metadata.packages_distributions()
    own = {*PACKAGES, "llmpi", *sys.stdlib_module_names}
    required = _required() | _required(*OPTIONAL)
    undeclared = {
        f"{name} imports {module}"
        for name, source in sources.items()
        for module in _imported(source) - own
        if not required & {_normalized(owner) for owner in owners.get(module, [module])}
    }
    assert undeclared == set()


def test_optional_packages_are_not_needed_before_they_are_used(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
    optional = _required(*OPTIONAL)
    assert optional == {"pyarrow", "zstandard", "huggingface-hub", "fsspec", "matplotlib"}
    modules = {name.replace("-", "_") for name in optional}
    assert not {name for name, source in sources.items() if modules & _imported(source, within_functions=False)}


def test_help_works_outside_the_checkout(installed: Installed) -> None:
    done = installed.run("llmpi", "--help")
    assert done.returncode == 0, done.stderr
    assert "batch" in done.stdout


def test_module_runs_as_the_command(installed: Installed) -> None:
    done = installed.run("python", "-X", "importtime", "-m", "llmpi", "--help")
    assert done.returncode == 0, done.stderr
    assert "batch" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "coordinator.cli" in loaded
    assert not {*HEAVY_MODULES, *SLOW_MODULES} & loaded


def test_import_comes_from_the_wheel_and_loads_nothing_heavy(installed: Installed) -> None:
    done = installed.run("python", "-c", "import llmpi, sys; print(llmpi.__file__, *sys.modules)")
    assert done.returncode == 0, done.stderr
    where, *loaded = done.stdout.split()
    assert Path(where).is_relative_to(installed.bin.parent)
    assert not set(HEAVY_MODULES) & set(loaded)


def test_help_loads_neither_mpi_nor_gpu_nor_llama(installed: Installed) -> None:
    done = installed.run("python", "-c", PRINT_MODULES_AFTER_HELP)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split("LOADED", 1)[1].split()
    assert "coordinator.cli" in loaded
    assert not {*HEAVY_MODULES, *SLOW_MODULES} & set(loaded)
