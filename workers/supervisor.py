"""A rank's hold on its engine process: start it, talk to it, learn how it ended, never wait for it.

The engine is started fresh, not forked from the rank: MPI and CUDA survive no fork. Its environment loses what
MPI and launchers put into it, so that no library in it takes the engine for a rank. Two pipes carry frames; both
are non-blocking on this side and what does not fit is queued and written at the next `poll`. The engine's stderr
is drained by a thread, kept in part for `exit_reason` and passed to a log in bounded size.

The engine never outlives its rank: it asks the kernel to be killed when its parent ends, and leaves at end of file
on its pipe. The kernel looks at the *thread* that started it, so make an `EngineProcess` in the rank's main thread
(or in one that lives as long).

This module knows frames and processes, and nothing of requests or of llama.cpp.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from scheduling.errors import ProtocolError
from workers.engine_main import RANKS_SIGNALS
from workers.frames import PipeReader, PipeWriter
from workers.processes import python_command
from workers.protocol import (
    Cancel,
    EngineConfig,
    EngineStart,
    FromEngine,
    Job,
    Recall,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)

LAST_WORDS_CHARACTERS = 300
STDERR_TAIL_BYTES = 16 << 10
STDERR_LOG_BYTES = 1 << 20
PIPE_BYTES = 1 << 20
KILL_WAIT_S = 5.0
"""After SIGKILL a process can still hang in the kernel (a GPU driver, NFS): it is left behind then."""
LAST_WORDS_S = 2.0
"""How long an ended engine's last words are waited for: the thread that reads them may be behind."""
WAIT_STEP_S = 0.02

ENGINE_COMMAND = tuple(python_command("workers.engine_main"))

LAUNCHER_PREFIXES = (
    "OMPI_",
    "OPAL_",
    "ORTE_",
    "PMIX_",
    "PMI_",
    "PMI2_",
    "PRTE_",
    "PRRTE_",
    "PALS_",
    "MPI_",
    "MPIEXEC_",
    "MPICH_",
    "MPIR_",
    "MV2_",
    "I_MPI_",
    "HYDRA_",
    "HYDI_",
    "SLURM_",
    "SRUN_",
)
"""Variables of MPI libraries and launchers. The engine needs none: what it may use comes in its config."""
SPIN_THREADS_MAX = 8
SPIN_VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


def engine_environment(environ: Mapping[str, str], device_mask: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the rank's without its launcher, with the devices it may see.

    PYTHONPATH leads to the code that this process runs, wherever that was imported from.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    kept.pop("PMIX", None)
    code = str(Path(__file__).resolve().parent.parent)
    others = [entry for entry in kept.pop("PYTHONPATH", "").split(os.pathsep) if entry and entry != code]
    # Where packages are installed the engine looks anyway, and put first they could hide the standard library.
    first = [] if Path(code).name in ("site-packages", "dist-packages") else [code]
    if first or others:
        kept["PYTHONPATH"] = os.pathsep.join(first + others)
    # A GGML_ASSERT would start a debugger for its backtrace if it found one.
    kept["GGML_NO_BACKTRACE"] = "1"
    # numpy's BLAS is not used, but makes a thread per processor when it is loaded.
    kept.setdefault("OPENBLAS_NUM_THREADS", "1")
    kept.update(device_mask)
    return kept


def waiting_environment(environ: Mapping[str, str], config: EngineConfig) -> dict[str, str]:
    """How long llama.cpp's threads look for each other before they sleep; nothing if the user has said.

    They meet after each operation, some hundred times a token. GNU's OpenMP has them look 300,000 times, milliseconds:
    where another process has the processor of one, the others burn theirs all that time. 1,000 is what it takes by
    itself where there are more threads than processors. Measured with two threads; where there are many, the slowest
    takes longer without being held up, so that these are left alone, as are those beside a GPU, which do little and
    must be awake when they are to do it.
    """
    threads = max(config.threads, config.threads_batch or 0)
    if config.gpu_layers or threads > SPIN_THREADS_MAX or not SPIN_VARIABLES.isdisjoint(environ):
        return {}
    return {"GOMP_SPINCOUNT": "1000"}


class _StderrDrain(threading.Thread):
    """Reads a pipe to its end, whatever comes: the last part is kept, the first part logged."""

    def __init__(self, fd: int, log_path: Path | None) -> None:
        super().__init__(name="engine-stderr", daemon=True)
        self._fd = fd
        self._log_path = log_path
        self._tail = bytearray()

    def run(self) -> None:
        log = None
        if self._log_path is not None:
            with contextlib.suppress(OSError):
                log = self._log_path.open("ab", buffering=0)
        room = STDERR_LOG_BYTES
        while data := self._read():
            self._tail = (self._tail + data)[-STDERR_TAIL_BYTES:]
            if log is not None and room > 0:
                with contextlib.suppress(OSError):  # a full disk must not stop the draining
                    log.write(data[:room])
                room -= len(data)
        os.close(self._fd)
        if log is not None:
            with contextlib.suppress(OSError):  # nor one that has gone, which says so when a file is closed, too
                log.close()

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, 1 << 16)
        except OSError:
            return b""

    def tail(self) -> str:
        return bytes(self._tail).decode("utf-8", "replace").strip()


