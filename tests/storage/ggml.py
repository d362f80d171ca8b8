"""Asks ggml and llama.cpp themselves about GGUF files, in a process of its own: they may abort, or worse.

ggml says:

    header   gguf_init_from_file accepts the file (as llama.cpp calls it: weights are not read)
    model    and all tensors end within the file, which llama.cpp's loader checks next

llama.cpp says `loaded` if it loads the vocabulary and takes a text apart with it. Both may say `refused`; who says
nothing more has `aborted`. Run as a program, this reads paths from its input and answers each with a line.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Verdict = Literal["aborted", "refused", "header", "model", "loaded"]


def ggml_library() -> Path | None:
    """llama-cpp-python's libggml-base, found without importing it."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    return next(iter(sorted((Path(found.origin).parent / "lib").glob("libggml-base.*"))), None)


def ask_ggml(library: Path, paths: Sequence[Path]) -> list[Verdict]:
    """What ggml makes of each file."""
    return _asked(str(library), paths)


def ask_llama(paths: Sequence[Path]) -> list[Verdict]:
    """What llama.cpp makes of each file's metadata and vocabulary."""
    return _asked("llama", paths)


def _asked(whom: str, paths: Sequence[Path]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    while len(verdicts) < len(paths):
        asked = "".join(f"{path}\n" for path in paths[len(verdicts) :])
        done = subprocess.run(
            [sys.executable, __file__, whom],
            input=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
        verdicts += done.stdout.split()  # type: ignore[arg-type]
        if len(verdicts) < len(paths):
            verdicts.append("aborted")
    return verdicts


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def _load(library: Path) -> ctypes.CDLL:
    base = ctypes.CDLL(str(library))
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Params)
    base.gguf_get_n_tensors.restype = ctypes.c_int64
    base.gguf_get_n_tensors.argtypes = (ctypes.c_void_p,)
    for name in ("gguf_get_tensor_offset", "gguf_get_tensor_size"):
        getattr(base, name).restype = ctypes.c_size_t
        getattr(base, name).argtypes = (ctypes.c_void_p, ctypes.c_int64)
    base.gguf_get_data_offset.restype = ctypes.c_size_t
    base.gguf_get_data_offset.argtypes = (ctypes.c_void_p,)
    base.gguf_free.argtypes = (ctypes.c_void_p,)
    base.ggml_free.argtypes = (ctypes.c_void_p,)
    return base


def _verdict(base: ctypes.CDLL, path: str) -> Verdict:
    weights = ctypes.c_void_p()
    found = base.gguf_init_from_file(path.encode(), _Params(True, ctypes.pointer(weights)))
    if not found:
        return "refused"
    data, size = base.gguf_get_data_offset(found), os.path.getsize(path)
    ends = (
        data + base.gguf_get_tensor_offset(found, number) + base.gguf_get_tensor_size(found, number)
        for number in range(base.gguf_get_n_tensors(found))
    )
    verdict: Verdict = "model" if all(end <= size for end in ends) else "header"
    base.ggml_free(weights)
    base.gguf_free(found)
    return verdict


def _loaded(path: str) -> Verdict:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        return "refused"
    tokens = (llama_cpp.llama_token * 64)()
    llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), b"ab a", 4, tokens, 64, True, True)
    llama_cpp.llama_model_free(model)
    return "loaded"


def main() -> None:
    base = None if sys.argv[1] == "llama" else _load(Path(sys.argv[1]))
    for line in sys.stdin:
        path = line.rstrip("\n")
        print(_loaded(path) if base is None else _verdict(base, path), flush=True)


if __name__ == "__main__":
    main()
