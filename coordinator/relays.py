"""Leaders between rank 0 and the ranks of a host: many envelopes in few messages.

Where many ranks are started those of a host form groups, and the first of each is its leader (`leaders_of`). Each hop
carries bundles: a leader puts what its group says into one for rank 0, and takes apart what rank 0 says. It opens no
envelope. `Trunk` is rank 0's end and `Branch` a worker's; both are endpoints, so that links and all above them know
nothing of leaders.

Each end of a way, between rank 0 and one worker, numbers the envelopes that it sends, and keeps them until the other
end has said how far it has received. A worker whose leader is gone or silent goes alone: it speaks to rank 0 itself
from then on, and both send again what may not have arrived. What comes twice is recognised by its number.

Heartbeats have no number (`scheduling.link.HEARTBEAT`). A leader notes whose it has heard, and its next bundle names
them: it vouches for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from scheduling.errors import ProtocolError
from scheduling.link import ENVELOPE_BYTES_AIM, HEARTBEAT, Endpoint, refuse_version, version_of
from scheduling.messages import PROTOCOL_VERSION

BEAT_S = 2.0
"""How long a leader may keep heartbeats, and how often it says to its members that it is here; a fifth of a lease if
that is less."""
HOLD_S = 0.01
"""How long a leader may keep envelopes for rank 0, to send more of them together."""
LEADER_SILENT_S = 10.0
"""A worker whose leader has said nothing for so long, or for half a lease if that is less, speaks to rank 0 itself."""
FIRST_WORD_S = 30.0
"""The same until it has said anything: it may still be starting."""
LIVELY_S = 0.25
"""How long a leader that has carried something sleeps as if it had work of its own."""


def leaders_of(hosts: Iterable[Collection[int]], fanout: int) -> dict[int, int]:
    """The leader of each worker, from the workers of each host: these form groups of at most `fanout`, as even as can
    be, and the first of each group is its leader. Leaders lead themselves."""
    leaders: dict[int, int] = {}
    for workers in hosts:
        ranked = sorted(workers)
        groups = -(-len(ranked) // fanout)
        for number in range(groups):
            group = ranked[number * len(ranked) // groups : (number + 1) * len(ranked) // groups]
            leaders.update(dict.fromkeys(group, group[0]))
    return leaders


class Parcel(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An envelope between rank 0 and `worker`. `received`: the number up to which the sender has received."""

    worker: int
    number: int
    received: int
    payload: bytes


class Bundle(msgspec.Struct, array_like=True, frozen=True):
    """What one rank sends to another at once. `heard`: for each heartbeat two numbers, the worker between whom and
    rank 0 it goes, and how far its sender has received."""

    protocol: int
    parcels: list[Parcel] = []
    heard: list[int] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Bundle).decode


def read_bundle(source: int, payload: bytes | bytearray) -> Bundle:
    """Raises ProtocolError, with the name of the rank that sent it, for what is none."""
    try:
        bundle = _decode(payload)
    except msgspec.MsgspecError as error:
        refuse_version(source, version_of(payload))
        raise ProtocolError(f"rank {source} sent {len(payload)} bytes that are no bundle: {error}") from None
    refuse_version(source, bundle.protocol)
    if len(bundle.heard) % 2:
        raise ProtocolError(f"rank {source} sent a bundle with half a heartbeat")
    return bundle


class Way:
    """One end of what goes between rank 0 and a worker, in both directions."""

    __slots__ = ("_worker", "_sent", "_kept", "received")

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._sent = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self.received = 0

    def pack(self, payload: bytes) -> Parcel:
        """Number it, and keep it until the other end has received it."""
        self._sent += 1
        self._kept.append((self._sent, payload))
        return Parcel(self._worker, self._sent, self.received, payload)

    def again(self) -> list[Parcel]:
        """All that the other end may not have received."""
        return [Parcel(self._worker, number, self.received, payload) for number, payload in self._kept]

    def settle(self, received: int) -> None:
        """The other end has received so far."""
        while self._kept and self._kept[0][0] <= received:
            self._kept.popleft()

    def take(self, parcel: Parcel) -> bool:
        """Whether it is a new one.

        Raises:
            ProtocolError: one before it has gone missing.
        """
        self.settle(parcel.received)
        if parcel.number <= self.received:
            return False
        if parcel.number != self.received + 1:
            raise ProtocolError(
                f"of worker {self._worker}, envelope {parcel.number} came after {self.received}: one has gone missing"
            )
        self.received = parcel.number
        return True


