"""What bounds MPI's own start and end, which wait for every rank and may wait for ever.

MPI holds the interpreter meanwhile, so that no thread and no signal handler of ours runs: an alarm ends the process.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from coordinator.launcher_end import GRACE_S, dismiss_guard, guard_launcher

START_S = 600.0
"""For all ranks to come to MPI's start. Each loads what it needs before, from a file system that all of them read."""


@contextlib.contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """SIGALRM ends this process then. An alarm that the program has set comes as much later as what is within takes."""
    handler = None
    with contextlib.suppress(ValueError):  # not in the main thread: what the program has set stays
        handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    left_s, every_s = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if handler is not None:
            signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


@contextlib.contextmanager
def started_within(seconds: float, rank: int | None) -> Iterator[None]:
    """MPI's start, which is within, may take so long. Then the launcher is ended, and with it the ranks: a launcher
    that lets ranks die would wait for one that is stopped. Rank 0 sees to it, or rank 1 if that is the one which does
    not come.
    """
    guard = None
    if rank in (0, 1):
        text = (
            f"llmpi: not all ranks came to MPI's start within {seconds:g} s: one is stopped, still loads, or its host "
            "cannot be reached. Ending the job"
        )
        guard = guard_launcher(seconds + rank * GRACE_S, says=text)
    try:
        with alarm_after(seconds + 2 * GRACE_S):
            yield
    finally:
        dismiss_guard(guard)
