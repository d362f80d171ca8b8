"""Rank 0's side of a job, alone with a null engine and with ranks that exist only as envelopes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pytest

from coordinator.callbacks import Callbacks
from coordinator.config import JobConfig
from coordinator.engines import ModelFacts
from coordinator.memory import MemoryRecord
from coordinator.session import DEAF_S, WORK_MARGIN, Session
from coordinator.setup import Setup
from coordinator.surroundings import Surroundings
from scheduling import messages as m
from scheduling.errors import ConfigError, HandshakeError, RankLostError, StoppedError, UserError
from storage.summary import Sums
from tests.coordinator.fakes import (
    FakeClock,
    FakeCollectives,
    FakeEndpoint,
    FakeSource,
    Said,
    fake_rank,
    finished,
)

HOST = m.Host(hostname="here", cpus=(0, 1, 2, 3))


def setup(**options: Any) -> Setup:
    config = JobConfig(model="none", engine="null", slots=4, device="cpu", **options)
    return Setup(config, ModelFacts(""), "null", "none", HOST)


class FakeWorld:
    """A world of `size` ranks; this process is rank 0. `survivors`: of collectives, where ranks are gone."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size
        self.leaders: dict[int, int] = {}
        self.fault_tolerant = False
        self.survivors: Survivors | None = None
        self.patience_s = self.in_all_s = 0.0
        self.fenced: list[int] = []
        self.aborted: int | None = None
        self.network = FakeEndpoint()
        self.ranks: dict[int, Said] = {rank: fake_rank(self.network, rank) for rank in range(1, size)}

    def endpoint(self) -> FakeEndpoint:
        return self.network

    def collectives(self, patience_s: float = 600.0, in_all_s: float = math.inf) -> FakeCollectives:
        self.patience_s, self.in_all_s = patience_s, in_all_s
        return self.survivors or FakeCollectives([])

    def fence(self, pids: Sequence[int]) -> bool:
        if self.fault_tolerant:
            self.fenced += pids
            self.network.gone |= set(self.ranks)
        return self.fault_tolerant

    def abort(self, code: int) -> NoReturn:
        self.aborted = code
        raise SystemExit(code)


class Survivors(FakeCollectives):
    """Collectives of which only this rank is left once they have shrunk."""

    def shrink(self) -> None:
        self.calls.append("shrink")
        self.ranks = (0,)


def session_of(size: int, **options: Any) -> tuple[Session, FakeWorld]:
    world = FakeWorld(size)
    return Session(setup(**options), world, number=3), world  # type: ignore[arg-type]


class TurningClock(FakeClock):
    """Time passes by sleeping; at certain times something happens."""

    def __init__(self) -> None:
        super().__init__()
        self._then: list[tuple[float, Callable[[], None]]] = []

    def at(self, time: float, happens: Callable[[], None]) -> None:
        self._then.append((time, happens))

    def sleep(self, descriptors: Sequence[int | None], delay_s: float) -> None:
        self.pass_(delay_s)
        for entry in [entry for entry in self._then if entry[0] <= self.now]:
            self._then.remove(entry)
            entry[1]()


def live(session: Session, clock: TurningClock, seconds: float) -> None:
    """Rank 0 takes its turns all the while."""
    for _ in range(round(2 * seconds)):
        clock.pass_(0.5)
        session.turn()


def begun(size: int) -> tuple[Session, FakeWorld, TurningClock]:
    """A session whose ranks have been welcomed and whose input has one request."""
    world, clock = FakeWorld(size), TurningClock()
    around = Surroundings(clock=clock, sleep=clock.sleep)
    session = Session(setup(), world, number=3, around=around)  # type: ignore[arg-type]
    for said in world.ranks.values():
        said.say(session.setup.hello())
    session.start()
    session.begin(FakeSource(["x"]), MemoryRecord(), Callbacks())
    for said in world.ranks.values():
        said.take()
    return session, world, clock


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
    session, world, clock = begun(3)
    live(session, clock, 59.0)
    world.ranks[1].say(m.Heartbeat(), m.Collecting(1))
    live(session, clock, 2.0)
    assert session.collect() is None
    assert clock.now < 162.0, "who is known to be silent is not waited for"
    assert not any(isinstance(message, m.Enter) for said in world.ranks.values() for message in said.take())
    assert session.took_part(None).startswith("none")
    session.close()
    with pytest.raises(SystemExit):
        session.leave(1)
    assert world.aborted == 1


def test_ranks_are_called_together_and_enter_once_all_have_come() -> None:
    session, world, clock = begun(3)
    world.ranks[1].say(m.Collecting(1))
    clock.at(105.0, lambda: world.ranks[2].say(m.Collecting(1)))
    gathered = session.collect()
    assert gathered is not None
    assert gathered.reduced.sums == Sums()
    for said in world.ranks.values():
        assert [message for message in said.take() if not isinstance(message, m.Heartbeat)] == [
            m.Collect(1), m.Enter(1)
        ]  # fmt: skip
    assert clock.now < 106.0
    assert session.leave(0) == 0


@pytest.mark.parametrize("all_come", [True, False])
def test_ranks_are_told_how_long_rank_0_may_say_nothing_whether_they_enter_or_not(all_come: bool) -> None:
    session, world, _ = begun(3)
    session.beats = True
    for rank in (1, 2) if all_come else (1,):
        world.ranks[rank].say(m.Collecting(1))
    assert (session.collect(work_s=100.0) is not None) is all_come
    for said in world.ranks.values():
        assert m.Busy(600.0 + 70.0 + WORK_MARGIN * 100.0) in said.take()


