"""Leaders: who leads whom, what is carried in one message, and that nothing is lost or doubled without them."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.relays import BEAT_S, FIRST_WORD_S, HOLD_S, LIVELY_S, Branch, Bundle, Trunk, leaders_of
from scheduling import link as link_module
from scheduling import messages as m
from scheduling.errors import ProtocolError
from scheduling.link import HEARTBEAT
from tests.coordinator.fakes import FakeClock, FakeTransport

LEASE_S = 4.0
PATIENCE_S = LEASE_S / 2


@pytest.mark.parametrize(
    ("hosts", "fanout", "groups"),
    [
        ([[1, 2, 3], [4, 5, 6]], 8, [[1, 2, 3], [4, 5, 6]]),
        ([[5, 1, 3], [2, 4]], 8, [[1, 3, 5], [2, 4]]),
        ([[1, 2, 3, 4, 5]], 4, [[1, 2], [3, 4, 5]]),
        ([list(range(1, 10))], 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ([[1, 2], []], 1, [[1], [2]]),
    ],
)
def test_the_workers_of_a_host_form_groups_of_about_the_same_size(
    hosts: list[list[int]], fanout: int, groups: list[list[int]]
) -> None:
    leaders = leaders_of(hosts, fanout)
    assert leaders == {worker: group[0] for group in groups for worker in group}


class Tree:
    """Rank 0, the leader 1 with its members 2 and 3, and 4, which leads nobody."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        leaders = {1: 1, 2: 1, 3: 1, 4: 4}
        self.network = FakeTransport(0, *leaders)
        self.trunk = Trunk(self.network[0], leaders)
        self.branches = {rank: Branch(self.network[rank], rank, leaders, self.clock, LEASE_S) for rank in leaders}

    def gone(self, *ranks: int) -> None:
        """MPI tells of their death: nothing comes from or to them any more."""
        for endpoint in self.network.endpoints.values():
            endpoint.gone = set(ranks)
        for rank in ranks:
            self.branches.pop(rank).flush()
            self.network[rank].posted.clear()
            self.network[rank].inbox.clear()

    def turn(self, *stopped: int) -> tuple[list[tuple[int, bytes]], dict[int, list[bytes]]]:
        """What rank 0 and the workers take of all that is under way, a few hops later."""
        up: list[tuple[int, bytes]] = []
        down: dict[int, list[bytes]] = {}
        for _ in range(4):
            self.network.deliver()
            up += self.trunk.receive()
            for rank, branch in self.branches.items():
                if rank not in stopped:
                    down.setdefault(rank, []).extend(payload for _, payload in branch.receive())
            self.clock.pass_(HOLD_S)
        return up, {rank: payloads for rank, payloads in down.items() if payloads}

    def say(self, rank: int, *payloads: bytes) -> None:
        for payload in payloads:
            self.branches[rank].post(0, payload)
        self.branches[rank].flush()

    def tell(self, *what: tuple[int, bytes]) -> None:
        for rank, payload in what:
            self.trunk.post(rank, payload)
        self.trunk.flush()


@pytest.fixture
def tree() -> Tree:
    tree = Tree()
    tree.turn()
    return tree


def test_what_a_group_says_within_a_moment_reaches_rank_0_in_one_message(tree: Tree) -> None:
    for rank in (1, 2, 3):
        tree.say(rank, b"a%d" % rank, b"b%d" % rank)
    tree.network.deliver()
    tree.branches[1].receive()
    assert not tree.network[1].posted, "it may become more"
    tree.clock.pass_(HOLD_S)
    tree.branches[1].receive()
    assert [address for address, _ in tree.network[1].posted] == [0]
    up, _ = tree.turn()
    assert sorted(up) == sorted((rank, b"%c%d" % (k, rank)) for rank in (1, 2, 3) for k in b"ab")
    assert [payload for rank, payload in up if rank == 2] == [b"a2", b"b2"]


def test_what_rank_0_says_to_a_group_in_one_turn_goes_to_its_leader_in_one_message(tree: Tree) -> None:
    tree.tell(*((rank, b"to %d" % rank) for rank in (1, 2, 3, 4)))
    assert sorted(address for address, _ in tree.network[0].posted) == [1, 4]
    _, down = tree.turn()
    assert down == {rank: [b"to %d" % rank] for rank in (1, 2, 3, 4)}


def test_a_leader_names_those_whose_heartbeat_it_has_heard_once_each_and_nobody_else(tree: Tree) -> None:
    heard: list[tuple[int, bytes]] = []
    for _ in range(5):
        tree.say(2, HEARTBEAT)
        heard += tree.turn()[0]
    assert heard == []
    tree.clock.pass_(LEASE_S / 5)
    assert tree.turn()[0] == [(2, HEARTBEAT)]
    tree.clock.pass_(LEASE_S / 5)
    assert tree.turn()[0] == [], "it was told once"


def test_rank_0s_heartbeats_reach_everybody(tree: Tree) -> None:
    tree.tell(*((rank, HEARTBEAT) for rank in (1, 2, 3, 4)))
    assert len(tree.network[0].posted) == 2
    assert tree.turn()[1] == {rank: [HEARTBEAT] for rank in (1, 2, 3, 4)}


def test_what_was_received_is_not_kept(tree: Tree) -> None:
    tree.say(2, b"x" * 1000)
    tree.turn()
    tree.tell((2, b"y" * 1000))
    tree.turn()
    tree.say(2, HEARTBEAT)
    tree.clock.pass_(BEAT_S)
    tree.turn()
    assert tree.branches[2]._way.again() == []
    assert tree.trunk._ways[2].again() == []


