"""Envelopes: numbered, in order, never twice, never silently missing."""

from __future__ import annotations

import msgspec
import pytest

from scheduling import link as link_module
from scheduling import messages as m
from scheduling.errors import ProtocolError
from scheduling.link import Hub, Spoke
from tests.coordinator.fakes import FakeEndpoint, FakeTransport


def connected() -> tuple[FakeTransport, Hub, Spoke, Spoke]:
    network = FakeTransport(0, 1, 2)
    return network, Hub(network[0], [1, 2]), Spoke(network[1]), Spoke(network[2])


def test_messages_of_one_turn_share_an_envelope_and_keep_their_order() -> None:
    network, hub, spoke, _ = connected()
    sent: list[m.FromCoordinator] = [m.Recall(1, [3]), m.Exhausted(True), m.Cancel([4])]
    for message in sent:
        hub.send(1, message)
    network[0].assert_empty()
    hub.flush()
    assert len(network[0].posted) == 1
    network.deliver()
    assert spoke.poll() == sent
    assert spoke.poll() == []
    network.assert_empty()


def test_flush_posts_nothing_where_nothing_was_said() -> None:
    network, hub, spoke, _ = connected()
    hub.flush()
    assert not spoke.flush()
    network.assert_empty()


def test_hub_tells_who_said_what_in_each_workers_order() -> None:
    network, hub, one, two = connected()
    one.send(m.Heartbeat())
    one.send(m.Recalled(7, [1]))
    assert one.flush()
    two.send(m.Recalled(8, []))
    two.flush()
    one.send(m.Recalled(9, []))
    one.flush()
    network.deliver()
    heard = hub.poll()
    said = {rank: [message for worker, message in heard if worker == rank] for rank in (1, 2)}
    assert said[1] == [m.Heartbeat(), m.Recalled(7, [1]), m.Recalled(9, [])]
    assert said[2] == [m.Recalled(8, [])]


def test_broadcast_reaches_every_worker_also_later_ones() -> None:
    network, hub, one, two = connected()
    network.endpoints[5] = FakeEndpoint()
    late = Spoke(network[5])
    hub.add(5)
    assert hub.workers == [1, 2, 5]
    hub.broadcast(m.Collect(1))
    hub.flush()
    network.deliver()
    assert [spoke.poll() for spoke in (one, two, late)] == [[m.Collect(1)]] * 3


def test_duplicate_envelope_is_dropped() -> None:
    network, hub, spoke, _ = connected()
    spoke.send(m.Recalled(1, []))
    spoke.flush()
    [(_, payload)] = network[1].take()
    network[0].inbox += [(1, payload), (1, payload)]
    assert hub.poll() == [(1, m.Recalled(1, []))]
    network[0].inbox.append((1, payload))
    assert hub.poll() == []


def test_missing_envelope_is_an_error_that_names_rank_and_number() -> None:
    network, hub, spoke, _ = connected()
    for _ in range(2):
        spoke.send(m.Recalled(1, []))
        spoke.flush()
    _, (_, second) = network[1].take()
    network[0].inbox.append((1, second))
    with pytest.raises(ProtocolError, match="rank 1 sent envelope 2 after 0"):
        hub.poll()


def test_an_envelope_of_nothing_but_a_heartbeat_has_no_number_and_may_be_lost() -> None:
    network, hub, spoke, _ = connected()
    spoke.send(m.Heartbeat())
    spoke.flush()
    [(_, payload)] = network[1].take()
    assert payload == link_module.HEARTBEAT
    spoke.send(m.Recalled(1, []))
    spoke.send(m.Heartbeat())
    spoke.flush()
    network.deliver()
    assert hub.poll() == [(1, m.Recalled(1, [])), (1, m.Heartbeat())]
    hub.send(1, m.Heartbeat())
    hub.flush()
    assert network[0].take() == [(1, payload)], "the same bytes both ways"


def test_what_comes_of_a_worker_after_it_was_said_to_be_gone_is_dropped() -> None:
    network, hub, one, two = connected()
    network[0].gone = {1}
    assert hub.take_lost() == [1]
    for spoke in (one, two):
        spoke.send(m.Recalled(1, []))
        spoke.flush()
    network.deliver()
    assert hub.poll() == [(2, m.Recalled(1, []))]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION, 1, [{"type": "made-up"}]]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION, "1", []]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION, 1, [m.Exhausted(True)]]),  # only rank 0 says that
        msgspec.msgpack.encode([m.PROTOCOL_VERSION, 1, []])[:-1],
        msgspec.msgpack.encode([m.PROTOCOL_VERSION, 1, []]) + b"x",
        msgspec.msgpack.encode({"protocol": 1}),
    ],
)
def test_garbage_is_refused_by_the_ranks_name(garbage: bytes) -> None:
    network, hub, _, _ = connected()
    network[0].inbox.append((2, garbage))
    with pytest.raises(ProtocolError, match="rank 2"):
        hub.poll()


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode([m.PROTOCOL_VERSION - 1, 1, [m.Heartbeat()]]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION + 1, 1, ["what is not known yet"]]),
        msgspec.msgpack.encode([m.PROTOCOL_VERSION + 1, {"of another": "shape"}]),
        msgspec.msgpack.encode([1, [m.Heartbeat()]]),
    ],
)
def test_envelope_of_another_version_is_refused_as_that(payload: bytes) -> None:
    network, hub, _, _ = connected()
    network[0].inbox.append((2, payload))
    with pytest.raises(ProtocolError, match=rf"rank 2 speaks protocol \d, this rank speaks {m.PROTOCOL_VERSION}"):
        hub.poll()


