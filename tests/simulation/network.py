"""What carries envelopes between ranks: late, twice, out of order between different ranks, lost with who sent them.

Between two ranks the order is kept, as MPI keeps it. An envelope is on its way from `post` until it is delivered; what
a dying rank had on its way may be lost from any point on. A link that is cut holds everything back until it heals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random

from tests.simulation.agenda import Agenda, Trace
from tests.simulation.weather import Weather

EAGER_BYTES = 1 << 10
"""Envelopes up to this size leave at once; larger ones once they are delivered."""


@dataclass(slots=True, eq=False)
class _Envelope:
    source: int
    target: int
    payload: bytes
    due_s: float
    goodbye: bool = False
    lost: bool = False


class Network:
    """All links of one session. `arrived` is called with the rank whose inbox has something new."""

    def __init__(
        self, agenda: Agenda, trace: Trace, weather: Weather, dice: Random, arrived: Callable[[int], None]
    ) -> None:
        self._agenda, self._trace, self._weather, self._dice = agenda, trace, weather, dice
        self._arrived = arrived
        self._inboxes: dict[int, list[tuple[int, bytes]]] = {}
        self._goodbyes: dict[tuple[int, int], bytes] = {}
        self._under_way: dict[tuple[int, int], list[_Envelope]] = {}
        self._held: dict[tuple[int, int], list[_Envelope]] = {}
        self._cut: set[int] = set()
        self._dead: set[int] = set()
        self._told: set[int] = set()
        self._calm = False

    def endpoint(self, rank: int) -> SimulatedEndpoint:
        self._inboxes[rank] = []
        return SimulatedEndpoint(self, rank)

    # ------------------------------------------------------------ envelopes

    def post(self, source: int, target: int, payload: bytes, goodbye: bool = False) -> None:
        """`goodbye`: it is for nobody's inbox (`tests.simulation.parting`)."""
        if source in self._dead:
            return
        delay_s = self._dice.expovariate(1.0 / self._weather.latency_s)
        if not self._calm and self._dice.random() < self._weather.chance("message delayed"):
            delay_s += self._dice.uniform(0.0, self._weather.late_s)
            self._trace.fault(self._agenda.now_s, "message delayed", source, target, round(delay_s, 6))
        line = self._under_way.setdefault((source, target), [])
        due_s = self._agenda.now_s + delay_s
        if line:
            due_s = max(due_s, line[-1].due_s)
        envelope = _Envelope(source, target, payload, due_s, goodbye)
        self._send(line, envelope)
        if not self._calm and self._dice.random() < self._weather.chance("message duplicated"):
            self._trace.fault(self._agenda.now_s, "message duplicated", source, target)
            due_s += self._dice.uniform(0.0, self._weather.late_s)
            self._agenda.at(due_s, lambda: self._deliver(envelope))

    def _send(self, line: list[_Envelope], envelope: _Envelope) -> None:
        line.append(envelope)
        self._agenda.at(envelope.due_s, lambda: self._come(envelope))

    def _come(self, envelope: _Envelope) -> None:
        if envelope.lost:
            return
        pair = (envelope.source, envelope.target)
        if self._cut.intersection(pair) or pair in self._held:
            self._held.setdefault(pair, []).append(envelope)
            return
        self._under_way[pair].remove(envelope)
        self._deliver(envelope)

    def _deliver(self, envelope: _Envelope) -> None:
        if envelope.lost or envelope.target in self._dead or self._cut.intersection((envelope.source, envelope.target)):
            return  # of a duplicate: the first one still comes
        pair = (envelope.source, envelope.target)
        self._trace.note(self._agenda.now_s, "message", *pair)
        if envelope.goodbye:
            self._goodbyes[pair] = envelope.payload
        else:
            self._inboxes[envelope.target].append((envelope.source, envelope.payload))
        self._arrived(envelope.target)

    def take(self, rank: int) -> list[tuple[int, bytes]]:
        arrived, self._inboxes[rank] = self._inboxes[rank], []
        return [] if rank in self._dead else arrived

    def goodbye(self, source: int, target: int) -> bytes | None:
        """What has come of it."""
        return self._goodbyes.get((source, target))

    def unsent_bytes(self, rank: int) -> int:
        return sum(
            len(envelope.payload)
            for (source, _), line in self._under_way.items()
            if source == rank and rank not in self._dead
            for envelope in line
            if len(envelope.payload) > EAGER_BYTES and not envelope.lost
        )

    # ------------------------------------------------------------ what happens to links and ranks

    def die(self, rank: int) -> None:
        """The rank sends and receives nothing more; of what it had on its way the end may be lost."""
        self._dead.add(rank)
        for (source, target), line in self._under_way.items():
            if source == rank and line:
                for envelope in line[self._dice.randint(0, len(line)) :]:
                    envelope.lost = True
                    self._trace.fault(self._agenda.now_s, "message lost with its sender", source, target)

    def all_come_s(self, rank: int) -> float:
        """When the last of what the rank has under way comes."""
        due_s = [e.due_s for (source, _), line in self._under_way.items() if source == rank for e in line if not e.lost]
        return max(due_s, default=self._agenda.now_s)

    def tell_death(self, rank: int) -> None:
        """MPI tells of it: nothing that the rank sent comes after that."""
        self._told.add(rank)
        for (source, _), line in self._under_way.items():
            if source == rank:
                for envelope in line:
                    envelope.lost = True

    def told(self) -> Collection[int]:
        return self._told

    def cut(self, rank: int) -> None:
        """Nothing comes from or to the rank any more."""
        self._cut.add(rank)

    def heal(self, rank: int) -> None:
        """What was held back comes now, in order."""
        self._cut.discard(rank)
        for pair in [pair for pair in self._held if not self._cut.intersection(pair)]:
            for envelope in self._held.pop(pair):
                if not envelope.lost:
                    self._under_way[pair].remove(envelope)
                    self._deliver(envelope)

    def calm(self) -> None:
        """From here on every message comes once and in time."""
        self._calm = True
        for rank in sorted(self._cut):
            self.heal(rank)


class SimulatedEndpoint:
    """`scheduling.link.Endpoint` of one rank."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self._rank = network, rank
        self.posts = 0

    def post(self, address: int, payload: bytes) -> None:
        self.posts += 1
        self._network.post(self._rank, address, payload)

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self) -> list[tuple[int, bytes]]:
        return self._network.take(self._rank)

    def unsent_bytes(self) -> int:
        return self._network.unsent_bytes(self._rank)

    def lost(self) -> Collection[int]:
        return self._network.told()