def test_when_a_leader_has_died_its_members_and_rank_0_go_on_without_and_nothing_is_lost(tree: Tree) -> None:
    tree.say(2, b"before")
    tree.turn()
    tree.say(2, b"one")
    tree.say(3, b"two")
    tree.tell((2, b"three"), (3, b"four"))
    tree.network.deliver()  # the leader has all four and passes on none
    tree.gone(1)
    up, down = tree.turn()
    assert sorted(message for message in up if message[1] != HEARTBEAT) == [(2, b"one"), (3, b"two")]
    assert {rank: [one for one in said if one != HEARTBEAT] for rank, said in down.items()} == {
        2: [b"three"],
        3: [b"four"],
    }
    tree.tell((2, b"five"))
    tree.say(2, b"six")
    assert [address for address, _ in tree.network[0].posted + tree.network[2].posted] == [2, 0]
    assert tree.turn() == ([(2, b"six")], {2: [b"five"]})


def test_a_silent_leader_is_left_and_what_it_passes_on_when_it_wakes_is_known_already(tree: Tree) -> None:
    for _ in range(3):
        tree.clock.pass_(LEASE_S / 5)
        tree.turn()
    assert not tree.branches[2].alone
    tree.say(2, b"one")
    tree.tell((2, b"two"))
    up, down = tree.turn(1)
    assert (up, down) == ([], {})
    tree.clock.pass_(PATIENCE_S)
    up, down = tree.turn(1)
    assert [message for message in up if message[1] != HEARTBEAT] == [(2, b"one")]
    assert [payload for payload in down[2] if payload != HEARTBEAT] == [b"two"]
    assert tree.branches[2].alone
    assert tree.branches[3].alone
    up, down = tree.turn()
    assert (b"one" in dict(up).values(), b"two" in down.get(2, [])) == (False, False)


def test_a_leader_that_has_not_said_anything_yet_may_still_be_starting() -> None:
    tree = Tree()
    tree.say(2, b"hello")
    tree.clock.pass_(FIRST_WORD_S - 1)
    assert tree.turn(1)[0] == []
    assert not tree.branches[2].alone
    tree.clock.pass_(1)
    assert (2, b"hello") in tree.turn(1)[0]


def test_the_last_words_go_to_everybody_directly(tree: Tree) -> None:
    tree.tell((2, b"kept by its leader"))
    tree.turn(1)
    tree.trunk.go_direct()
    tree.tell(*((rank, b"stop") for rank in (1, 2, 3, 4)))
    _, down = tree.turn(1)
    assert [payload for payload in down[2] if payload != HEARTBEAT] == [b"kept by its leader", b"stop"]
    assert [payload for payload in down[3] if payload != HEARTBEAT] == [b"stop"]


def test_a_leader_sleeps_little_while_others_may_wait_for_it(tree: Tree) -> None:
    tree.clock.pass_(1.0)
    tree.branches[1].took_part()
    assert not tree.branches[1].lively
    tree.say(2, b"x")
    tree.turn()
    assert tree.branches[1].took_part()
    assert not tree.branches[1].took_part(), "that was all"
    assert tree.branches[1].lively
    tree.clock.pass_(LIVELY_S)
    assert not tree.branches[1].lively
    assert not tree.branches[4].took_part(), "it carries for nobody"


def test_much_together_is_divided_into_bundles(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.relays.ENVELOPE_BYTES_AIM", 100)
    tree.tell(*((2, b"%d" % k * 40) for k in range(5)))
    assert [len(msgspec.msgpack.decode(payload)[1]) for _, payload in tree.network[0].posted] == [2, 2, 1]
    assert tree.turn()[1] == {2: [b"%d" % k * 40 for k in range(5)]}


@pytest.mark.parametrize(
    ("source", "payload", "told"),
    [
        (3, b"", "rank 3 sent 0 bytes that are no bundle"),
        (3, link_module.HEARTBEAT, "rank 3 sent .* bytes that are no bundle"),
        (3, [m.PROTOCOL_VERSION + 1, [], []], "rank 3 speaks protocol"),
        (3, [m.PROTOCOL_VERSION, [], [3, 0, 3]], "rank 3 sent a bundle with half a heartbeat"),
        (3, [m.PROTOCOL_VERSION, [[2, 1, 0, b""]], []], "rank 3 speaks for rank 2, which is not of its group"),
        (4, [m.PROTOCOL_VERSION, [[2, 1, 0, b""]], []], "rank 4 speaks for rank 2"),
        (9, [m.PROTOCOL_VERSION, [[9, 1, 0, b""]], []], "rank 9 is no worker of this job"),
        (1, [m.PROTOCOL_VERSION, [[2, 2, 0, b""]], []], "of worker 2, envelope 2 came after 0: one has gone missing"),
    ],
)
def test_what_cannot_be_is_refused_by_the_ranks_name(tree: Tree, source: int, payload: object, told: str) -> None:
    content = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
    tree.network[0].inbox.append((source, content))
    with pytest.raises(ProtocolError, match=told):
        tree.trunk.receive()


def test_bundles_lead_with_the_version_of_the_protocol() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Bundle(m.PROTOCOL_VERSION)))[0] == m.PROTOCOL_VERSION
