"""Work that strangers decide about, done where it can do no harm: in a process that may die of it.

A template, a grammar or a text can take hours, all memory or the whole stack, and nothing can stop native code but the
end of its process. So the engine asks a child, which bounds processor time for each question, and memory:

    the engine        `Confined(MODULE).ask(question)`: the answer, None if the process died of the question
    the process       `main()` of MODULE: `serve` reads frames with questions and writes frames with answers

The process is started when it is first asked, and again when it has died. It ends with the thread that started it.

This module knows frames, processes and limits, and nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from workers.frames import frame, read_frame, write_all
from workers.processes import python_command, tie_to_parent

Result = TypeVar("Result")


class Confined:
    """The engine's side. Several threads may ask; they are answered one after the other.

    `first`: what a new process is told before all else, not answered. `environ`: what its environment has beside ours.
    """

    def __init__(self, module: str, first: bytes | None = None, environ: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._first = first
        self._environ = dict(environ or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.last_code = 0
        """How the last process that died has ended: -N for signal N."""
        self.fresh = True
        """Whether the last question was the first one of its process."""

    def ask(self, question: bytes) -> bytes | None:
        """The answer; None if the process died of it, with `last_code` set. Raises OSError if there can be none."""
        with self._lock:
            said = self._ask(question)
            if said is None and self.last_code == -signal.SIGKILL:
                said = self._ask(question)  # it may not have been this question that it was killed for
            return said

    def _ask(self, question: bytes) -> bytes | None:
        self.fresh = self._process is None
        if self._process is None:
            self._start()
        with contextlib.suppress(OSError):
            write_all(self._to, frame(question))
        body = read_frame(self._from)
        if body is None:
            self._end()
        return body

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.close(self._to)
            os.close(self._from)
            self.last_code = process.wait()

    def _start(self) -> None:
        for_it, self._to = os.pipe()
        self._from, from_it = os.pipe()
        self._process = subprocess.Popen(
            [*python_command(self._module), str(os.getpid())],
            stdin=for_it,
            stdout=from_it,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", **self._environ},
        )
        os.close(for_it)
        os.close(from_it)
        if self._first is not None:
            with contextlib.suppress(OSError):
                write_all(self._to, frame(self._first))


def why_died(code: int, what: str, *, seconds: float, more_bytes: int, overflow: str) -> str:
    """Which limit a process ran into that ended with `code`, in words. `what` it did: 'compiling it'; `overflow`: what
    it means that the stack was too small."""
    if code == -signal.SIGPROF:
        return f"{what} takes more than {seconds:g} seconds"
    if code == -signal.SIGABRT:
        return f"{what} takes more than {more_bytes >> 20} MiB of memory"
    if code == -signal.SIGSEGV:
        return overflow
    if code == -signal.SIGKILL:
        return f"{what} was ended by the system, most likely for want of memory"
    return f"{what} fails"


# ---------------------------------------------------------------- the process


def on_stack(stack_bytes: int, work: Callable[[], Result]) -> Result:
    """What `work` returns, run in a thread with a stack of its own size: some libraries recurse."""
    results: list[Result] = []
    earlier = threading.stack_size(stack_bytes)
    try:
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
    finally:
        threading.stack_size(earlier)
    thread.join()
    return results[0]


def tie_to_engine() -> None:
    """To be called first: the process dies with the thread that has started it."""
    tie_to_parent(int(sys.argv[1]))


def serve(answer: Callable[[bytes], bytes], *, seconds: float, more_bytes: int) -> None:
    """Answer questions until there are no more. Each may take `seconds` of processor time, and memory may grow by
    `more_bytes`: beyond that the process dies, of SIGPROF or of what lacks the memory."""
    _limit_memory(more_bytes)
    with contextlib.suppress(OSError):  # should memory run short all the same, this process goes before the engine
        Path("/proc/self/oom_score_adj").write_text("1000")
    frames = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    while (question := read_frame(0)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        said = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_all(frames, frame(said))


def _limit_memory(more_bytes: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = used + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
