"""Python processes of ours: how they are started, and that they end with who has started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of our packages, which need not be installed."""


def python_command(module: str, executable: str = sys.executable) -> list[str]:
    """What calls `main()` of `module` in a process of its own; arguments are to follow.

    As `python -m`, which takes a folder `workers` or `storage` where the user stands for ours.
    """
    paths = f"import sys; sys.path[:] = [*filter(None, sys.path), {HOME!r}]"
    return [executable, "-c", f"{paths}; from {module} import main; sys.exit(main())"]


def tie_to_parent(parent_pid: int | None) -> None:
    """Be killed when the parent's thread that started this process ends; leave now if it has ended already.

    Linux sends the death signal when that *thread* ends, so a rank starts its engine from its main thread.
    Elsewhere the end of file on the pipe has to do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(0)
