"""llama.cpp as a whole: its start, what it logs, the devices it sees.

Importing this module loads llama.cpp and with it the GPU libraries: only the engine process may, after it has set
its environment.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from typing import Any

import llama_cpp.llama_cpp as lib

# ggml.h: debug 1, info 2, warning 3, error 4, 5 continues the line before.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5

_recent_errors: deque[str] = deque(maxlen=4)
_last_level = 0


def _log(level: int, text: bytes, _data: Any) -> None:
    global _last_level
    if level == _CONTINUED:
        level = _last_level
    _last_level = level
    if level in (_WARNING, _ERROR):
        line = text.decode("utf-8", "replace")
        if level == _ERROR and line.strip():
            _recent_errors.append(line.strip())
        sys.stderr.write(line)


_log_callback = lib.llama_log_callback(_log)


def forget_errors() -> None:
    """Before a call that may fail: what was complained about earlier is not the reason."""
    _recent_errors.clear()


def start_backend() -> None:
    """Initialise llama.cpp, its warnings and errors going to stderr and nothing else anywhere."""
    lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
    lib.llama_backend_init()


def recent_errors() -> str:
    """What llama.cpp last complained about, for the reason of a failure."""
    return "; ".join(_recent_errors) or "llama.cpp gave no reason"


def gpu_names() -> list[str]:
    """Devices other than the CPU that this build of llama.cpp sees, as it names them ("CUDA0")."""
    from llama_cpp._ggml import libggml

    count, get = libggml.ggml_backend_dev_count, libggml.ggml_backend_dev_get
    kind, name = libggml.ggml_backend_dev_type, libggml.ggml_backend_dev_name
    count.restype, get.restype, kind.restype, name.restype = (
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    get.argtypes, kind.argtypes, name.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_void_p]
    devices = [get(place) for place in range(count())]
    # ggml.h: type 1 is a GPU, 2 an integrated one; 0 is the CPU, 3 an accelerator used together with it.
    return [str(name(device).decode()) for device in devices if kind(device) in (1, 2)]
