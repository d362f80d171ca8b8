"""What the installed llama.cpp was built for, asked in a process of its own, which alone loads it.

`python -m workers.llama_build` prints a `LlamaBuild` as JSON. `ask_build` starts that under the devices and the
environment that an engine would have.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import msgspec

LAST_WORDS_CHARACTERS = 300
COMMAND = (
    sys.executable,
    "-c",
    # A folder `workers` where the user stands must not be taken for ours.
    "import sys; sys.path[:] = filter(None, sys.path); from workers.llama_build import main; main()",
)


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """As llama.cpp lists them: 'CUDA0', 'NVIDIA H200'. `gpu` False: a CPU or an accelerator beside it."""

    name: str
    description: str
    gpu: bool


class LlamaBuild(msgspec.Struct, frozen=True, kw_only=True):
    """`backends`: 'CUDA', 'ROCm', 'Vulkan', 'SYCL', 'Metal', 'CPU', as llama.cpp names them. `problem`: why it cannot
    be loaded; then the rest is empty."""

    version: str = ""
    backends: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    cpu_features: tuple[str, ...] = ()
    problem: str = ""


def ask_build(environ: Mapping[str, str], timeout_s: float) -> LlamaBuild:
    """Raises nothing: see `LlamaBuild.problem`. `environ`: see `workers.supervisor.engine_environment`."""
    try:
        done = subprocess.run(
            COMMAND, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            return msgspec.json.decode(lines[-1], type=LlamaBuild)
    except subprocess.TimeoutExpired:
        return LlamaBuild(problem=f"it did not load within {timeout_s:.0f} s")
    except (OSError, msgspec.DecodeError) as error:
        return LlamaBuild(problem=str(error))
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = said[-1][-LAST_WORDS_CHARACTERS:] if said else "it said nothing"
    return LlamaBuild(problem=f"loading it ended with status {done.returncode}: {last}")


def features(system_info: str) -> tuple[str, ...]:
    """Of llama.cpp's 'CPU : SSE3 = 1 | AVX = 1 | …', those that are there; other backends' parts are left out."""
    cpu = system_info.partition("CPU : ")[2]
    found = []
    for part in cpu.split("|"):
        name, equals, value = part.partition("=")
        if " : " in name:  # the next backend
            break
        if equals and value.strip() not in ("0", ""):
            found.append(name.strip())
    return tuple(found)


def main() -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    print(msgspec.json.encode(_look()).decode())
    sys.stdout.flush()
    os._exit(0)  # some GPU libraries take their time, or fail, when they are unloaded


def _look() -> LlamaBuild:
    import ctypes

    import llama_cpp
    import llama_cpp.llama_cpp as lib
    from llama_cpp._ggml import libggml

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()

    def function(name: str, result: type, *arguments: type) -> ctypes._NamedFuncPointer:
        found: ctypes._NamedFuncPointer = getattr(libggml, name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    registries, registry = function("ggml_backend_reg_count", size), function("ggml_backend_reg_get", pointer, size)
    count, get = function("ggml_backend_dev_count", size), function("ggml_backend_dev_get", pointer, size)
    kind = function("ggml_backend_dev_type", ctypes.c_int, pointer)
    name = function("ggml_backend_dev_name", text, pointer)
    description = function("ggml_backend_dev_description", text, pointer)
    backend = function("ggml_backend_reg_name", text, pointer)
    devices = [get(place) for place in range(count())]
    return LlamaBuild(
        version=str(llama_cpp.__version__),
        backends=tuple(backend(registry(place)).decode() for place in range(registries())),
        # ggml.h: type 1 is a GPU, 2 an integrated one.
        devices=tuple(
            Device(name=name(one).decode(), description=description(one).decode("utf-8", "replace").strip(),
                   gpu=kind(one) in (1, 2))
            for one in devices
        ),
        cpu_features=features(lib.llama_print_system_info().decode("utf-8", "replace")),
    )  # fmt: skip


if __name__ == "__main__":
    main()