class EngineProcess:
    """An engine in a child process. See `workers.port.Engine` for what its methods promise."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        log_path: Path | None = None,
        command: Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start the child. It loads in its own time: `EngineLoaded` or `EngineFailed` comes out of `poll`.

        `command`: what to start instead of the real engine; gets IN_FD, OUT_FD and our pid appended. Raises
        `OSError` if the process cannot be started at all.
        """
        started = ENGINE_COMMAND if command is None else command
        given = os.environ if environ is None else environ
        child_in, ours_out = os.pipe()
        ours_in, child_out = os.pipe()
        err_read, err_write = os.pipe()
        ours, childs = (ours_in, ours_out, err_read), (child_in, child_out, err_write)
        _widen(ours_out, child_out)
        # Blocked signals are inherited: none of the rank's can end the child before it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, RANKS_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [*started, str(child_in), str(child_out), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=err_write,
                stderr=err_write,
                pass_fds=(child_in, child_out),
                close_fds=True,
                env=engine_environment(given, config.device_mask) | waiting_environment(given, config),
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for fd in childs:
                os.close(fd)
        self._reader = PipeReader(ours_in)
        self._writer = PipeWriter(ours_out)
        self._log_path = log_path
        self._stderr = _StderrDrain(err_read, log_path)
        self._stderr.start()
        self._open = {ours_in, ours_out}
        self._ended = False
        self._fault = ""
        self._late: list[FromEngine] = []
        self._send(EngineStart(config))

    # ------------------------------------------------ talking

    def submit(self, jobs: list[Job]) -> None:
        if jobs:
            self._send(Submit(jobs))

    def recall(self, recall_id: int, keys: list[int]) -> None:
        self._send(Recall(recall_id, keys))

    def cancel(self, keys: list[int]) -> None:
        if keys:
            self._send(Cancel(keys))

    def _send(self, message: ToEngine) -> None:
        if self._writer.fd in self._open:
            self._writer.put(encode(message))

    def poll(self) -> list[FromEngine]:
        """All that has come since the last poll; empty for ever once `alive` is False."""
        messages, self._late = self._late, []
        if not self._ended:
            if self._writer.fd in self._open:
                self._writer.flush()
            messages += self._receive()
        return messages

    def _receive(self) -> list[FromEngine]:
        exited = self._process.poll() is not None
        messages: list[FromEngine] = []
        try:
            bodies = self._reader.read()
            for body in bodies:
                messages.append(decode_from_engine(body))
        except (ProtocolError, msgspec.DecodeError) as error:
            self._fault = f"it sent what is no frame of ours ({error}) and was killed"
            self._process.kill()
            self._end()
            return messages
        if self._reader.eof and not exited:
            # It can say nothing more. One that is on its way out keeps the exit status that it has.
            self._process.kill()
        if exited and (self._reader.eof or not bodies):
            self._end()
        return messages

    def fileno(self) -> int | None:
        """The pipe from the engine; None once it has come to its end."""
        return None if self._ended or self._reader.eof else self._reader.fd

    # ------------------------------------------------ its life

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def exit_reason(self) -> str:
        """Signal or exit code, and the last line that it wrote to stderr: one line. Empty while it lives."""
        code = self._process.poll()
        if code is None:
            return self._fault
        if self._fault:
            how = self._fault
        elif code < 0:
            how = f"killed by {_signal_name(-code)}"
        else:
            how = f"exit code {code}"
        self._stderr.join(timeout=LAST_WORDS_S)
        tail = self._stderr.tail()
        if words := last_words(tail):
            how += f"; its last words: {words}"
        if "\n" in tail.strip() and self._log_path is not None and self._log_path.exists():
            how += f" (more in {self._log_path})"
        return how

    def close(self, timeout_s: float) -> None:
        """End of file to the engine, SIGKILL after `timeout_s`. What it still says stays for `poll`."""
        self._close_fd(self._writer.fd)
        if not self._wait(timeout_s):
            self._process.kill()
            self._wait(KILL_WAIT_S)

    def _wait(self, timeout_s: float) -> bool:
        """Whether the process has ended by then. Its pipe is read meanwhile: it may have to finish a sentence."""
        deadline_s = time.monotonic() + timeout_s
        while self._process.poll() is None and (left_s := deadline_s - time.monotonic()) > 0:
            if not self._ended:
                self._late += self._receive()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(min(left_s, WAIT_STEP_S))
        return self._process.poll() is not None

    def _end(self) -> None:
        self._ended = True
        for fd in list(self._open):
            self._close_fd(fd)

    def _close_fd(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)


def last_words(stderr: str) -> str:
    """The line of a dead process's stderr that says most: the last one before Python's dump of its threads, if any;
    rather one in which llama.cpp passes on CUDA's error, which is followed by where it happened."""
    before, _, dump = stderr.partition("Fatal Python error:")
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    if not lines and dump:
        lines = [f"Fatal Python error:{dump}".splitlines()[0]]
    errors = [line for line in lines if line.startswith("CUDA error: ")]
    return (errors or lines)[-1][:LAST_WORDS_CHARACTERS] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _widen(*fds: int) -> None:
    """Larger pipes, so that a long submission goes in few polls. Systems may refuse."""
    if sys.platform == "linux":
        import fcntl

        for fd in fds:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, 1031, PIPE_BYTES)  # F_SETPIPE_SZ, named in fcntl since Python 3.10
