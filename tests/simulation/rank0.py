"""What rank 0 lives in: its sleep is when the others live, its operations on disk take time and can fail.

`Rank0` is the process. It ends where it sleeps, or at an operation on disk, by `Rank0DiedError`; whatever it tries
afterwards, in the clean-up of its last moment, ends so too, and reaches neither disk nor network.

Real polling is in vain most of the time. So that simulated time costs little, a sleep may last longer than asked, as
sleeps do, while nothing happens that rank 0 could see: up to `IDLE_S`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from storage.rundir import METRICS_NAME
from tests.simulation.agenda import Agenda, Trace, ViolationError

IDLE_S = 0.2
FAST_S = 1e-4
"""What an operation on disk takes."""
TURNS_MAX = 20_000
"""Looks at the clock without sleeping, after which rank 0 is taken to spin."""


@dataclass(slots=True)
class Incident:
    """What happens at an operation on disk: the `left`-th from now on, of those on the file `name` if it is given.

    `do` ends the process; without it the operation fails with errno `number`, and so do the `count` - 1 after it.
    `half`: it is half done if it can be.
    """

    left: int
    name: str | None
    half: bool
    do: Callable[[], None] | None = None
    number: int = 0
    count: int = 1

    def strikes(self, name: str) -> bool:
        """Whether it is due, given the name of the file that is operated on."""
        if self.name is not None and self.name != name:
            return False
        self.left -= 1
        return self.left <= 0


class Rank0DiedError(BaseException):
    """The process has ended. Not an Exception: nothing may handle it."""


class Rank0:
    """See the module's text. `deadline_s`: by then it must have ended, whatever happens."""

    def __init__(self, agenda: Agenda, trace: Trace, clock_s: float) -> None:
        self._agenda, self._trace = agenda, trace
        self._clock_s = clock_s
        self._stirred = False
        self._in_agenda = False
        self._looks = 0
        self._stopped_until_s = 0.0
        self.incidents: list[Incident] = []
        self._violation: ViolationError | None = None
        self.dead = False
        self.deadline_s = float("inf")
        self.why_deadline = ""
        self.failing: int | None = None
        """The errno of all operations that change something."""
        self.latency_s = FAST_S
        self.wall_jump_s = 0.0
        self.held_up_s = 0.0
        """How long it has been stopped, or its disk has taken: in so far it cannot keep to times."""

    # ------------------------------------------------------------ time

    def clock(self) -> float:
        self._looks += 1
        if self._looks > TURNS_MAX:
            self.violate("rank 0 spins: it looks at the clock again and again and never sleeps")
        return self._agenda.now_s + self._clock_s

    def wall_clock(self) -> float:
        return 1.8e9 + self._agenda.now_s + self.wall_jump_s

    def sleep(self, descriptors: Sequence[int | None], delay_s: float) -> None:
        self._must_live()
        self._looks = 0
        until_s = self._agenda.now_s + max(delay_s, 1e-6)
        self._live(until_s, until_s + IDLE_S)
        self._stirred = False

    def _live(self, until_s: float, idle_s: float) -> None:
        """Let the others live: until `idle_s` while nothing concerns rank 0, else until `until_s`."""
        agenda = self._agenda
        self._in_agenda = True
        try:
            while True:
                end_s = until_s if self._stirred else idle_s
                end_s = max(end_s, self._stopped_until_s)
                if agenda.next_s() > end_s:
                    break
                agenda.step()
                if self.dead:
                    break
        except ViolationError as error:
            self._violation = self._violation or error
            raise
        finally:
            self._in_agenda = False
        agenda.now_s = max(agenda.now_s, min(end_s, agenda.next_s()))
        self._must_live()
        if agenda.now_s > self.deadline_s:
            self.violate(f"somebody waits for ever: {self.why_deadline}")

    def stir(self) -> None:
        """Something has happened that rank 0 can see."""
        self._stirred = True

    def stop_for(self, seconds: float) -> None:
        """It is stopped, and goes on after so long."""
        self._stopped_until_s = max(self._stopped_until_s, self._agenda.now_s + seconds)
        self.held_up_s += seconds

    def go_on(self) -> None:
        self._stopped_until_s = 0.0

    # ------------------------------------------------------------ its end

    def die(self) -> None:
        self.dead = True

    def violate(self, what: str) -> None:
        """Nothing that comes after it may hide what was found first."""
        self._violation = self._violation or ViolationError(what)
        raise self._violation

    def _must_live(self) -> None:
        if self._violation is not None:
            raise self._violation
        if self.dead:
            raise Rank0DiedError

    # ------------------------------------------------------------ disk

    def heal(self) -> None:
        """The disk is right again, and goes on being so."""
        self.failing = None
        self.incidents.clear()
        self.latency_s = FAST_S

    def operate(self, what: str, path: Path, half: Callable[[], None] | None = None) -> None:
        self._wait_for_disk()
        name = METRICS_NAME if path.name.startswith(f".{METRICS_NAME}") else path.name  # that one says who writes it
        self._trace.note(self._agenda.now_s, "disk", what, name)
        for incident in list(self.incidents):
            if incident.strikes(path.name):
                self._strike(incident, what, name, half)
        if self.failing is not None:
            self._refuse(self.failing, what, name)

    def _strike(self, incident: Incident, what: str, name: str, half: Callable[[], None] | None) -> None:
        if incident.half and half is not None:
            incident.half = False
            half()
        if incident.do is not None:
            self._trace.fault(self._agenda.now_s, "crash at a write", what, name)
            incident.do()
            self._must_live()
        incident.count -= 1
        if incident.count <= 0:
            self.incidents.remove(incident)
        self._refuse(incident.number, what, name)

    def _refuse(self, number: int, what: str, name: str) -> NoReturn:
        self._trace.fault(self._agenda.now_s, "disk error", what, name, number)
        raise OSError(number, os.strerror(number))

    def look(self) -> None:
        """Takes no time while the disk is fast: then it is answered from memory."""
        self._must_live()
        if self.latency_s > FAST_S:
            self._wait_for_disk()

    def _wait_for_disk(self) -> None:
        self._must_live()
        if not self._in_agenda:
            self._looks = 0
            self.held_up_s += self.latency_s
            until_s = self._agenda.now_s + self.latency_s
            self._live(until_s, until_s)
