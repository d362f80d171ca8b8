"""The engine's way out: frames to the rank from any thread, and the last one that says why it ends."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import NoReturn

from scheduling.errors import LlmpiError, UserError
from workers.frames import write_all
from workers.protocol import EngineFailed, FromEngine, encode


class Outbox:
    """Frames to the rank, one at a time from any thread. A rank that is gone ends the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        data = encode(message)
        with self._lock:
            try:
                write_all(self._fd, data)
            except OSError:
                os._exit(0)


def fail(outbox: Outbox, error: BaseException) -> NoReturn:
    """Say why the engine ends, to the rank in a frame and to people on stderr, and end it."""
    known = isinstance(error, LlmpiError)
    if not known:
        traceback.print_exception(error)
    sys.stderr.flush()
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    outbox.send(EngineFailed(reason=reason, user_error=isinstance(error, UserError)))
    os._exit(1)
