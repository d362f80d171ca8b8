"""Requests that several engines died with: each is run once more, alone.

A *suspect* (`Limits.suspect_deaths`) waits until a worker owns nothing and there is nothing else for it, and is run
there with nothing beside it: then what becomes of the engine says whether the request is to blame, and those that ran
beside it are not failed with it. Nobody is kept idle for it earlier, unless engines die and die and nothing is answered
in between: then suspects come first, because workers do not restart engines for ever. While some worker has answered
anything, one that never has is given no suspect: its engine itself may be what is broken. While none has, few suspects
come first, for the same reason.

This module decides over the ledger's books and is told what happens to engines. It knows no events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from scheduling.deadline import Deadline
from scheduling.events import Assign, Instruction
from scheduling.ledger import Ledger, Phase, RequestEntry, WorkerEntry, WorkerState, must
from scheduling.limits import Limits
from scheduling.policies import Policy

FRUITLESS_DEATHS = 4
"""After so many deaths of engines with no answer of anybody in between suspects come first: fewer than a worker
survives (`workers.care.RESTARTS_MAX`), so that each start of a run answers or fails something."""
UNPROVEN_TRIES = 2
"""So many suspects come first where nobody has answered anything yet."""


class Suspects:
    """See the module's text. `note_room` is told of workers whose number of requests has changed."""

    def __init__(
        self,
        ledger: Ledger,
        policy: Policy[RequestEntry],
        limits: Limits,
        deadline: Deadline,
        note_room: Callable[[WorkerEntry], None],
    ) -> None:
        self._ledger = ledger
        self._policy = policy
        self._limits = limits
        self._deadline = deadline
        self._note_room = note_room
        self._queue: deque[RequestEntry] = deque()
        self._fruitless = 0
        """Deaths of engines since the last answer."""
        self.come_first = False
        """As long as there are any."""
        self._unproven_tries = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    def note_answer(self) -> None:
        """Somebody has answered something."""
        self._fruitless = 0

    def note_death(self) -> None:
        """An engine has died with requests. To be told before these are put back."""
        self._fruitless += 1

    def keep(self, requests: Iterable[RequestEntry]) -> list[RequestEntry]:
        """Of requests that had an owner and wait again, keep the suspects; return the others."""
        others = []
        for request in requests:
            if request.deaths < self._limits.suspect_deaths:
                others.append(request)
            else:
                self._queue.append(request)
                self.come_first = self.come_first or self._fruitless >= FRUITLESS_DEATHS
        return others

    def clear(self) -> list[RequestEntry]:
        """Forget and return all that wait."""
        left = list(self._queue)
        self._queue.clear()
        self.come_first = False
        return left

    def hand_out(self, hungry: list[WorkerEntry], recalling: bool, now: float, out: list[Instruction]) -> None:
        """Give one each to workers that own nothing and could be given nothing else, or should not.

        `hungry`: the workers with room. `recalling`: something comes back that may be for them.
        """
        workers = self._ledger.workers.values()
        proven = any(w.requests for w in workers if w.state is not WorkerState.GONE)
        for worker in hungry:
            if not self._queue:
                break
            if worker.owned or (proven and not worker.requests):
                continue
            if self._policy.available(worker.id):
                if not self.come_first or (not proven and self._unproven_tries >= UNPROVEN_TRIES):
                    continue
                self._unproven_tries += not proven
            elif recalling:
                continue
            request = self._in_time(worker, now, out)
            if request is None:
                continue
            worker.apart = True
            self._ledger.move(request, worker, Phase.QUEUED)
            self._note_room(worker)
            out.append(Assign(worker.id, [(request.index, request.attempt)]))
        self.come_first = self.come_first and bool(self._queue)

    def _in_time(self, worker: WorkerEntry, now: float, out: list[Instruction]) -> RequestEntry | None:
        """The first; None if the worker would not end it in time. What nobody would is set aside."""
        while self._queue:
            request = self._queue[0]
            if self._deadline.in_time(worker, request, now):
                return self._queue.popleft()
            if self._deadline.in_time_somewhere(worker, request, now):
                return None
            self._deadline.set_aside([self._queue.popleft()], out)
        return None

    def check(self) -> None:
        """Verify what is kept here against the books, linear in what is owned.

        Raises:
            BugError: something does not add up.
        """
        must(not self.come_first or bool(self._queue), "suspects come first though there are none")
        for worker in self._ledger.workers.values():
            owned = sum(request.deaths >= self._limits.suspect_deaths for request in worker.holdings())
            must(owned == worker.apart and (not owned or worker.owned == 1), f"rank {worker.id} runs no one alone")
