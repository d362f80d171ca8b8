"""Rank 0's side of a job, alone with a null engine and with ranks that exist only as envelopes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.config import JobConfig
from coordinator.engines import ModelFacts
from coordinator.loop import Callbacks
from coordinator.memory import MemoryRecord
from coordinator.session import DEAF_S, Session
from coordinator.setup import Setup
from coordinator.surroundings import Surroundings
from scheduling import messages as m
from scheduling.errors import ConfigError, HandshakeError, StoppedError, UserError
from storage.summary import Sums
from tests.coordinator.fakes import FakeClock, FakeCollectives, FakeEndpoint, FakeSource, Said, fake_rank

HOST = m.Host(hostname="here", cpus=(0, 1, 2, 3))


def setup(**options: Any) -> Setup:
    config = JobConfig(model="none", engine="null", slots=4, device="cpu", **options)
    return Setup(config, ModelFacts(""), "null", "none", HOST)


class FakeWorld:
    """A world of `size` ranks; this process is rank 0."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size
        self.network = FakeEndpoint()
        self.ranks: dict[int, Said] = {rank: fake_rank(self.network, rank) for rank in range(1, size)}

    def endpoint(self) -> FakeEndpoint:
        return self.network

    def collectives(self, patience_s: float = 600.0) -> FakeCollectives:
        return FakeCollectives([])


def session_of(size: int, **options: Any) -> tuple[Session, FakeWorld]:
    world = FakeWorld(size)
    return Session(setup(**options), world, number=3), world  # type: ignore[arg-type]


def answer_all(session: Session, prompts: list[str], first_index: int = 0) -> list[dict[str, Any]]:
    lines: list[bytes] = []
    source = FakeSource(prompts, first_index)
    session.begin(source, MemoryRecord(), Callbacks(on_result=lines.append))
    outcome = session.run()
    assert outcome is not None
    assert outcome.outcome == "done"
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- alone


def test_what_somebody_listens_to_is_not_copied() -> None:
    cases: list[tuple[dict[str, Any], Callbacks, bool]] = [
        ({}, Callbacks(), True),
        ({}, Callbacks(on_delta=lambda delta: None), False),
        ({"copies": False}, Callbacks(), False),
        ({"schedule": "round-robin"}, Callbacks(), False),
    ]
    for options, callbacks, copies in cases:
        session = Session(setup(**options), None)
        session.start()
        assert session.begin(FakeSource(["a"]), MemoryRecord(), callbacks).plane.limits.copies is copies
        session.close()


def test_alone_it_hosts_a_worker_itself() -> None:
    session = Session(setup(), None)
    session.start()
    found = answer_all(session, ["a", "b", "c"])
    assert sorted(entry["custom_id"] for entry in found) == ["id-0", "id-1", "id-2"]
    gathered = session.collect()
    assert gathered is not None
    assert (gathered.reduced.sums.requests, gathered.reduced.sums.failed) == (3, 0)
    session.close()
    assert not any(worker.fileno() for worker in session.hosted)


def test_a_second_input_goes_through_the_same_workers() -> None:
    session = Session(setup(), None)
    session.start()
    answer_all(session, ["a", "b"])
    workers = list(session.hosted)
    found = answer_all(session, ["c"], first_index=2)
    assert [entry["llmpi"]["index"] for entry in found] == [2]
    assert session.hosted == workers
    session.close()


def test_an_empty_input_after_another_ends_too() -> None:
    session = Session(setup(), None)
    session.start()
    answer_all(session, ["a"])
    assert answer_all(session, [], first_index=1) == []
    session.close()


def test_a_gpu_that_is_not_there_is_refused() -> None:
    config = JobConfig(model="none", engine="null", device="gpu")
    alone = Session(Setup(config, ModelFacts(""), "null", "none", HOST), None)
    with pytest.raises(UserError, match="GPU"):
        alone.start()


# ---------------------------------------------------------------- with ranks


def test_ranks_are_welcomed_with_a_placement_seed_and_session() -> None:
    session, world = session_of(3, seed=8)
    for said in world.ranks.values():
        said.say(session.setup.hello())
    session.start()
    for said in world.ranks.values():
        welcome = said.take_one(m.Welcome)
        assert (welcome.run_seed, welcome.session) == (8, 3)
        assert welcome.placement.threads == 2
    assert session.hosted == []
    assert session.names() == {1: "rank 1 on here", 2: "rank 2 on here"}


