"""Who may take part: every rank that is like rank 0. One that is not refuses the whole job, by name."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.handshake import Handshake, differences
from scheduling import messages as m
from scheduling.errors import HandshakeError, ProtocolError, RankLostError
from scheduling.link import Hub
from tests.coordinator.fakes import FakeClock, FakeEndpoint, Said, fake_rank, hello


class Table:
    def __init__(self, workers: int = 2) -> None:
        self.endpoint = endpoint = FakeEndpoint()
        self.clock = FakeClock()
        self.ranks: list[Said] = [fake_rank(endpoint, rank) for rank in range(1, workers + 1)]
        hub = Hub(endpoint, list(range(1, workers + 1)))
        self.handshake = Handshake(hub, hello("head"), self.clock, patience_s=60.0)


def test_it_is_over_when_all_have_said_hello() -> None:
    table = Table()
    assert not table.handshake.step()
    table.ranks[0].say(hello("node1"))
    assert not table.handshake.step()
    table.ranks[1].say(hello("node2"))
    assert table.handshake.step()
    assert {rank: one.host.hostname for rank, one in table.handshake.hellos.items()} == {1: "node1", 2: "node2"}
    for rank in table.ranks:
        rank.assert_empty()


def test_alone_it_is_over_at_once() -> None:
    assert Table(workers=0).handshake.step()


def test_a_rank_that_has_died_is_not_waited_for() -> None:
    table = Table()
    table.ranks[0].say(hello())
    assert not table.handshake.step()
    table.endpoint.gone.add(2)
    with pytest.raises(RankLostError, match="rank 2 died before the job had begun"):
        table.handshake.step()


def test_heartbeats_of_ranks_that_wait_are_no_mistake() -> None:
    table = Table(workers=1)
    table.ranks[0].say(hello(), m.Heartbeat())
    assert table.handshake.step()


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"protocol": 99}, ("protocol 99", f"rank 0 speaks {m.PROTOCOL_VERSION}")),
        ({"versions": {"llmpi": "0.9", "numpy": "2.0"}}, ("llmpi 0.9", "rank 0 has 1.0")),
        ({"versions": {"llmpi": "1.0"}}, ("numpy missing", "2.0")),
        ({"config_digest": "c1"}, ("other options",)),
        ({"model_fingerprint": "f1"}, ("another model file",)),
        ({"problem": "m.gguf does not exist"}, ("m.gguf does not exist",)),
    ],
)
def test_odd_rank_is_named_and_everybody_released(odd: dict[str, Any], words: tuple[str, ...]) -> None:
    table = Table()
    table.ranks[0].say(hello("node1"))
    table.ranks[1].say(hello("node2", **odd))
    with pytest.raises(HandshakeError) as refused:
        table.handshake.step()
    reason = str(refused.value)
    assert "rank 2 on node2" in reason
    assert "rank 1 on" not in reason
    for word in words:
        assert word in reason
    assert refused.value.exit_code == 2
    for rank in table.ranks:
        told = rank.take_one(m.Refuse)
        assert "rank 2 on node2" in told.reason


def test_advice_fits_the_mistake() -> None:
    """A model that is missing on one host is not mended by 'the same command'."""
    missing, other = Table(workers=1), Table(workers=1)
    missing.ranks[0].say(hello(problem="m.gguf does not exist"))
    other.ranks[0].say(hello(config_digest="c1"))
    with pytest.raises(HandshakeError) as refused:
        missing.handshake.step()
    assert "same command" not in str(refused.value)
    with pytest.raises(HandshakeError, match="same command"):
        other.handshake.step()


def test_many_odd_ranks_are_counted_not_listed() -> None:
    table = Table(workers=9)
    for rank in table.ranks:
        rank.say(hello(config_digest="c1"))
    with pytest.raises(HandshakeError, match="and 5 more"):
        table.handshake.step()


def test_rank_that_does_not_start_is_named_after_patience() -> None:
    table = Table()
    table.ranks[0].say(hello())
    assert not table.handshake.step()
    table.clock.pass_(59.0)
    assert not table.handshake.step()
    table.clock.pass_(2.0)
    with pytest.raises(RankLostError, match=r"rank 2 did not start within 60 s"):
        table.handshake.step()


def test_work_before_the_handshake_is_a_broken_protocol() -> None:
    table = Table()
    table.ranks[1].say(m.Ready(slots=1, generation=1, load_s=0.0, backend="CPU"))
    with pytest.raises(ProtocolError, match="rank 2 sent Ready before"):
        table.handshake.step()


def test_a_rank_with_several_differences_has_a_clause_for_each() -> None:
    found = differences(hello(), 4, hello("n4", config_digest="c1", model_fingerprint="f1"))
    assert len(found) == 2
    assert all(line.startswith("rank 4 on n4") for line in found)