class _Load:
    """What waits to be sent to one rank."""

    __slots__ = ("parcels", "heard")

    def __init__(self) -> None:
        self.parcels: list[Parcel] = []
        self.heard: dict[int, int] = {}

    def bundles(self) -> list[bytes]:
        """All of it, in one bundle or a few; nothing is left."""
        parcels, heard = self.parcels, [number for pair in self.heard.items() for number in pair]
        self.parcels, self.heard = [], {}
        payloads: list[bytes] = []
        start = size = 0
        for place, parcel in enumerate(parcels):
            size += len(parcel.payload)
            if size > ENVELOPE_BYTES_AIM and place > start:
                payloads.append(_encode(Bundle(PROTOCOL_VERSION, parcels[start:place])))
                start, size = place, len(parcel.payload)
        payloads.append(_encode(Bundle(PROTOCOL_VERSION, parcels[start:], heard)))
        return payloads


class Trunk:
    """Rank 0's endpoint where there are leaders: `leaders` says whose is whose (see `leaders_of`)."""

    def __init__(self, base: Endpoint, leaders: Mapping[int, int]) -> None:
        self._base = base
        self._leaders = leaders
        self._next = dict(leaders)
        """To whom is sent what is for a worker: its leader, or itself."""
        self._ways = {worker: Way(worker) for worker in leaders}
        self._loads: dict[int, _Load] = {}

    def post(self, address: int, payload: bytes) -> None:
        way, load = self._ways[address], self._load(self._next[address])
        if payload == HEARTBEAT:
            load.heard[address] = way.received
        else:
            load.parcels.append(way.pack(payload))

    def flush(self) -> None:
        loads, self._loads = self._loads, {}
        for address, load in loads.items():
            for payload in load.bundles():
                self._base.post(address, payload)
        self._base.flush()

    def receive(self) -> Sequence[tuple[int, bytes]]:
        arrived: list[tuple[int, bytes]] = []
        for source, payload in self._base.receive():
            bundle = read_bundle(source, payload)
            for parcel in bundle.parcels:
                if self._way(source, parcel.worker).take(parcel):
                    arrived.append((parcel.worker, parcel.payload))
            for worker, received in zip(bundle.heard[::2], bundle.heard[1::2], strict=True):
                self._way(source, worker).settle(received)
                arrived.append((worker, HEARTBEAT))
            if self._next.get(source) != source:  # what has a leader has spoken for itself
                self._go_around({source})
        if gone := set(self._base.lost()).intersection(self._next.values()):
            self._go_around({worker for worker, leader in self._next.items() if leader in gone})
        if self._loads:
            self.flush()  # only what goes another way now: all else has been flushed
        return arrived

    def go_direct(self) -> None:
        """Send what follows to every worker itself, and again what it may not have received: the last words, which
        no leader may take with it."""
        self._go_around(list(self._next))

    def unsent_bytes(self) -> int:
        return self._base.unsent_bytes()

    def lost(self) -> Collection[int]:
        return self._base.lost()

    def _way(self, source: int, worker: int) -> Way:
        if worker != source and self._leaders.get(worker) != source:
            raise ProtocolError(f"rank {source} speaks for rank {worker}, which is not of its group")
        way = self._ways.get(worker)
        if way is None:
            raise ProtocolError(f"rank {worker} is no worker of this job")
        return way

    def _go_around(self, workers: Iterable[int]) -> None:
        """Have no leader between us and these any more."""
        for worker in workers:
            leader = self._next[worker]
            if leader == worker:
                continue
            if (waiting := self._loads.get(leader)) is not None:
                waiting.parcels = [parcel for parcel in waiting.parcels if parcel.worker != worker]
                waiting.heard.pop(worker, None)
            self._next[worker] = worker
            load, way = self._load(worker), self._ways[worker]
            load.parcels, load.heard[worker] = way.again(), way.received

    def _load(self, address: int) -> _Load:
        return self._loads.setdefault(address, _Load())


