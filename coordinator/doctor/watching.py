"""The start of MPI, watched from outside: it holds Python's lock, so that no thread of ours can say that it hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

START = "MPI did not start within {:.0f} s: look at the other ranks' hosts and at what the launcher printed"
_WATCH = """
timeout "$patience" cat >/dev/null
if [ $? = 124 ]; then
    [ -z "$said" ] || echo "$said" >&2
    kill -KILL "$rank"
fi
"""


@contextlib.contextmanager
def watched(patience_s: float, *, speaks: bool) -> Iterator[None]:
    """End this process, with a line if it `speaks`, where what is done in here takes longer."""
    environ = {"PATH": os.environ.get("PATH", os.defpath), "patience": f"{patience_s:g}", "rank": str(os.getpid())}
    environ["said"] = f"llmpi: {START.format(patience_s)}" if speaks else ""
    try:
        watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environ, cwd="/"
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait()