def test_refused_garbage_does_not_use_up_a_number() -> None:
    network, hub, spoke, _ = connected()
    network[0].inbox.append((1, b"garbage"))
    with pytest.raises(ProtocolError):
        hub.poll()
    spoke.send(m.Heartbeat())
    spoke.flush()
    network.deliver()
    assert hub.poll() == [(1, m.Heartbeat())]


def test_hub_refuses_who_is_no_worker_of_the_job() -> None:
    network, hub, _, _ = connected()
    network[0].inbox.append((9, b""))
    with pytest.raises(ProtocolError, match="rank 9 is no worker"):
        hub.poll()


def test_spoke_listens_to_rank_0_alone() -> None:
    network, hub, spoke, _ = connected()
    hub.send(1, m.Exhausted(True))
    hub.flush()
    [(_, payload)] = network[0].take()
    network[1].inbox.append((2, payload))
    assert spoke.poll() == []
    network[1].inbox.append((0, payload))
    assert spoke.poll() == [m.Exhausted(True)]


def test_envelope_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ENVELOPE_BYTES_MAX", 100)
    network, hub, _, _ = connected()
    hub.send(1, m.Refuse("x" * 200))
    with pytest.raises(ProtocolError, match="over the limit"):
        hub.flush()
    network.assert_empty()


def test_a_message_over_the_limit_uses_up_no_number_and_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ENVELOPE_BYTES_MAX", 100)
    monkeypatch.setattr(link_module, "ENVELOPE_BYTES_AIM", 50)
    network, hub, spoke, _ = connected()
    hub.send(1, m.Exhausted(True))
    hub.send(1, m.Refuse("x" * 200))
    with pytest.raises(ProtocolError, match="rank 1 is over the limit of 100"):
        hub.flush()
    network.assert_empty()
    hub.send(1, m.Stop("an envelope was too large"))
    hub.flush()
    network.deliver()
    assert spoke.poll() == [m.Stop("an envelope was too large")]


def test_much_is_divided_and_arrives_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ENVELOPE_BYTES_AIM", 100)
    network, hub, spoke, _ = connected()
    sent: list[m.FromCoordinator] = [m.Refuse("x" * size) for size in (1, 40, 200, 3, 90, 0)]
    for message in sent:
        hub.send(1, message)
    hub.flush()
    sizes = [len(payload) for _, payload in network[0].posted]
    assert len(sizes) > 3
    assert sorted(sizes)[-3] <= 100, "two messages are larger by themselves"
    network.deliver()
    assert spoke.poll() == sent


def test_nothing_is_sent_to_who_is_gone() -> None:
    network, hub, _, _ = connected()
    hub.send(1, m.Exhausted(True))
    network[0].gone.add(1)
    assert hub.take_lost() == [1]
    assert hub.take_lost() == []
    hub.broadcast(m.Exhausted(False))
    hub.flush()
    assert [address for address, _ in network[0].take()] == [2]
    assert hub.lost == {1}


def test_a_worker_sees_that_rank_0_is_gone_and_not_that_another_is() -> None:
    network, _, spoke, _ = connected()
    network[1].gone.add(2)
    assert not spoke.rank0_lost
    network[1].gone.add(0)
    assert spoke.rank0_lost


@pytest.mark.parametrize(
    "message",
    [
        m.Report(started=[(1, 2)], finished=[m.Finished(3, 1, True, 5, 6, b"line\n")]),
        m.Report(deltas=[m.Delta(4, 1, 0, "ü", 1)]),
        m.Ready(slots=4, generation=2, load_s=0.5, backend="CPU"),
        m.EngineDown(reason="gone", started=[(1, 1)], unstarted=[(2, 3)], restarting=False, user_error=True),
        m.Crashed(reason="bug", traceback="Traceback…"),
    ],
)
def test_workers_messages_arrive_as_they_were(message: m.FromWorker) -> None:
    network, hub, spoke, _ = connected()
    spoke.send(message)
    spoke.flush()
    network.deliver()
    assert hub.poll() == [(1, message)]


@pytest.mark.parametrize(
    "message",
    [
        m.Welcome(placement=m.Placement(threads=3, cpus=(0, 2), device_mask={"A": "b"}), run_seed=7, session=1),
        m.Assign(2, [m.WorkItem(5, 1, b'{"prompt": "x"}')]),
        m.Stop("done"),
    ],
)
def test_rank_0s_messages_arrive_as_they_were(message: m.FromCoordinator) -> None:
    network, hub, spoke, _ = connected()
    hub.send(1, message)
    hub.flush()
    network.deliver()
    assert spoke.poll() == [message]
