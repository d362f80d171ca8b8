"""Compiling a grammar where it can do no harm: in a process that may die of it.

llguidance bounds nearly all that it does, but compiling a schema of 4 KiB can still take 8 GiB, another minutes, and a
chain of 1,500 references overflows the stack. Nothing can stop a native call but the end of its process. So each new
grammar is compiled here first, with a limit on processor time, memory and stack. One that comes through compiles in
the engine as well: there it does the same again, with more room.

    the engine        `Trial.reason(grammar)`: why it cannot be used, "" if it can
    this process      `python -m workers.trial PARENT_PID`: frames with grammars in, frames with reasons out
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from workers.engine_main import tie_to_parent
from workers.frames import read_frame, write_all
from workers.protocol import FRAME_LENGTH

COMPILE_S = 3.0
"""Of processor time."""
COMPILE_BYTES = 256 << 20
STACK_BYTES = 16 << 20

LIMITS = LLParserLimits(
    # Rules over single characters make many items. A mask takes at most about their number squared times 80 ps.
    step_max_items=100_000,
    max_items_in_row=10_000,
    # About 2 KiB each, kept as long as the grammar is.
    max_lexer_states=50_000,
    verbose_errors=False,
)

Result = TypeVar("Result")


class Trial:
    """The process and the pipes to it. It is started when it is needed, and again when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._last_code = 0

    def reason(self, grammar: str) -> str:
        """Why `grammar`, in llguidance's Lark, cannot be compiled within the limits; "" if it can."""
        fresh = self._process is None
        said = self._ask(grammar)
        if said is None and not fresh and self._last_code == -signal.SIGABRT:  # what came before may have left little
            said = self._ask(grammar)
        return _LIMITS_REACHED.get(self._last_code, _DIED) if said is None else said

    def _ask(self, grammar: str) -> str | None:
        """What it says; None if it died, with `_last_code` set."""
        if self._process is None:
            self._start()
        with contextlib.suppress(OSError):
            write_all(self._to, _frame(grammar))
        body = read_frame(self._from)
        if body is not None:
            return body.decode()
        self.close()
        return None

    def close(self) -> None:
        """End the process, if it has not."""
        process, self._process = self._process, None
        if process is not None:
            os.close(self._to)
            os.close(self._from)
            self._last_code = process.wait()

    def _start(self) -> None:
        for_it, self._to = os.pipe()
        self._from, from_it = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.trial", str(os.getpid())],
            stdin=for_it,
            stdout=from_it,
            stderr=subprocess.DEVNULL,
        )
        os.close(for_it)
        os.close(from_it)


_LIMITS_REACHED = {
    -signal.SIGPROF: f"compiling it takes more than {COMPILE_S:g} seconds",
    -signal.SIGABRT: f"compiling it takes more than {COMPILE_BYTES >> 20} MiB of memory",
    -signal.SIGSEGV: "its parts are nested too deeply",
}
_DIED = "compiling it fails"


def on_stack(stack_bytes: int, work: Callable[[], Result]) -> Result:
    """What `work` returns, run in a thread with a stack of its own size: compiling recurses."""
    results: list[Result] = []
    earlier = threading.stack_size(stack_bytes)
    try:
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
    finally:
        threading.stack_size(earlier)
    thread.join()
    return results[0]


def in_plain_words(error: str) -> str:
    """What llguidance says is wrong, without places in a notation that nobody has written and without its marks."""
    if "NoExtensionBias" in error:
        return "no text at all can satisfy it"
    if "oneOf constraints" in error:
        return "oneOf works only where no two of its options can hold at once; anyOf always does"
    lines = [line.strip() for line in error.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("<", "^"))] or ["unknown error"]
    text = re.sub(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ", "", lines[0])
    why = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if why:  # a regular expression, with a mark where it is wrong
        text = f"{text} {why[0]}"
    if unknown := re.fullmatch(r"Unimplemented keys: \[(.*)\]", text):
        return f"keywords that are not supported: {unknown[1]}"
    return re.sub(r" is not present in a registry and .*", " is not in the schema, and none is fetched", text)


# ---------------------------------------------------------------- the process


class _Bytes:
    """A vocabulary of the 256 bytes and an end, for `TokenizerWrapper`."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_tokenizer() -> LLTokenizer:
    """Enough to compile with: a model's vocabulary changes masks, not grammars."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _frame(text: str) -> bytes:
    body = text.encode()
    return FRAME_LENGTH.pack(len(body)) + body


def _compile(tokenizer: LLTokenizer, grammar: str) -> str:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return in_plain_words(matcher.get_error()) if matcher.is_error() else ""


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + COMPILE_BYTES + STACK_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(parent_pid: int) -> None:
    tie_to_parent(parent_pid)
    tokenizer = byte_tokenizer()
    _limit_memory()
    while (body := read_frame(0)) is not None:
        grammar = body.decode()
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
        said = on_stack(STACK_BYTES, lambda: _compile(tokenizer, grammar))  # noqa: B023, run at once
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_all(1, _frame(said))


if __name__ == "__main__":
    main(int(sys.argv[1]))
