"""Whether Python finds our own packages by their names, which others use as well.

`llmpi` loads this module by its place: it must work where `coordinator` is somebody else's, and import nothing of ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys

NAMES = ("coordinator", "workers", "scheduling", "storage")


def in_the_way() -> str:
    """What is wrong if a name leads to another package, or a module, than ours; else ""."""
    # Folders are compared, not files: each file may be a link into a store.
    home = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in NAMES:
        found = _found(name)
        if found and os.path.realpath(os.path.dirname(os.path.abspath(found))) != home:
            return (
                f"{found} stands in the way of llmpi's own package {name!r}, for it comes first in sys.path: rename "
                "it, or take its folder out of the way (another current folder, another PYTHONPATH)"
            )
    return ""


def _found(name: str) -> str:
    """The package's folder or the module's file; "" if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # loaded, but not from a file by Python itself
        return getattr(sys.modules[name], "__file__", None) or f"the module {name} that is loaded"
    if spec is None:
        return ""
    return next(iter(spec.submodule_search_locations or ()), spec.origin or "")
