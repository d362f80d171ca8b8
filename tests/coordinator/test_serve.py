"""The loops around a worker rank and rank 0, on a network in this process; how long they would sleep is noted only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from coordinator import serve as serve_module
from coordinator.collect import Collecting
from coordinator.loop import Coordinator
from coordinator.serve import drive, serve
from coordinator.surroundings import sleep
from coordinator.transport import Backoff, Loopback
from scheduling import messages as m
from scheduling.control import ControlPlane
from scheduling.errors import HandshakeError, RankLostError
from scheduling.link import Hub, Spoke
from scheduling.requestlines import text_line
from scheduling.requests import Sampling
from tests.coordinator.fakes import (
    Contribution,
    FakeClock,
    FakeEndpoint,
    FakeEngine,
    FakeRecord,
    FakeSource,
    answer,
    fake_rank0,
    hello,
    loaded,
)
from workers.protocol import Frame
from workers.worker import Worker, WorkerOptions

WELCOME = m.Welcome(placement=m.Placement(), run_seed=0, session=0)


class Sleeps:
    """In the place of sleeping: what was asked for, and what happens meanwhile (one thing each time)."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.meanwhile: list[Callable[[], Any]] = []

    def __call__(self, descriptors: Sequence[int | None], delay_s: float) -> None:
        self.delays.append(delay_s)
        assert len(self.delays) < 1_000, "the loop does not end"
        if self.meanwhile:
            self.meanwhile.pop(0)()


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


class Rank:
    """A worker rank in a network where the test is rank 0."""

    def __init__(self, **options: Any) -> None:
        self.engine = FakeEngine(loaded())
        self.clock = FakeClock()
        self.entered: list[Contribution] = []
        self.endpoint = endpoint = FakeEndpoint()
        self.rank0 = fake_rank0(endpoint)
        fields: dict[str, Any] = {
            "rank": 1, "hello": hello(), "model_name": "m", "defaults": Sampling(),
            "engine_factory": lambda placement: self.engine, "clock": self.clock, "wall_clock": self.clock,
        }  # fmt: skip
        self.worker = Worker(Spoke(endpoint), WorkerOptions(**(fields | options)))

    def collectives(self) -> Collecting:
        self.entered.append(Contribution())
        return self.entered[-1]

    def serve(self, sleeps: Sleeps) -> None:
        serve(self.worker, self.collectives, self.clock, sleeps)


def test_a_rank_serves_until_it_is_told_to_stop(sleeps: Sleeps) -> None:
    rank = Rank()
    sleeps.meanwhile = [
        lambda: rank.rank0.say(WELCOME),
        lambda: rank.rank0.say(m.Assign(1, [m.WorkItem(0, 1, text_line("x", "a"))])),
        lambda: rank.engine.finish(0),
        lambda: rank.rank0.say(m.Stop("done")),
    ]
    rank.serve(sleeps)
    kinds = [type(message) for message in rank.rank0.take()]
    assert kinds == [m.Hello, m.Ready, m.Report]
    assert rank.engine.closed
    assert not rank.entered


