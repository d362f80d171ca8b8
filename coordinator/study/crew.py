"""The ranks of a study between its cells. Rank 0 calls those that the next cell takes; the others sleep, and look
whether it is their turn as seldom as any idle rank (`coordinator.transport.Backoff`). Messages go over the whole
world; a cell has communicators of its own. Ranks that no cell takes for long hear that rank 0 is still there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from coordinator.mpi import World
from coordinator.transport import Backoff
from scheduling.errors import EXIT_INFRASTRUCTURE, HandshakeError, RankLostError
from scheduling.messages import Host

GATHER_S = 120.0
POST_S = 10.0
BEAT_S = 60.0
SILENCE_MAX_S = 3600.0
"""A rank that hears nothing for longer ends the study. Rank 0 says nothing while the metrics of a cell are made."""


class Call(msgspec.Struct, frozen=True):
    """To a rank: join the cell of these ranks, rank 0 first. `members` empty: the study is over; or, with `beat`, it
    goes on without that rank."""

    members: list[int]
    number: int
    log_dir: str
    beat: bool = False


class Crew:
    """Rank 0's side."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._link = world.endpoint()
        self._number = 0
        self._beat_at = time.monotonic() + BEAT_S

    def hosts(self, check: Callable[[], None]) -> dict[int, Host]:
        """Where the other ranks are. `check` is called meanwhile, and may raise.

        Raises RankLostError for one that does not say it in time.
        """
        found: dict[int, Host] = {}
        others = range(1, self._world.size)
        deadline, backoff = time.monotonic() + GATHER_S, Backoff()
        while len(found) < len(others):
            for rank, payload in self._link.receive():
                found[rank] = msgspec.json.decode(payload, type=Host)
            missing = [rank for rank in others if rank not in found]
            if missing and (time.monotonic() > deadline or self._link.lost()):
                who = ", ".join(map(str, missing))
                raise RankLostError(f"rank {who} did not start within {GATHER_S:.0f} s: look at its host")
            check()
            time.sleep(backoff.next_s(in_flight=True))
        return found

    def call(self, members: Sequence[int], log_dir: str) -> World:
        """Bring these ranks together, rank 0 first. Returns their world."""
        self._number += 1
        self._post(members[1:], Call(list(members), self._number, log_dir))
        return self._world.among(members, self._number)

    def beat(self) -> None:
        """Say that rank 0 is here, if it is time. To be called all the while."""
        now = time.monotonic()
        if now < self._beat_at:
            return
        self._beat_at = now + BEAT_S
        for rank in range(1, self._world.size):
            self._link.post(rank, msgspec.json.encode(Call([], self._number, "", beat=True)))
        self._link.unsent_bytes()  # what has left is forgotten

    def dismiss(self) -> None:
        """The study is over, for whatever reason."""
        self._post(range(1, self._world.size), Call([], 0, ""))

    def _post(self, ranks: Sequence[int], call: Call) -> None:
        for rank in ranks:
            self._link.post(rank, msgspec.json.encode(call))
        deadline = time.monotonic() + POST_S
        while self._link.unsent_bytes() and time.monotonic() < deadline:
            time.sleep(1e-3)


def answer_calls(world: World, host: Host, join: Callable[[World, str], None]) -> None:
    """Be one of the other ranks until the study is over. `join`: be a worker of a cell, given its world and where its
    logs are; HandshakeError is rank 0's to tell."""
    link, backoff = world.endpoint(), Backoff()
    link.post(0, msgspec.json.encode(host))
    heard_at = time.monotonic()
    while True:
        calls = link.receive()
        why = "a rank has died between two cells" if link.lost() else ""
        if not calls and time.monotonic() - heard_at > SILENCE_MAX_S:
            why = f"nothing was heard of rank 0 for {SILENCE_MAX_S:.0f} s"
        if why:
            print(f"llmpi: rank {world.rank}: {why}: it leaves", file=sys.stderr)
            world.abort(EXIT_INFRASTRUCTURE)
        for _, payload in calls:
            call = msgspec.json.decode(payload, type=Call)
            if call.beat:
                continue
            if not call.members:
                return
            try:
                join(world.among(call.members, call.number), call.log_dir)
            except HandshakeError:
                continue
        if calls:
            heard_at = time.monotonic()
            backoff.reset()
        else:
            time.sleep(backoff.next_s(in_flight=False))
