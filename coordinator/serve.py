"""The loops that drive a worker rank and rank 0 from outside: a turn, then sleep if nothing happened.

A worker's sleep is a wait on its engine's pipe, so that a finished step wakes it at once. Rank 0 drives the workers
that it hosts itself in the same loop. An exception in a worker ends neither the rank nor the job: it is told to rank 0
with its traceback, and the rank stays to be stopped in order.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from coordinator.collect import Collecting, collect
from coordinator.relays import Branch
from coordinator.surroundings import Sleep, sleep
from coordinator.transport import Backoff
from scheduling.errors import HandshakeError, RankLostError
from workers.worker import Worker

if TYPE_CHECKING:  # a worker rank has no use for rank 0's loop
    from coordinator.loop import Coordinator


def serve(
    worker: Worker, collectives: Callable[[], Collecting], clock: Callable[[], float], sleep: Sleep = sleep,
    branch: Branch | None = None,
) -> None:  # fmt: skip
    """Be a worker rank until rank 0 says stop. `branch`: its endpoint, where that may carry for others too.

    Raises:
        HandshakeError: rank 0 has refused this rank.
        RankLostError: rank 0 is gone, or silent for longer than it may be. The engine has ended.
    """
    try:
        with calm_collector():
            _serve(worker, collectives, clock, sleep, branch)
    finally:
        worker.close()
    if worker.refused is not None:
        raise HandshakeError(worker.refused)


def _serve(
    worker: Worker, collectives: Callable[[], Collecting], clock: Callable[[], float], sleep: Sleep,
    branch: Branch | None,
) -> None:  # fmt: skip
    backoff = Backoff()
    while not worker.stopped:
        busy = step(worker)
        if worker.collect_epoch is not None:
            worker.collect_epoch = None
            collect(collectives(), [worker.metrics], clock(), reduced=worker.reduced)
            worker.on_collected()
        if (reason := worker.why_leave()) is not None and not worker.stopped:
            raise RankLostError(reason)
        carries = False
        if branch is not None:
            busy = branch.took_part() or busy
            carries = branch.lively
        if busy:
            backoff.reset()
        else:
            sleep([worker.fileno()], backoff.next_s(worker.in_flight or carries))


def drive(coordinator: Coordinator, hosted: list[Worker], keep_on: Callable[[], bool], sleep: Sleep = sleep) -> None:
    """Be rank 0 until there is an outcome, or `keep_on` says no."""
    backoff = Backoff()
    with calm_collector():
        while coordinator.outcome is None and keep_on():
            if turn(coordinator, hosted):
                backoff.reset()
            else:
                sleep([worker.fileno() for worker in hosted], backoff.next_s(coordinator.in_flight))


@contextmanager
def calm_collector() -> Iterator[None]:
    """Make Python's cycle collector rare: what a rank holds in flight is many, acyclic and soon gone by itself."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def step(worker: Worker) -> bool:
    """One turn of a worker. An exception of its own is told to rank 0 and ends its work, not the rank."""
    try:
        return worker.listen() if worker.crashed else worker.step()
    except Exception as error:
        worker.crash(f"{type(error).__name__}: {error}", traceback.format_exc())
        return True


def turn(coordinator: Coordinator, hosted: list[Worker]) -> bool:
    """One turn of rank 0 and of the workers it hosts. True if anything happened."""
    busy = coordinator.step()
    for worker in hosted:
        busy = step(worker) or busy
    return busy
