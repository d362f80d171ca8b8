"""The endpoint over a fake MPI: what is matched, what waits, what a death costs, what is refused."""

# ruff: noqa: N802 - the names are MPI's

from __future__ import annotations

import builtins
from collections import deque
from typing import Any

import pytest

from coordinator.mpi_endpoint import MpiEndpoint
from scheduling.errors import ProtocolError, RankLostError
from scheduling.link import ENVELOPE_BYTES_MAX

FAILED, PENDING, OTHER = 75, 76, 16


class FakeRequest:
    """Done when a test says so, or fails."""

    def __init__(self, done: bool = True) -> None:
        self.done = done
        self.error: FakeMPI.Exception | None = None

    def Test(self) -> bool:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.done


class FakeGroup:
    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def Get_size(self) -> int:
        return len(self.ranks)


class FakeMessage:
    def __init__(self, source: int, payload: bytes, size: int | None, done: bool) -> None:
        self.source, self.payload = source, payload
        self.size = len(payload) if size is None else size
        self.request = FakeRequest(done)
        self.received = False

    def Irecv(self, into: list[Any]) -> FakeRequest:
        buffer, size, _ = into
        assert size == len(buffer) == len(self.payload)
        buffer[:] = self.payload
        self.received = True
        return self.request


class FakeMPI:
    """As much of the module mpi4py.MPI, and of one communicator, as the endpoint uses."""

    BYTE, ANY_SOURCE = "byte", -1
    ERR_PROC_FAILED, ERR_PROC_FAILED_PENDING = FAILED, PENDING

    class Exception(builtins.Exception):
        def __init__(self, error_class: int) -> None:
            super().__init__(f"MPI error {error_class}")
            self.error_class = error_class

        def Get_error_class(self) -> int:
            return self.error_class

    class Status:
        message: FakeMessage

        def Get_source(self) -> int:
            return self.message.source

        def Get_elements(self, kind: str) -> int:
            return self.message.size

    class Group:
        @staticmethod
        def Translate_ranks(group: FakeGroup, places: list[int], others: FakeGroup) -> list[int]:
            return [group.ranks[place] for place in places]

    def __init__(self) -> None:
        self.waiting: deque[FakeMessage] = deque()
        self.dead: list[int] = []
        self.acknowledged = 0
        self.sent: list[tuple[int, bytes, FakeRequest]] = []
        self.sends_end = True
        self.broken: FakeMPI.Exception | None = None

    def arrive(self, source: int, payload: bytes, *, size: int | None = None, done: bool = True) -> FakeMessage:
        self.waiting.append(FakeMessage(source, payload, size, done))
        return self.waiting[-1]

    def Improbe(self, source: int, tag: int, status: FakeMPI.Status) -> FakeMessage | None:
        if self.broken is not None:
            raise self.broken
        if self.acknowledged < len(self.dead):
            raise FakeMPI.Exception(PENDING)
        if not self.waiting:
            return None
        status.message = self.waiting.popleft()
        return status.message

    def Isend(self, what: list[Any], dest: int, tag: int) -> FakeRequest:
        if dest in self.dead and self.acknowledged < len(self.dead):
            raise FakeMPI.Exception(FAILED)
        request = FakeRequest(self.sends_end)
        self.sent.append((dest, bytes(what[0]), request))
        return request

    def Get_failed(self) -> FakeGroup:
        return FakeGroup(self.dead)

    def Ack_failed(self, count: int) -> int:
        self.acknowledged = count
        return count

    def Get_group(self) -> FakeGroup:
        return FakeGroup(list(range(9)))


@pytest.fixture
def mpi() -> FakeMPI:
    return FakeMPI()


@pytest.fixture
def endpoint(mpi: FakeMPI) -> MpiEndpoint:
    return MpiEndpoint(mpi, mpi)


def test_what_has_come_is_received_in_each_ranks_order(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    for source, payload in ((1, b"a"), (2, b"x"), (1, b""), (1, b"b")):
        mpi.arrive(source, payload)
    received = [(source, bytes(payload)) for source, payload in endpoint.receive()]
    assert received == [(1, b"a"), (1, b""), (1, b"b"), (2, b"x")]
    assert endpoint.receive() == []


def test_a_large_message_that_stops_half_way_holds_nobody_else_up(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    large = mpi.arrive(1, b"large", done=False)
    mpi.arrive(1, b"small")
    mpi.arrive(2, b"other")
    assert endpoint.receive() == [(2, b"other")]
    large.request.done = True
    assert endpoint.receive() == [(1, b"large"), (1, b"small")]


@pytest.mark.parametrize("size", [ENVELOPE_BYTES_MAX + 1, 3 << 30, -32766])
def test_an_envelope_over_the_limit_is_refused_before_there_is_a_buffer(
    mpi: FakeMPI, endpoint: MpiEndpoint, size: int
) -> None:
    message = mpi.arrive(3, b"", size=size)
    with pytest.raises(ProtocolError, match=r"rank 3 sent an envelope of .*: the limit is 1073741824"):
        endpoint.receive()
    assert not message.received


def test_the_death_of_a_rank_is_taken_note_of_and_the_others_go_on(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    mpi.arrive(2, b"its last words")
    mpi.arrive(1, b"alive")
    mpi.dead = [2]
    assert endpoint.receive() == [(2, b"its last words"), (1, b"alive")]
    assert endpoint.lost() == {2}
    endpoint.post(2, b"in vain")
    endpoint.post(1, b"go on")
    assert [(dest, payload) for dest, payload, _ in mpi.sent] == [(1, b"go on")]
    mpi.dead = [2, 4]
    assert endpoint.receive() == []
    assert endpoint.lost() == {2, 4}


def test_what_a_dead_rank_had_begun_to_send_is_forgotten(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    half = mpi.arrive(2, b"half", done=False)
    assert endpoint.receive() == []
    mpi.dead, half.request.error = [2], FakeMPI.Exception(FAILED)
    assert endpoint.receive() == []
    assert endpoint.receive() == []
    assert endpoint.lost() == {2}


def test_what_was_on_its_way_to_a_dead_rank_is_waited_for_no_more(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    mpi.sends_end = False
    endpoint.post(2, b"four")
    endpoint.post(1, b"seven..")
    assert endpoint.unsent_bytes() == 11
    mpi.dead, mpi.sent[0][2].error = [2], FakeMPI.Exception(FAILED)
    assert endpoint.unsent_bytes() == 7
    assert endpoint.lost() == {2}


def test_a_send_that_finds_its_rank_dead_is_no_error(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    mpi.dead = [2]
    endpoint.post(2, b"x")
    assert endpoint.lost() == {2}


def test_a_rank_that_takes_nothing_keeps_its_own_messages_alone(mpi: FakeMPI, endpoint: MpiEndpoint) -> None:
    mpi.sends_end = False
    endpoint.post(1, b"to one that is stopped")
    mpi.sends_end = True
    for _ in range(3):
        endpoint.post(2, b"to one that listens")
    assert endpoint.unsent_bytes() == len(b"to one that is stopped")


@pytest.mark.parametrize("error_class", [OTHER, FAILED])
def test_another_error_or_a_death_of_nobody_ends_the_rank(
    mpi: FakeMPI, endpoint: MpiEndpoint, error_class: int
) -> None:
    mpi.broken = FakeMPI.Exception(error_class)
    with pytest.raises(RankLostError, match="receiving failed: MPI error"):
        endpoint.receive()
