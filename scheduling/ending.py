"""How a run ends: all is answered, it is drained, its time is up, or no worker is left.

A drain starts nothing more: what waits leaves for the next start of the run, what workers have queued is recalled, what
runs may end until a time that is given. A time limit is a drain when nothing more can start in time
(`scheduling.deadline`); until then what would be late is recalled. In the end `Stop` is instructed, once, when every
answer that was handed to the record is durable.

This module decides over the ledger's books and has the dispatcher recall. It knows no events of requests.
"""

from __future__ import annotations

from enum import Enum

from scheduling.dispatch import Dispatcher
from scheduling.errors import ProtocolError
from scheduling.events import DrainRequested, Exhausted, GiveUp, Instruction, Stop, TimeLimited
from scheduling.ledger import Ledger, Phase, WorkerState


class Mode(Enum):
    """Of the whole plane. OPEN: running. DRAINING: starts nothing new. STOPPED: `Stop` has been instructed."""

    OPEN = "open"
    DRAINING = "draining"
    STOPPED = "stopped"


class Ending:
    """See the module's text."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self.mode = Mode.OPEN
        self.input_ended = False
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._drain_reason = ""
        self._limit_reason = ""
        self._give_up_at: float | None = None

    # ------------------------------------------------------------ what has happened

    def end_input(self) -> None:
        """Nothing more will arrive."""
        if self.input_ended:
            raise ProtocolError("the input ended twice")
        self.input_ended = True

    def drain(self, event: DrainRequested, now: float, out: list[Instruction]) -> None:
        """Start nothing more, from now on."""
        if self.mode is Mode.STOPPED:
            return
        self._close(event.reason, event.give_up_at, out)
        for worker in self._ledger.workers.values():
            if queued := worker.unstarted():
                self._dispatcher.recall(worker, queued, now, out)

    def limit_time(self, event: TimeLimited) -> None:
        """There is a time limit, or it is another one from now on."""
        self._dispatcher.horizon.end_at = event.end_at
        self._limit_reason = event.reason

    def keep_time(self, now: float, out: list[Instruction]) -> None:
        """Time has passed. Before the limit what would be late does not start; then nothing is waited for."""
        end_at = self._dispatcher.horizon.end_at
        if end_at is not None and self.mode is not Mode.STOPPED:
            self._keep_limit(end_at, now, out)
        if self.mode is Mode.DRAINING and self._give_up_at is not None and now >= self._give_up_at:
            self._give_up_running(out)

    def stop_if_over(self, unacknowledged: int, out: list[Instruction]) -> None:
        """Instruct `Stop` if nothing is left to do. `unacknowledged`: answers that are not durable yet."""
        if unacknowledged or self.mode is Mode.STOPPED:
            return
        if not self._ledger.live and self.mode is Mode.DRAINING:
            self._stop("drained", self._drain_reason, out)
        elif not self._ledger.live and self.input_ended and self._ledger.totals.set_aside:
            self._stop("drained", self._limit_reason, out)
        elif not self._ledger.live and self.input_ended:
            self._stop("done", "", out)
        elif all(worker.state is WorkerState.GONE for worker in self._ledger.workers.values()):
            reasons = "; ".join(f"rank {w.id}: {w.reason}" for w in self._ledger.workers.values())
            self._stop("no workers", reasons, out)

    # ------------------------------------------------------------ what follows

    def _keep_limit(self, end_at: float, now: float, out: list[Instruction]) -> None:
        """What would be late does not start. When nothing more can start it is a drain."""
        deadline = self._dispatcher.deadline
        if now < end_at:
            for worker, late in deadline.late(now):
                self._dispatcher.recall(worker, late, now, out)
        over = now >= end_at or self.mode is Mode.DRAINING
        if over or deadline.nothing_in_time(now, self._dispatcher.target):
            self._close(self._limit_reason, end_at, out)

    def _close(self, reason: str, give_up_at: float | None, out: list[Instruction]) -> None:
        """Hand nothing more out. What workers have queued may start."""
        if give_up_at is not None and (self._give_up_at is None or give_up_at < self._give_up_at):
            self._give_up_at = give_up_at
        if self.mode is Mode.DRAINING:
            return
        self.mode = Mode.DRAINING
        self._drain_reason = reason
        out.append(Exhausted(True))
        for request in self._dispatcher.clear():
            self._ledger.abandon(request)

    def _give_up_running(self, out: list[Instruction]) -> None:
        """Time is up: nothing that a worker still has is waited for."""
        for worker in self._ledger.workers.values():
            left = worker.holdings()
            if not left:
                continue
            out.append(GiveUp(worker.id, [(request.index, request.attempt) for request in left]))
            for request in left:
                if request.twin is not None:
                    self._ledger.part(request)  # the other is given up in its turn
                    continue
                self._ledger.totals.unfinished += 1
                self._ledger.move(request, None, Phase.WAITING)
                self._ledger.abandon(request)
            self._dispatcher.note_room(worker)

    def _stop(self, outcome: str, reason: str, out: list[Instruction]) -> None:
        self.mode = Mode.STOPPED
        out.append(Stop(outcome, reason))
