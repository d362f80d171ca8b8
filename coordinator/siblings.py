"""Whether Python finds our own packages by their names, which others use as well.

`llmpi` runs this file by its path: it must work where `coordinator` is somebody else's, and import nothing of ours.
"""

from __future__ import annotations

import importlib.util
import os

NAMES = ("coordinator", "workers", "scheduling", "storage")


def in_the_way() -> str:
    """What is wrong if a name leads to another package, or a module, than ours; else ""."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in NAMES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
        found = next((os.path.realpath(place) for place in places if place), "")
        if found and not found.startswith(os.path.join(home, name)):
            other = os.path.dirname(found) if os.path.basename(found) == "__init__.py" else found
            return (
                f"{other} stands in the way of llmpi's own package {name!r}, for it comes first in sys.path: rename "
                "it, or take its folder out of the way (another current folder, another PYTHONPATH)"
            )
    return ""
