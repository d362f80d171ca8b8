"""How messages travel: envelopes of many messages between endpoints, numbered per link.

An `Endpoint` moves opaque bytes between addresses (MPI ranks, loopback, a simulated network): it alone differs from
run to run. `Link` turns messages into envelopes and back for one peer: an envelope is msgpack of [protocol version,
number, messages], numbers rise by one per link and direction. So a duplicate is recognised and dropped, and a missing
envelope is an error instead of a request that silently never arrives. An envelope with nothing but a heartbeat has the
number 0 and is always the same bytes: it may be lost, or come twice. `Hub` is rank 0's set of links, `Spoke` a
worker's one. Both gather what they are given and send it on `flush`, so that everything of one turn shares an
envelope, or several where it is much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from scheduling.errors import ProtocolError
from scheduling.messages import PROTOCOL_VERSION, FromCoordinator, FromWorker, Heartbeat

ENVELOPE_BYTES_MAX = 1 << 30
"""Largest envelope sent or accepted. Input lines are bounded well below (coordinator.source)."""
ENVELOPE_BYTES_AIM = 64 << 20
"""Envelopes of several messages that would be larger are divided."""

S = TypeVar("S")
R = TypeVar("R")


class Endpoint(Protocol):
    """Where bytes leave and arrive. Never blocks. Keeps the order between two addresses."""

    def post(self, address: int, payload: bytes) -> None:
        """Send soon, at `flush` at the latest. The bytes must not change afterwards."""

    def flush(self) -> None:
        """Nothing more is posted in this turn."""

    def receive(self) -> Sequence[tuple[int, bytes | bytearray]]:
        """All that has arrived since the last call, as (address of the sender, payload)."""

    def unsent_bytes(self) -> int:
        """What was posted and has not left yet."""

    def lost(self) -> Collection[int]:
        """Addresses that are known to be gone for good: whatever they sent and has arrived came before this was said.
        Most carriers never know."""


class _FromWorkerEnvelope(msgspec.Struct, array_like=True, frozen=True):
    protocol: int
    number: int
    messages: list[FromWorker]


class _FromCoordinatorEnvelope(msgspec.Struct, array_like=True, frozen=True):
    protocol: int
    number: int
    messages: list[FromCoordinator]


_encode = msgspec.msgpack.Encoder().encode
HEARTBEAT = _encode((PROTOCOL_VERSION, 0, [Heartbeat()]))
"""The envelope with nothing but a heartbeat."""
_decode_from_worker = msgspec.msgpack.Decoder(_FromWorkerEnvelope)
_decode_from_coordinator = msgspec.msgpack.Decoder(_FromCoordinatorEnvelope)


class Link(Generic[S, R]):
    """One peer: sends messages of type S, receives those of type R."""

    __slots__ = ("address", "outbox", "_decoder", "_sent", "_received")

    def __init__(self, address: int, decoder: msgspec.msgpack.Decoder) -> None:  # type: ignore[type-arg]
        self.address = address
        self.outbox: list[S] = []
        self._decoder = decoder
        self._sent = 0
        self._received = 0

    def seal(self) -> list[bytes]:
        """All messages of the outbox as envelopes' bytes, one or a few; the outbox is empty afterwards.

        Raises:
            ProtocolError: a message alone is over the limit. Nothing of this outbox is to be sent.
        """
        messages, self.outbox = self.outbox, []
        if len(messages) == 1 and isinstance(messages[0], Heartbeat):
            return [HEARTBEAT]
        before = self._sent
        try:
            return list(self._sealed(messages))
        except ProtocolError:
            self._sent = before
            raise

    def _sealed(self, messages: list[S]) -> Iterator[bytes]:
        payload = _encode((PROTOCOL_VERSION, self._sent + 1, messages))
        if len(payload) > ENVELOPE_BYTES_AIM and len(messages) > 1:
            half = len(messages) // 2
            yield from self._sealed(messages[:half])
            yield from self._sealed(messages[half:])
            return
        if len(payload) > ENVELOPE_BYTES_MAX:
            raise ProtocolError(
                f"an envelope of {len(payload)} bytes for rank {self.address} is over the limit of {ENVELOPE_BYTES_MAX}"
            )
        self._sent += 1
        yield payload

    def open(self, payload: bytes | bytearray) -> list[R]:
        """The messages of an envelope; none if it has been here before.

        Raises:
            ProtocolError: it is not of this protocol, or one before it has gone missing.
        """
        try:
            envelope = self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            refuse_version(self.address, version_of(payload))
            raise ProtocolError(f"rank {self.address} sent {len(payload)} bytes that are no message: {error}") from None
        refuse_version(self.address, envelope.protocol)
        messages: list[R] = envelope.messages
        if envelope.number == 0:
            return messages
        if envelope.number <= self._received:
            return []
        if envelope.number != self._received + 1:
            raise ProtocolError(
                f"rank {self.address} sent envelope {envelope.number} after {self._received}: one has gone missing"
            )
        self._received = envelope.number
        return messages


def refuse_version(rank: int, protocol: int | None) -> None:
    """Raises ProtocolError if `rank` speaks another version than we do. None: it is not known which."""
    if protocol is not None and protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"rank {rank} speaks protocol {protocol}, this rank speaks {PROTOCOL_VERSION}: start all ranks "
            "with the same installation"
        )


def version_of(payload: bytes | bytearray) -> int | None:
    """What leads an envelope that cannot be read otherwise; None if nothing can."""
    try:
        first = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])[:1]
        return msgspec.msgpack.decode(first[0], type=int) if first else None
    except msgspec.MsgspecError:
        return None


class Hub:
    """Rank 0's side of all links."""

    def __init__(self, endpoint: Endpoint, workers: list[int]) -> None:
        self.endpoint = endpoint
        self._links: dict[int, Link[FromCoordinator, FromWorker]] = {
            worker: Link(worker, _decode_from_worker) for worker in workers
        }
        self._waiting: dict[int, None] = {}
        self.lost: set[int] = set()
        """Workers that are gone for good, as far as `take_lost` has told. Nothing is sent to them."""

    @property
    def workers(self) -> list[int]:
        return list(self._links)

    def add(self, worker: int) -> None:
        """One more worker, at this address."""
        self._links[worker] = Link(worker, _decode_from_worker)

    def send(self, worker: int, message: FromCoordinator) -> None:
        if worker not in self.lost:
            self._links[worker].outbox.append(message)
            self._waiting[worker] = None

    def broadcast(self, message: FromCoordinator) -> None:
        for worker in self._links:
            self.send(worker, message)

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for worker in waiting:
            if worker not in self.lost:
                for payload in self._links[worker].seal():
                    self.endpoint.post(worker, payload)
        self.endpoint.flush()

    def take_lost(self) -> list[int]:
        """Workers that the endpoint has found gone since the last call. To be asked after `poll`: what they said before
        that has been taken then."""
        fresh = [worker for worker in self.endpoint.lost() if worker in self._links and worker not in self.lost]
        self.lost.update(fresh)
        return fresh

    def poll(self) -> list[tuple[int, FromWorker]]:
        """Everything that has arrived, as (worker, message), in the order of each worker."""
        arrived: list[tuple[int, FromWorker]] = []
        for address, payload in self.endpoint.receive():
            link = self._links.get(address)
            if link is None:
                raise ProtocolError(f"rank {address} is no worker of this job")
            if address in self.lost:
                continue  # it comes from somebody who passes it on, and speaks of a past
            arrived.extend((address, message) for message in link.open(payload))
        return arrived


class Spoke:
    """A worker's side of its link to rank 0."""

    def __init__(self, endpoint: Endpoint, coordinator: int = 0) -> None:
        self.endpoint = endpoint
        self._link: Link[FromWorker, FromCoordinator] = Link(coordinator, _decode_from_coordinator)

    def send(self, message: FromWorker) -> None:
        self._link.outbox.append(message)

    def flush(self) -> bool:
        """Send what has been gathered. True if there was anything."""
        some = bool(self._link.outbox)
        if some:
            for payload in self._link.seal():
                self.endpoint.post(self._link.address, payload)
        self.endpoint.flush()
        return some

    @property
    def rank0_lost(self) -> bool:
        """Whether rank 0 is known to be gone for good."""
        return self._link.address in self.endpoint.lost()

    def poll(self) -> list[FromCoordinator]:
        return [
            message
            for address, payload in self.endpoint.receive()
            if address == self._link.address
            for message in self._link.open(payload)
        ]
