"""llmpi from Python: answer prompts on every GPU of this machine or, under mpirun or srun, of all ranks.

    import llmpi

    with llmpi.Pool("model.gguf", slots=16) as pool:
        for result in pool.generate(["Why is the sky blue?"], max_tokens=64, temperature=0):
            print(result.custom_id, result.text)

Under a launcher every rank runs the same script: rank 0 runs the body, the other ranks serve inside `with` until
rank 0 leaves it, and `generate` yields nothing there.
"""

# ruff: noqa: E402  (what is imported below must be ours)

from __future__ import annotations

import importlib.util
import os
import sys


def _in_the_way() -> str:
    """What is wrong if Python would take another package for one of ours, whose names are common ones; else ""."""
    here = os.path.dirname(os.path.realpath(__file__))
    for name in ("coordinator", "workers", "scheduling", "storage"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
        found = next((os.path.realpath(place) for place in places if place), "")
        if found and not found.startswith(os.path.join(here, name)):
            other = os.path.dirname(found) if os.path.basename(found) == "__init__.py" else found
            return (
                f"{other} stands in the way of llmpi's own package {name!r}, for it comes first in sys.path: rename "
                "it, or start from another folder"
            )
    return ""


if problem := _in_the_way():
    if __name__ != "__main__":
        raise ImportError(problem)
    print(f"llmpi: {problem}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    # A command ends here: it loads what it needs by itself, and not what scripts are given below.
    from coordinator.entry import main

    main()

from coordinator.callbacks import Snapshot
from coordinator.pool import Pool, Result
from scheduling.errors import (
    ConfigError,
    EngineError,
    InputError,
    LlmpiError,
    ModelFileError,
    RequestError,
    UserError,
)
from scheduling.logprobs import Score

__all__ = [
    "ConfigError",
    "EngineError",
    "InputError",
    "LlmpiError",
    "ModelFileError",
    "Pool",
    "RequestError",
    "Result",
    "Score",
    "Snapshot",
    "UserError",
]
