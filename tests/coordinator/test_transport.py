"""Endpoints without MPI, and how long a loop sleeps."""

from __future__ import annotations

import itertools

import pytest

from coordinator.transport import Backoff, Loopback, Routed
from scheduling import messages as m
from scheduling.link import Endpoint, Hub, Spoke
from tests.coordinator.fakes import FakeEndpoint


def test_loopback_carries_both_ways_in_order() -> None:
    loopback = Loopback(0, 3)
    loopback.near.post(3, b"a")
    loopback.near.post(3, b"b")
    loopback.far.post(0, b"c")
    assert loopback.far.receive() == [(0, b"a"), (0, b"b")]
    assert loopback.far.receive() == []
    assert loopback.near.receive() == [(3, b"c")]
    assert loopback.near.unsent_bytes() == loopback.far.unsent_bytes() == 0


def test_hub_and_spoke_speak_over_loopback() -> None:
    loopback = Loopback(0, 0)
    hub, spoke = Hub(loopback.near, [0]), Spoke(loopback.far)
    hub.send(0, m.Exhausted(True))
    hub.flush()
    assert spoke.poll() == [m.Exhausted(True)]
    spoke.send(m.Heartbeat())
    spoke.flush()
    assert hub.poll() == [(0, m.Heartbeat())]


def test_routed_posts_where_the_route_leads_and_the_rest_to_the_default() -> None:
    hosted, world = FakeEndpoint(), FakeEndpoint()
    routed = Routed({0: hosted}, world)
    routed.post(0, b"here")
    routed.post(5, b"there")
    assert hosted.take() == [(0, b"here")]
    assert world.take() == [(5, b"there")]
    hosted.inbox, world.inbox = [(0, b"x")], [(5, b"y"), (6, b"z")]
    assert routed.receive() == [(0, b"x"), (5, b"y"), (6, b"z")]
    assert routed.receive() == []


def test_routed_receives_from_an_endpoint_added_later() -> None:
    routes: dict[int, Endpoint] = {}
    routed = Routed(routes, FakeEndpoint())
    late = FakeEndpoint()
    routes[2] = late
    routed.add(late)
    routed.post(2, b"to it")
    late.inbox = [(2, b"from it")]
    assert late.take() == [(2, b"to it")]
    assert routed.receive() == [(2, b"from it")]


def test_routed_without_a_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="rank 4"):
        Routed({}).post(4, b"")


class Clogged(FakeEndpoint):
    def __init__(self, unsent: int) -> None:
        super().__init__()
        self._unsent = unsent

    def unsent_bytes(self) -> int:
        return self._unsent


def test_routed_counts_what_is_unsent_everywhere() -> None:
    assert Routed({0: Clogged(3)}, Clogged(4)).unsent_bytes() == 7


@pytest.mark.parametrize(("in_flight", "soon_s"), [(True, Backoff.BUSY_S), (False, Backoff.IDLE_S)])
def test_backoff_doubles_at_first(in_flight: bool, soon_s: float) -> None:
    backoff = Backoff()
    delays = [backoff.next_s(in_flight) for _ in range(10)]
    assert delays[0] == Backoff.FIRST_S
    for before, after in itertools.pairwise(delays):
        assert after == pytest.approx(min(2 * before, soon_s))
    assert delays[-1] == soon_s


@pytest.mark.parametrize(("in_flight", "ceiling_s"), [(True, Backoff.BUSY_MAX_S), (False, Backoff.IDLE_MAX_S)])
def test_then_it_sleeps_a_share_of_the_time_that_nothing_has_happened(in_flight: bool, ceiling_s: float) -> None:
    backoff, idle_s = Backoff(), 0.0
    soon_s = Backoff.BUSY_S if in_flight else Backoff.IDLE_S
    while (delay := backoff.next_s(in_flight)) < ceiling_s:
        assert delay <= max(soon_s, idle_s / 19)
        idle_s += delay
    assert idle_s == pytest.approx(20 * ceiling_s, rel=0.1)
    assert {backoff.next_s(in_flight) for _ in range(100)} == {ceiling_s}


def test_backoff_starts_anew_after_something_happened() -> None:
    backoff = Backoff()
    for _ in range(500):
        backoff.next_s(False)
    backoff.reset()
    assert [backoff.next_s(False) for _ in range(2)] == [Backoff.FIRST_S, 2 * Backoff.FIRST_S]


def test_work_in_flight_shortens_a_long_sleep_at_once() -> None:
    backoff = Backoff()
    for _ in range(500):
        backoff.next_s(False)
    assert backoff.next_s(True) == Backoff.BUSY_MAX_S < Backoff.IDLE_MAX_S


def test_a_rank_that_has_been_idle_for_long_looks_about_four_times_a_second() -> None:
    backoff, idle_s, looks = Backoff(), 0.0, 0
    while idle_s < 60.0:
        idle_s += backoff.next_s(False)
        looks += 1
    assert looks < 60 * 4 + 150