class Branch:
    """The endpoint of worker `rank` where there are leaders, whether it is one or has one.

    `patience_s`: how long its leader may say nothing.
    """

    def __init__(
        self, base: Endpoint, rank: int, leaders: Mapping[int, int], clock: Callable[[], float], lease_s: float
    ) -> None:
        self._base = base
        self._rank = rank
        self._clock = clock
        self._way = Way(rank)
        self._leader = leaders[rank] if leaders[rank] != rank else None
        self._members = {worker for worker, leader in leaders.items() if leader == rank and worker != rank}
        self._patience_s = min(LEADER_SILENT_S, lease_s / 2)
        self._beat_s = min(BEAT_S, lease_s / 5)
        now = clock()
        self._leader_heard = now - self._patience_s + FIRST_WORD_S
        self._up = _Load()
        """For rank 0, or for the leader."""
        self._down: dict[int, _Load] = {}
        self._up_at = now
        """When the first envelope came that is in `_up`."""
        self._sent_up = now
        self._beat_at = now
        self._carried_at = now - LIVELY_S
        self._carried = False

    def post(self, address: int, payload: bytes) -> None:
        """Raises ProtocolError: workers speak to rank 0 alone."""
        if address != 0:
            raise ProtocolError(f"rank {self._rank} was to speak to rank {address}, not to rank 0")
        if payload == HEARTBEAT:
            self._up.heard[self._rank] = self._way.received
        else:
            self._gather([self._way.pack(payload)], self._clock())

    def flush(self) -> None:
        self._send(self._clock())

    def receive(self) -> Sequence[tuple[int, bytes]]:
        arrived: list[tuple[int, bytes]] = []
        now = self._clock()
        for source, payload in self._base.receive():
            bundle = read_bundle(source, payload)
            if source in self._members:
                self._carry_up(bundle, now)
                continue
            if source == self._leader:
                self._leader_heard = now
            self._hear(bundle, now, arrived)
        if self._leader is not None:
            silent = now - self._leader_heard > self._patience_s
            if silent or self._leader in self._base.lost():
                self._go_alone(now)
        self._send(now)
        return arrived

    def unsent_bytes(self) -> int:
        return self._base.unsent_bytes()

    def lost(self) -> Collection[int]:
        return self._base.lost()

    @property
    def alone(self) -> bool:
        """Whether nobody is between this worker and rank 0."""
        return self._leader is None

    def took_part(self) -> bool:
        """Whether anything was carried for others since this was last asked."""
        carried, self._carried = self._carried, False
        return carried

    @property
    def lively(self) -> bool:
        """Whether others may be waiting for this one to carry something."""
        return bool(self._up.parcels) or self._clock() - self._carried_at < LIVELY_S

    # ------------------------------------------------------------ what comes

    def _hear(self, bundle: Bundle, now: float, arrived: list[tuple[int, bytes]]) -> None:
        """From rank 0, by whatever way."""
        for parcel in bundle.parcels:
            if parcel.worker == self._rank:
                if self._way.take(parcel):
                    arrived.append((0, parcel.payload))
            elif parcel.worker in self._members:
                self._load(parcel.worker).parcels.append(parcel)
                self._carry(now)
        for worker, received in zip(bundle.heard[::2], bundle.heard[1::2], strict=True):
            if worker == self._rank:
                self._way.settle(received)
                arrived.append((0, HEARTBEAT))
            elif worker in self._members:
                self._load(worker).heard[worker] = received

    def _load(self, member: int) -> _Load:
        return self._down.setdefault(member, _Load())

    def _carry_up(self, bundle: Bundle, now: float) -> None:
        self._up.heard.update(zip(bundle.heard[::2], bundle.heard[1::2], strict=True))
        if bundle.parcels:
            self._gather(bundle.parcels, now)
            self._carry(now)

    def _carry(self, now: float) -> None:
        self._carried, self._carried_at = True, now

    def _gather(self, parcels: list[Parcel], now: float) -> None:
        if not self._up.parcels:
            self._up_at = now
        self._up.parcels.extend(parcels)

    def _go_alone(self, now: float) -> None:
        """Speak to rank 0 directly. It hears so how far we have received, and sends the rest again."""
        self._leader = None
        self._up.parcels = []
        self._gather(self._way.again(), now)
        self._up.heard[self._rank] = self._way.received

    # ------------------------------------------------------------ what goes

    def _send(self, now: float) -> None:
        if self._members and now - self._beat_at >= self._beat_s:
            self._beat_at = now
            for member in self._members:
                self._load(member)  # an empty bundle says that we are here
        down, self._down = self._down, {}
        for member, load in down.items():
            self._post(member, load)
        if self._up_is_due(now):
            self._sent_up = now
            self._post(0 if self._leader is None else self._leader, self._up)
        self._base.flush()

    def _up_is_due(self, now: float) -> bool:
        if not self._members:
            return bool(self._up.parcels or self._up.heard)
        if self._up.parcels:
            return now - self._up_at >= HOLD_S
        return bool(self._up.heard) and now - self._sent_up >= self._beat_s

    def _post(self, address: int, load: _Load) -> None:
        for payload in load.bundles():
            self._base.post(address, payload)