def test_asked_to_collect_it_enters_once_with_its_engine_closed(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(WELCOME)
    closed: list[int] = []
    sleeps.meanwhile = [
        lambda: rank.rank0.say(m.Collect(1)),
        lambda: closed.append(rank.engine.closed),
        lambda: rank.rank0.say(m.Enter(1)),
        lambda: rank.rank0.say(m.Stop("done")),
    ]
    rank.serve(sleeps)
    assert closed == [1]
    assert m.Collecting(1) in rank.rank0.take()
    assert len(rank.entered) == 1
    assert len(rank.entered[0].given) == 7
    assert not rank.entered[0].shrunk


def test_ranks_that_are_gone_are_left_out_first(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(WELCOME, m.Collect(1), m.Enter(1, reduced=True))
    sleeps.meanwhile = [lambda: rank.rank0.say(m.Stop("done"))]
    rank.serve(sleeps)
    assert rank.entered[0].shrunk == 1


def test_a_rank_leaves_with_its_engine_ended_when_rank_0_has_died(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(WELCOME)
    sleeps.meanwhile = [lambda: None, lambda: rank.endpoint.gone.add(0)]
    with pytest.raises(RankLostError, match="rank 0 has died"):
        rank.serve(sleeps)
    assert rank.engine.closed


def test_a_rank_leaves_when_rank_0_is_silent_for_longer_than_it_may(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(msgspec.structs.replace(WELCOME, silence_max_s=600.0))
    turns = 7
    sleeps.meanwhile = [lambda: rank.clock.pass_(100.0)] * turns
    with pytest.raises(RankLostError, match="nothing was heard of rank 0 for 700 s"):
        rank.serve(sleeps)
    assert len(sleeps.delays) == turns
    assert rank.engine.closed


@pytest.mark.parametrize("beats", [True, False])
def test_a_rank_that_is_not_welcomed_waits_as_long_as_rank_0_says_that_it_is_there(sleeps: Sleeps, beats: bool) -> None:
    rank = Rank(welcome_max_s=60.0)

    def pass_time() -> None:
        rank.clock.pass_(50.0)
        if beats:
            rank.rank0.say(m.Heartbeat())

    sleeps.meanwhile = [*[pass_time] * 5, lambda: rank.rank0.say(m.Stop("done"))]
    with (
        contextlib.nullcontext() if beats else pytest.raises(RankLostError, match="nothing was heard of rank 0 for 100")
    ):
        rank.serve(sleeps)


def test_a_heartbeat_of_rank_0_is_enough_and_without_its_promise_none_is_missed(sleeps: Sleeps) -> None:
    for silence_max_s, said in ((600.0, [m.Heartbeat()]), (None, [])):
        rank = Rank()
        rank.rank0.say(msgspec.structs.replace(WELCOME, silence_max_s=silence_max_s))

        def pass_time(rank: Rank = rank, said: list[Any] = said) -> None:
            rank.clock.pass_(500.0)
            rank.rank0.say(*said)

        sleeps.meanwhile = [*[pass_time] * 5, lambda rank=rank: rank.rank0.say(m.Stop("done"))]  # type: ignore[misc]
        rank.serve(sleeps)


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("entered", [[m.Enter(1)], []])
def test_rank_0_may_be_silent_for_as_long_as_it_said_last(
    sleeps: Sleeps, entered: list[m.Enter], crashed: bool
) -> None:
    for silence_max_s, outlived in ((10_500.0, True), (9_000.0, False)):
        rank, said = Rank(), [m.Busy(silence_max_s), *entered]
        rank.rank0.say(msgspec.structs.replace(WELCOME, silence_max_s=600.0), m.Collect(1))
        sleeps.meanwhile = [
            *[lambda rank=rank: rank.worker.crash("of its own", "")] * crashed,
            lambda rank=rank, said=said: rank.rank0.say(*said),  # type: ignore[misc]
            lambda rank=rank: rank.clock.pass_(10_000.0),  # type: ignore[misc]
            lambda rank=rank: rank.rank0.say(m.Stop("done")),  # type: ignore[misc]
        ]
        with contextlib.nullcontext() if outlived else pytest.raises(RankLostError, match="nothing was heard"):
            rank.serve(sleeps)


def test_what_collectives_take_is_no_silence_of_rank_0(sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    monkeypatch.setattr(serve_module, "collect", lambda *given, **options: rank.clock.pass_(700.0))
    rank.rank0.say(msgspec.structs.replace(WELCOME, silence_max_s=600.0), m.Collect(1), m.Enter(1))
    sleeps.meanwhile = [lambda: rank.rank0.say(m.Stop("done"))]
    rank.serve(sleeps)


def test_refused_rank_raises_the_reason(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(m.Refuse("rank 1 has another model"))
    with pytest.raises(HandshakeError, match="rank 1 has another model"):
        rank.serve(sleeps)


def test_exception_is_told_to_rank_0_and_the_rank_stays_to_be_collected_and_stopped(sleeps: Sleeps) -> None:
    times = [1.0]
    rank = Rank(wall_clock=times.pop)
    rank.rank0.say(WELCOME)
    sleeps.meanwhile = [
        lambda: rank.rank0.say(m.Assign(1, [m.WorkItem(k, 1, text_line("x", f"{k}")) for k in range(3)])),
        lambda: rank.engine.say(Frame(finished=[answer(0), answer(1)])),
        lambda: rank.rank0.say(m.Collect(1), m.Enter(1)),
        lambda: rank.rank0.say(m.Stop("done")),
    ]
    rank.serve(sleeps)
    said = rank.rank0.take()
    [crashed] = [message for message in said if isinstance(message, m.Crashed)]
    assert "IndexError" in crashed.reason
    assert "Traceback" in crashed.traceback
    reported = [one.index for message in said if isinstance(message, m.Report) for one in message.finished]
    assert reported == [0]
    assert rank.entered[0].given[0].tolist()[0] == 1, "it counts what it has told"


def test_an_idle_rank_sleeps_longer_and_longer_and_not_so_long_with_work(sleeps: Sleeps) -> None:
    rank = Rank()
    rank.rank0.say(WELCOME)
    idle: list[Callable[[], Any]] = [lambda: None] * 15
    work = [lambda: rank.rank0.say(m.Assign(1, [m.WorkItem(0, 1, text_line("x", "a"))]))]
    sleeps.meanwhile = [*idle, *work, *idle, lambda: rank.rank0.say(m.Stop("done"))]
    rank.serve(sleeps)
    assert max(sleeps.delays[:15]) == Backoff.IDLE_S
    assert max(sleeps.delays[16:]) == Backoff.BUSY_S


def hosted_job(prompts: int) -> tuple[Coordinator, Worker, FakeEngine, FakeRecord]:
    loopback = Loopback(0, 0)
    clock, engine, record = FakeClock(), FakeEngine(loaded(4)), FakeRecord()
    hub = Hub(loopback.near, [0])
    options = WorkerOptions(
        rank=0, hello=hello(), model_name="m", defaults=Sampling(), engine_factory=lambda placement: engine,
        clock=clock, wall_clock=clock,
    )  # fmt: skip
    worker = Worker(Spoke(loopback.far), options)
    coordinator = Coordinator(
        hub, ControlPlane([0], "work-stealing", clock()), FakeSource(["x"] * prompts), record, clock,
        names={0: "rank 0"}, session=0,
    )  # fmt: skip
    hub.send(0, WELCOME)
    return coordinator, worker, engine, record


def test_rank_0_drives_the_worker_it_hosts_to_the_end(sleeps: Sleeps) -> None:
    coordinator, worker, engine, record = hosted_job(3)

    def work() -> None:
        engine.finish(*engine.take())
        record.commit()

    sleeps.meanwhile = [work] * 20
    drive(coordinator, [worker], lambda: True, sleeps)
    assert coordinator.outcome is not None
    assert coordinator.outcome.outcome == "done"
    assert len(record.lines) == 3


def test_rank_0_stops_at_once_when_it_may_not_go_on(sleeps: Sleeps) -> None:
    coordinator, worker, _, _ = hosted_job(3)
    turns = iter([True, True, False])
    drive(coordinator, [worker], lambda: next(turns), sleeps)
    assert coordinator.outcome is None


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_sleep_ends_when_an_engine_has_said_something(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    sleep([None, pipe[0]], 600.0)  # the test's own time limit is shorter than this


def test_sleep_without_engines_is_just_a_sleep(pipe: tuple[int, int]) -> None:
    sleep([None], 0.0)
    sleep([pipe[0]], 0.0)
