"""Which backends the installed llama.cpp has, told by the names of its libraries: nothing is loaded.

llama.cpp builds each backend as a library of its own, `libggml-NAME`. A build that has all in one file says nothing
this way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scheduling.backends import BACKENDS, CPU, Backend


@dataclass(frozen=True, slots=True)
class Build:
    """`backends` in order of preference, the CPU last. Empty: nobody knows, and `reason` says why."""

    backends: tuple[Backend, ...]
    folder: Path | None
    reason: str = ""


def installed_build(environ: Mapping[str, str]) -> Build:
    """The llama.cpp that an engine started from this process will load."""
    folder = library_folder(environ)
    if folder is None:
        return Build((), None, "llama-cpp-python is not installed")
    return build_in(folder)


def library_folder(environ: Mapping[str, str]) -> Path | None:
    """Where llama-cpp-python looks for its libraries: LLAMA_CPP_LIB_PATH, else its own `lib`."""
    if chosen := environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    found = importlib.util.find_spec("llama_cpp")
    places = (found.submodule_search_locations if found else None) or ()
    return next((Path(place) / "lib" for place in places), None)


def build_in(folder: Path) -> Build:
    """The backends whose libraries lie in `folder`."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return Build((), folder, f"{folder} cannot be read: {error.strerror}")
    found = tuple(backend for backend in BACKENDS.values() if backend != CPU and _has(names, backend.name))
    if found or any(name.startswith(("libggml-cpu", "ggml-cpu")) for name in names):
        return Build((*found, CPU), folder)
    return Build((), folder, f"{folder} has no libggml-… for each backend, so its build cannot be told")


def _has(names: set[str], backend: str) -> bool:
    return any(
        f"{prefix}ggml-{backend}{ending}" in names for prefix in ("lib", "") for ending in (".so", ".dylib", ".dll")
    )
