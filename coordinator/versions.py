"""Versions of what a run is made with."""

from __future__ import annotations

from importlib import metadata, util

MODULES = {
    "llmpi": "llmpi",
    "llama-cpp-python": "llama_cpp",
    "llguidance": "llguidance",
    "msgspec": "msgspec",
    "numpy": "numpy",
}
"""Packages whose versions must not differ between ranks, and what is imported of each."""
MISSING, UNTOLD = "missing", "unknown"


def package_version(name: str) -> str:
    """MISSING where it is not installed, UNTOLD where it is only found on the path of modules, as a checkout is."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return UNTOLD if util.find_spec(MODULES[name]) is not None else MISSING


def package_versions() -> dict[str, str]:
    """Of all of MODULES: see `package_version`."""
    return {name: package_version(name) for name in MODULES}
