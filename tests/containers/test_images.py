"""What the images are made by, read: linters, and that nothing is left out or said twice in two ways."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess

import pytest

from tests.launch import ROOT

FOLDER = ROOT / "containers"
pytestmark = pytest.mark.slow


def passes(program: str, *words: str) -> None:
    found = shutil.which(program)
    assert found, f"there is no {program}: pip install '.[test]' brings it"
    done = subprocess.run([found, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_passes_hadolint() -> None:
    passes("hadolint", "containers/Dockerfile")


def test_script_passes_shellcheck() -> None:
    passes("shellcheck", "containers/install.sh")


def installed() -> set[str]:
    """Top-level folders and modules that the package is made of."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = {name.split(".")[0] for name in setup["options"]["packages"].split() if name[0].isalpha()}
    return packages & {entry.name for entry in ROOT.iterdir()} | {f"{setup['options']['py_modules']}.py"}


def needed() -> set[str]:
    return installed() | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "containers"}


def test_all_that_is_installed_reaches_the_builders() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == needed()
    files = re.search(r"^%files\n((?: +.*\n)+)", (FOLDER / "apptainer.def").read_text(), re.MULTILINE)
    assert files
    copied = dict(line.split() for line in files[1].splitlines())
    assert copied == {name: f"/src/{name}" for name in needed()}


def test_both_builders_have_the_same_defaults() -> None:
    docker = dict(re.findall(r"^ARG (\w+)=(.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE))
    arguments = re.search(r"^%arguments\n((?: +.*\n)+)", (FOLDER / "apptainer.def").read_text(), re.MULTILINE)
    assert arguments
    apptainer = dict(re.findall(r"^ +(\w+)=(.*)$", arguments[1], re.MULTILINE))
    script = re.search(r"LLMPI_EXTRAS:-([\w,]+)", (FOLDER / "install.sh").read_text())
    assert script
    assert docker["BUILD_IMAGE"] == docker["RUN_IMAGE"] == apptainer["IMAGE"]
    assert docker["CMAKE_ARGS"] == apptainer["CMAKE_ARGS"] == ""
    assert docker["LLMPI_EXTRAS"] == apptainer["LLMPI_EXTRAS"] == script[1]
