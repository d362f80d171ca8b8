"""Files sent down a chain of threads, with everything that can go wrong on the way."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import StagingError, StoppedError
from storage.relay import Relay, Relayed
from tests.storage.stage_fakes import FakeGroup, Ranks

PIECE = 64


class Memory:
    """A source and a sink. `fails_at`: the piece, counted from 0, with which it fails."""

    def __init__(self, files: list[bytes], fails_at: int | None = None) -> None:
        self.files = [bytearray(one) for one in files]
        self._left = fails_at
        self.bytes_read = 0

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise StagingError("planted")

    def read(self, file: int, place: int, into: memoryview) -> None:
        self._count()
        into[:] = self.files[file][place : place + len(into)]
        self.bytes_read += len(into)

    def write(self, file: int, place: int, data: memoryview) -> None:
        self._count()
        self.files[file][place : place + len(data)] = data


def play(
    files: list[bytes], size: int, *, source: Memory | None = None, sinks: dict[int, Memory] | None = None, **more: Any
) -> tuple[list[Any], dict[int, Memory], Memory, Ranks]:
    ranks = Ranks(size)
    source = source or Memory(files)
    sinks = sinks or {}
    for rank in range(size):
        sinks.setdefault(rank, Memory([bytes(len(one)) for one in files]))

    def body(group: FakeGroup) -> Relayed:
        relay = Relay(
            group.chain(range(size)), [len(one) for one in files], source=source if group.rank == 0 else None,
            sink=sinks[group.rank], chunk_bytes=PIECE, **more,
        )  # fmt: skip
        return relay.run()

    return ranks.run(body), sinks, source, ranks


def contents(count: int) -> bytes:
    return (hashlib.sha256(str(count).encode()).digest() * (count // 32 + 1))[:count]


@pytest.mark.slow
@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 40 * PIECE), min_size=1, max_size=3), size=st.integers(1, 5))
def test_everything_arrives_everywhere_and_is_read_and_sent_once(sizes: list[int], size: int) -> None:
    files = [contents(one) for one in sizes]
    came, sinks, source, ranks = play(files, size)
    for relayed in came:
        assert relayed.whole
        assert relayed.problem is None
        assert [one.hex for one in relayed.digests] == [hashlib.sha256(one).hexdigest() for one in files]
    assert all(sink.files == files for sink in sinks.values())
    assert source.bytes_read == sum(sizes)
    assert ranks.sent == {(rank, rank + 1): sum(sizes) for rank in range(size - 1)}


@pytest.mark.slow
@settings(max_examples=40)
@given(
    size=st.integers(1, 4), pieces=st.integers(1, 60), at=st.integers(0, 59), who=st.integers(0, 4), data=st.data()
)  # fmt: skip
def test_a_failure_anywhere_ends_all(size: int, pieces: int, at: int, who: int, data: st.DataObject) -> None:
    """Of reading (who = 0), or of writing on node who - 1."""
    files = [contents(pieces * PIECE - data.draw(st.integers(0, PIECE - 1)))]
    at, who = at % pieces, who % (size + 1)
    empty = [bytes(len(files[0]))]
    source = Memory(files, at) if who == 0 else None
    sinks = {who - 1: Memory(empty, at)} if who else {}
    came, _, _, _ = play(files, size, source=source, sinks=sinks)
    failed = max(0, who - 1)
    assert isinstance(came[failed].problem, StagingError)
    assert all(relayed.problem is None for rank, relayed in enumerate(came) if rank != failed)
    if who == 0:
        assert not any(relayed.whole for relayed in came)


@pytest.mark.slow
def test_a_failure_ends_the_reading_early() -> None:
    files = [contents(100_000 * PIECE)]
    sinks = {2: Memory([bytes(len(files[0]))], 3)}
    came, _, source, _ = play(files, 3, sinks=sinks)
    assert source.bytes_read < len(files[0]) / 2
    assert not any(relayed.whole for relayed in came)


@pytest.mark.slow
def test_the_first_can_be_stopped() -> None:
    asked = [0]

    def stopped() -> None:
        asked[0] += 1
        if asked[0] > 5:
            raise StoppedError("enough")

    came, _, _, _ = play([contents(100_000 * PIECE)], 3, stopped=stopped)
    assert isinstance(came[0].problem, StoppedError)
    assert not any(relayed.whole for relayed in came)


def test_one_that_cannot_begin_ends_all_at_once() -> None:
    ranks, files = Ranks(3), [contents(100_000 * PIECE)]
    source = Memory(files)

    def body(group: FakeGroup) -> Relayed:
        return Relay(
            group.chain(range(3)), [len(files[0])], source=source if group.rank == 0 else None, chunk_bytes=PIECE,
            problem=StagingError("no room") if group.rank == 1 else None,
        ).run()  # fmt: skip

    came = ranks.run(body)
    assert str(came[1].problem) == "no room"
    assert source.bytes_read < len(files[0]) / 2


@pytest.mark.parametrize("size", [1, 3])
def test_progress_counts_every_byte(size: int) -> None:
    seen: list[int] = []
    files = [contents(1000)]
    came, _, _, _ = play(files, size, progress=seen.append)
    assert sum(seen) == size * 1000  # each node counts
    assert all(relayed.bytes_passed == 1000 for relayed in came)
