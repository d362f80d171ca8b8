"""Quantising a model, in a process of its own: llama.cpp may abort on a file that it cannot quantise.

    python -m workers.quantize PARENT_PID SOURCE TARGET TYPE THREADS

On stdout a line for each tensor, `done all`. What llama.cpp says goes to stderr; its last lines are the reason if it
fails (exit 1). TYPE '?' prints the types that there are, a line each.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

import llama_cpp.llama_cpp as lib

from workers.processes import tie_to_parent

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
_TENSOR = re.compile(rb"\[ *(\d+)/ *(\d+)\]")


def types() -> dict[str, int]:
    """llama.cpp's types of files by name, as Q4_K_M."""
    return {name[len(_PREFIX) :]: getattr(lib, name) for name in sorted(dir(lib)) if name.startswith(_PREFIX)}


def _said(_level: int, text: bytes, _data: object) -> None:
    found = _TENSOR.match(text)
    if found:
        print(int(found[1]), int(found[2]), flush=True)
    else:
        sys.stderr.write(text.decode("utf-8", "replace"))


def main() -> int:
    parent, source, target, kind, threads = sys.argv[1:]
    if kind == "?":
        print("\n".join(types()))
        return 0
    tie_to_parent(int(parent))

    said = lib.llama_log_callback(_said)
    lib.llama_log_set(said, None)
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = int(threads), types()[kind]
    code = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
