"""The engine process: `python -m workers.engine_main IN_FD OUT_FD [PARENT_PID]`.

Started by `workers.supervisor`. In this order: tie its life to its parent's, ignore the signals that are meant for
the rank, read `EngineStart`, set affinity and device mask, and only then import llama.cpp, because GPU libraries
read their environment once. Then `workers.engine` takes over until the pipe from the rank ends. A simulated engine
(`EngineConfig.service_times`) goes the same way, and imports no llama.cpp.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scheduling.errors import ConfigError, ModelFileError, ProtocolError
from workers.frames import read_frame
from workers.outbox import Outbox, fail
from workers.processes import tie_to_parent
from workers.protocol import EngineConfig, EngineStart, decode_to_engine

if TYPE_CHECKING:
    from workers.engine import BatchingEngine

SWITCH_INTERVAL_S = 0.0005
"""How long a thread waits for Python's lock before it asks for it: stepping must not wait 5 ms for a tokenizer."""

RANKS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to the whole process group by terminals and launchers. The rank decides what they mean for its engine."""


def ignore_ranks_signals() -> None:
    """The supervisor starts us with these blocked, so that none can come before this."""
    for number in RANKS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RANKS_SIGNALS)


def set_up(config: EngineConfig) -> None:
    """Affinity and environment, before any GPU library is loaded."""
    os.environ.update(config.device_mask)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    if config.cpus and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, config.cpus)
        except OSError as error:
            print(f"cannot take the processors {list(config.cpus)}: {error}", file=sys.stderr)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def check_model_file(path: str) -> None:
    """Raises `ModelFileError` for what can be said before llama.cpp looks."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"there is no model file {path}") from None
    except OSError as error:
        raise ModelFileError(f"the model file {path} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file: it begins with {magic!r}")


def load(config: EngineConfig, outbox: Outbox) -> BatchingEngine:
    """Load llama.cpp, then the model. Raises `UserError` or `EngineError` with the reason."""
    from workers.engine import BatchingEngine

    if config.service_times is not None:
        from workers.simulated import SimulatedLibrary

        return BatchingEngine(config, outbox, SimulatedLibrary(config.service_times))
    for path in (config.model, config.draft_model):
        if path is not None:
            check_model_file(path)
    try:
        from workers.llama import Llama
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "llama_cpp":
            raise
        raise ConfigError(f"llama-cpp-python cannot be loaded: {error}; install it for this machine") from error
    return BatchingEngine(config, outbox, Llama())


def run(in_fd: int, out_fd: int) -> None:
    body = read_frame(in_fd)
    if body is None:
        return
    outbox = Outbox(out_fd)
    try:
        message = decode_to_engine(body)
        if not isinstance(message, EngineStart):
            raise ProtocolError(f"an engine is started with EngineStart, not {type(message).__name__}")
        set_up(message.config)
        engine = load(message.config, outbox)
    except Exception as error:
        fail(outbox, error)
    outbox.send(engine.loaded)
    engine.serve(in_fd)


def main() -> None:
    in_fd, out_fd, *rest = (int(argument) for argument in sys.argv[1:])
    tie_to_parent(rest[0] if rest else None)
    ignore_ranks_signals()
    faulthandler.enable()
    run(in_fd, out_fd)
    sys.stderr.flush()
    # Not sys.exit: threads may be inside llama.cpp, and the kernel frees memory faster than destructors do.
    os._exit(0)


if __name__ == "__main__":
    main()
