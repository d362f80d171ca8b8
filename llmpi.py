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
from importlib.machinery import PathFinder


def _in_the_way() -> str:
    """What `coordinator.siblings` says, whatever is called coordinator here."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "coordinator")
    spec = PathFinder.find_spec("siblings", [folder])
    assert spec is not None
    assert spec.loader is not None
    siblings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(siblings)
    problem: str = siblings.in_the_way()
    return problem


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