def test_ranks_that_are_let_go_are_told_too_and_none_of_a_program_that_makes_no_promise() -> None:
    for beats in (True, False):
        session, world, _ = begun(2)
        session.beats = beats
        session.let_go(100.0)
        told = [message for message in world.ranks[1].take() if isinstance(message, m.Busy)]
        assert told == ([m.Busy(600.0 + WORK_MARGIN * 100.0)] if beats else [])


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_is_stated() -> None:
    session, world, clock = begun(3)
    world.ranks[1].say(m.Collecting(1))
    assert session.collect() is None
    assert clock.now == pytest.approx(100.0 + 60.0 + 10.0, abs=0.1)
    with pytest.raises(SystemExit):
        session.leave(0)


def test_who_is_asked_to_stop_meanwhile_waits_no_longer_than_that_allows() -> None:
    session, world, clock = begun(3)
    world.ranks[1].say(m.Collecting(1))
    until: list[float] = []
    clock.at(105.0, lambda: until.append(112.0))
    assert session.collect(give_up_at=lambda: min(until, default=None)) is None
    assert clock.now == pytest.approx(112.0, abs=0.1)


def test_collectives_are_given_no_more_time_than_there_is() -> None:
    session, world, _ = begun(2)
    world.ranks[1].say(m.Collecting(1))
    assert session.collect(give_up_at=lambda: 103.0) is not None
    assert world.in_all_s == pytest.approx(3.0, abs=0.1)


def test_ranks_that_mpi_knows_to_be_gone_are_left_out() -> None:
    session, world, _ = begun(3)
    world.survivors = Survivors([])
    world.network.gone.add(2)
    world.ranks[1].say(m.Collecting(1))
    gathered = session.collect()
    assert gathered is not None
    assert world.survivors.calls[0] == "shrink"
    assert (world.patience_s, world.in_all_s) == (60.0 + 10.0, math.inf)
    assert m.Enter(1, reduced=True) in world.ranks[1].take()
    assert m.Enter(1, reduced=True) not in world.ranks[2].take()
    assert session.took_part(gathered) == "1 of 3 ranks"
    assert list(session.absent(gathered)) == [1, 2]
    assert session.leave(0) == 0


def test_silent_ranks_of_this_host_are_killed_where_the_others_survive_that() -> None:
    session, world, clock = begun(3)
    world.fault_tolerant, world.survivors = True, Survivors([])
    live(session, clock, 61.0)
    gathered = session.collect()
    assert world.fenced == [os.getpid()] * 2
    assert gathered is not None
    assert session.took_part(gathered) == "1 of 3 ranks"


def test_answers_that_come_while_ranks_are_called_together_are_known_as_late() -> None:
    session, world, clock = begun(2)
    said = world.ranks[1]
    said.say(m.Ready(slots=1, generation=1, load_s=0.0, backend="FAKE"))
    for _ in range(2):
        session.turn()
    live(session, clock, 61.0)  # it is lost; what it held is nobody's
    said.say(m.Report(finished=[finished(0)]), m.Collecting(1))
    session.collect()
    assert session.coordinator is not None
    assert session.coordinator.dropped == {(1, 0, 1)}


def test_refuse_reaches_ranks_that_have_not_even_said_hello() -> None:
    session, world = session_of(3)
    session.refuse("the model does not exist")
    for said in world.ranks.values():
        assert said.take_one(m.Refuse) == m.Refuse("the model does not exist")


def test_ranks_are_told_how_long_their_engines_may_take_to_end() -> None:
    session, world, _ = begun(2)
    session.engine_end_s = 0.5
    world.ranks[1].say(m.Collecting(1))
    session.collect(patience_s=8.0)
    assert world.patience_s == 4.0
    session.close("drained")
    said = [message for message in world.ranks[1].take() if not isinstance(message, m.Heartbeat)]
    assert said == [m.Collect(1, 0.5), m.Enter(1), m.Stop("drained", 0.5)]


def test_ranks_are_told_that_rank_0_is_here_while_it_prepares_and_while_others_are_waited_for() -> None:
    world, clock = FakeWorld(3), TurningClock()
    session = Session(setup(), world, around=Surroundings(clock=clock, sleep=clock.sleep))  # type: ignore[arg-type]
    for _ in range(100):
        clock.pass_(0.1)
        session.beat()
    assert world.ranks[1].take() == [m.Heartbeat()] * 5
    world.ranks[1].say(session.setup.hello())
    clock.at(clock.now + 10.0, lambda: world.ranks[2].say(session.setup.hello()))
    session.start()
    *beats, welcome = world.ranks[1].take()
    assert beats == [m.Heartbeat()] * 5
    assert isinstance(welcome, m.Welcome)


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
    world.abort = aborted.append  # type: ignore[method-assign, assignment]
    session = Session(setup(), world, around=Surroundings(clock=clock))  # type: ignore[arg-type]
    world.ranks[1].say(session.setup.hello())
    session.start()
    session.begin(FakeSource([]), MemoryRecord(), Callbacks())
    clock.pass_(silent_s)
    session.let_go()
    session.close("drained")
    assert session.leave(3) == 3
    assert aborted == ([3] if silent_s else [])


def test_a_rank_that_never_says_hello_ends_the_job_instead_of_holding_up_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world, clock = FakeWorld(3), TurningClock()
    session = Session(setup(), world, around=Surroundings(clock=clock, sleep=clock.sleep))  # type: ignore[arg-type]
    world.ranks[1].say(session.setup.hello())
    try:
        session.start(lambda: clock.pass_(10.0))
    except RankLostError:
        with pytest.raises(SystemExit):
            session.leave(4)
    assert world.aborted == 4
    assert "rank 2 did not start within 120 s" in capsys.readouterr().err