def test_ranks_are_told_where_only_embeddings_will_be_asked_for() -> None:
    session, world = session_of(2)
    session.embeds_only = True
    world.ranks[1].say(session.setup.hello())
    session.start()
    assert world.ranks[1].take_one(m.Welcome).placement.lanes == ("embed",)
    assert session_of(2, embeddings=True)[0].embeds_only


def test_rank_0_hosts_a_worker_where_it_is_asked_to() -> None:
    session, world = session_of(2, coordinator_works=True)
    world.ranks[1].say(session.setup.hello())
    session.start()
    assert sorted(session.hub.workers) == [0, 1]
    assert len(session.hosted) == 1
    session.close()


def test_one_rank_alone_in_its_world_works_itself() -> None:
    session, _ = session_of(1)
    session.start()
    assert session.hub.workers == [0]
    session.close()


def test_odd_rank_ends_the_start_and_all_ranks_are_told() -> None:
    session, world = session_of(3)
    world.ranks[1].say(session.setup.hello())
    other = setup(seed=99)
    world.ranks[2].say(other.hello())
    with pytest.raises(HandshakeError, match="rank 2 on here was started with other options"):
        session.start()
    for said in world.ranks.values():
        assert any(isinstance(message, m.Refuse) for message in said.take())


def test_placement_that_cannot_be_is_told_to_all_ranks() -> None:
    session, world = session_of(2)
    gpu = JobConfig(model="none", engine="null", slots=4, device="gpu")
    session.setup = Setup(gpu, session.setup.model, "null", "none", HOST)
    world.ranks[1].say(session.setup.hello())
    with pytest.raises((ConfigError, UserError), match="GPU"):
        session.start()
    told = world.ranks[1].take_one(m.Refuse)
    assert "GPU" in told.reason


def test_close_stops_every_rank() -> None:
    session, world = session_of(3)
    session.close("all is done")
    for said in world.ranks.values():
        assert said.take_one(m.Stop) == m.Stop("all is done")


def test_no_collective_is_entered_while_a_rank_is_silent() -> None:
    session, world = session_of(3, lease_s=1e-9)
    for said in world.ranks.values():
        said.say(session.setup.hello())
    session.start()
    session.begin(FakeSource(["x"]), MemoryRecord(), Callbacks())
    for _ in range(3):
        session.turn()
    assert session.collect() is None
    for said in world.ranks.values():
        assert not any(isinstance(message, m.Collect) for message in said.take())


def test_ranks_that_wait_for_nothing_else_are_asked_to_collect() -> None:
    session, world = session_of(2)
    world.ranks[1].say(session.setup.hello())
    session.start()
    world.ranks[1].take()
    gathered = session.collect()
    assert gathered is not None
    assert gathered.reduced.sums == Sums()
    assert world.ranks[1].take_one(m.Collect)


def test_refuse_reaches_ranks_that_have_not_even_said_hello() -> None:
    session, world = session_of(3)
    session.refuse("the model does not exist")
    for said in world.ranks.values():
        assert said.take_one(m.Refuse) == m.Refuse("the model does not exist")


def test_ranks_are_told_how_long_their_engines_may_take_to_end() -> None:
    session, world = session_of(2)
    session.engine_end_s = 0.5
    session.collect()
    session.close("drained")
    assert world.ranks[1].take() == [m.Collect(1, 0.5), m.Stop("drained", 0.5)]


def test_a_start_that_is_interrupted_releases_all_ranks() -> None:
    session, world = session_of(3)

    def interrupted() -> None:
        raise StoppedError("SIGTERM received")

    with pytest.raises(StoppedError):
        session.start(interrupted)
    for said in world.ranks.values():
        assert said.take_one(m.Refuse) == m.Refuse("SIGTERM received")


@pytest.mark.parametrize("silent_s", [0.0, DEAF_S + 1.0])
def test_without_a_collective_a_rank_that_says_nothing_lately_ends_the_job_instead_of_holding_it(
    silent_s: float,
) -> None:
    clock = FakeClock()
    world = FakeWorld(2)
    aborted: list[int] = []
    world.abort = aborted.append  # type: ignore[attr-defined]
    session = Session(setup(), world, around=Surroundings(clock=clock))  # type: ignore[arg-type]
    world.ranks[1].say(session.setup.hello())
    session.start()
    session.begin(FakeSource([]), MemoryRecord(), Callbacks())
    clock.pass_(silent_s)
    session.let_go()
    session.close("drained")
    assert session.leave(3) == 3
    assert aborted == ([3] if silent_s else [])
