"""Rank 0 and its ranks over endpoints in memory, each rank in a thread: questions, answers, silence and damage."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from coordinator.doctor import exchange
from coordinator.doctor.exchange import Clocks, Rank0, answer, measure_together
from coordinator.doctor.facts import Facts
from scheduling.errors import RankLostError
from scheduling.messages import Host


class Wire:
    """Endpoints of ranks by number; `change` alters what is sent, `dead` never answer."""

    def __init__(self, size: int) -> None:
        self.boxes: list[queue.SimpleQueue[tuple[int, bytes]]] = [queue.SimpleQueue() for _ in range(size)]
        self.change: Callable[[int, bytes], bytes] = lambda source, payload: payload

    def endpoint(self, rank: int) -> End:
        return End(self, rank)


class End:
    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank
        self.gone: set[int] = set()

    def post(self, address: int, payload: bytes) -> None:
        self.wire.boxes[address].put((self.rank, self.wire.change(self.rank, payload)))

    def flush(self) -> None: ...

    def receive(self) -> list[tuple[int, bytes]]:
        box = self.wire.boxes[self.rank]
        return [box.get_nowait()] if not box.empty() else []

    def unsent_bytes(self) -> int:
        return 0

    def lost(self) -> set[int]:
        return self.gone


class Summing:
    """Collectives of a job of one whose sums are multiplied: by 1 they are right."""

    size = 3

    def __init__(self, factor: float = 3.0) -> None:
        self.factor = factor
        self.calls: list[str] = []

    def barrier(self) -> None:
        self.calls.append("barrier")

    def sum_everywhere(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        self.calls.append(f"sum {values.size}")
        return values * self.factor


def facts(rank: int) -> Facts:
    return Facts(rank=rank, pid=100 + rank, host=Host(hostname=f"n{rank}"))


@contextmanager
def answering(wire: Wire, *ranks: int, ahead_s: float = 0.0) -> Iterator[list[Summing]]:
    """Ranks that serve until they are dismissed, their clocks ahead by so much."""
    entered: list[Summing] = []

    def collectives() -> Summing:
        entered.append(Summing())
        return entered[-1]

    clocks = Clocks(wall=lambda: time.time() + ahead_s)
    threads = [
        threading.Thread(target=answer, args=(wire.endpoint(rank), facts(rank), collectives, clocks), daemon=True)
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    yield entered
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def ticking(step_s: float = 0.25) -> Clocks:
    """A clock that goes on with every look at it: who waits for silence waits no real time."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += step_s
        return now[0]

    return Clocks(monotonic=monotonic, pause=lambda _: None)


def test_facts_links_and_collectives_of_all() -> None:
    wire = Wire(3)
    rank0 = Rank0(wire.endpoint(0))
    with answering(wire, 1, 2, ahead_s=50.0) as entered:
        heard = rank0.hear([1, 2], 30.0)
        assert heard == {1: facts(1), 2: facts(2)}
        links = rank0.measure_links([(1, "n1", True), (2, "n2", False)], quick=False)
        together = rank0.together([1, 2], Summing(), quick=False)
        rank0.dismiss([1, 2])
    assert [(link.rank, link.host, link.same_host, link.damaged, link.problem) for link in links] == [
        (1, "n1", True, False, ""), (2, "n2", False, False, "")
    ]  # fmt: skip
    for link in links:
        assert link.latency_s is not None
        assert link.latency_s > 0
        assert link.bytes_per_s is not None
        assert link.payload_bytes >= exchange.TRIAL_BYTES
        assert link.clock_offset_s == pytest.approx(50.0, abs=1.0)
    assert not together.wrong
    assert together.large_s is not None
    assert [one.calls for one in entered] == [entered[0].calls] * 2


def test_who_says_nothing_is_left_out_in_time() -> None:
    wire = Wire(3)
    rank0 = Rank0(wire.endpoint(0), ticking())
    wire.endpoint(1).post(0, exchange._encode(facts(1)))
    assert set(rank0.hear([1, 2], 5.0)) == {1}


def test_who_stops_between_its_facts_and_a_round_trip_is_a_problem() -> None:
    [link] = Rank0(Wire(2).endpoint(0), ticking()).measure_links([(1, "n1", False)], quick=False)
    assert link.problem == "rank 1 did not answer within 10 s"


def test_all_links_together_have_an_end() -> None:
    peers = [(rank, f"n{rank}", False) for rank in range(1, 12)]
    links = Rank0(Wire(12).endpoint(0), ticking()).measure_links(peers, quick=True)
    assert links[0].problem.startswith("rank 1 did not answer")
    assert links[-1].problem.startswith("not measured")


def test_a_payload_that_is_changed_on_its_way_is_seen() -> None:
    wire = Wire(2)

    def flip(source: int, payload: bytes) -> bytes:
        if source == 0 and len(payload) > exchange.TRIAL_BYTES:
            return payload[:-100] + bytes([payload[-100] ^ 1]) + payload[-99:]
        return payload

    wire.change = flip
    rank0 = Rank0(wire.endpoint(0))
    with answering(wire, 1):
        [link] = rank0.measure_links([(1, "n1", False)], quick=True)
        rank0.dismiss([1])
    assert link.damaged


def test_a_slow_link_gets_small_payloads() -> None:
    sizes: list[int] = []

    class Slow(Rank0):
        def _round_trip(self, rank: int, payload: bytes, deadline: float) -> Any:
            now[0] += 1e-3 + 2 * len(payload) / 1e5  # 100 kB/s
            if len(payload) > 8:
                sizes.append(len(payload))
            return exchange.Pong(1, payload, exchange._digest(payload), 0.0)

    now = [0.0]
    rank0 = Slow(Wire(2).endpoint(0), Clocks(monotonic=lambda: now[0], wall=lambda: now[0]))
    [link] = rank0.measure_links([(1, "n1", False)], quick=False)
    assert max(sizes) == exchange.TRIAL_BYTES
    assert now[0] < 10
    assert link.bytes_per_s == pytest.approx(1e5, rel=0.1)


def test_a_wrong_sum_is_seen() -> None:
    assert not measure_together(Summing(3.0), 800, Clocks()).wrong
    assert measure_together(Summing(3.1), 800, Clocks()).wrong


def test_a_collective_that_does_not_end_is_a_problem() -> None:
    class Stuck(Summing):
        def barrier(self) -> None:
            raise RankLostError("a collective did not end within 20 s")

    assert "20 s" in Rank0(Wire(2).endpoint(0)).together([1], Stuck(), quick=True).problem


def test_a_rank_without_a_rank_0_leaves() -> None:
    with pytest.raises(RankLostError, match="rank 0 has said nothing"):
        answer(Wire(2).endpoint(1), facts(1), Summing, ticking(10.0))
