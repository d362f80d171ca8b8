"""The ranks of a study between its cells, with a clock and messages of the test's own."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from coordinator.study import crew
from coordinator.study.crew import BEAT_S, SILENCE_MAX_S, Call, Crew, answer_calls
from scheduling.messages import Host


class AbortedError(Exception):
    """The job was aborted."""


class Clock:
    """Each look costs `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.now_s = step_s, 0.0

    def monotonic(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class World:
    """Rank `rank` of three, which hears `calls`, one at each look, and then nothing."""

    def __init__(self, rank: int, calls: list[Call | None] | None = None) -> None:
        self.rank, self.size = rank, 3
        self.posted: list[tuple[int, Call]] = []
        self._calls = iter(calls or [])

    def endpoint(self) -> Any:
        return self

    def post(self, rank: int, payload: bytes) -> None:
        if self.rank == 0:
            self.posted.append((rank, msgspec.json.decode(payload, type=Call)))

    def receive(self) -> list[tuple[int, bytes]]:
        call = next(self._calls, None)
        return [] if call is None else [(0, msgspec.json.encode(call))]

    def unsent_bytes(self) -> int:
        return 0

    def lost(self) -> list[int]:
        return []

    def abort(self, status: int) -> None:
        raise AbortedError(status)

    def among(self, members: list[int], number: int) -> World:
        return self


BEAT, OVER = Call([], 1, "", beat=True), Call([], 0, "")


def wait(monkeypatch: pytest.MonkeyPatch, step_s: float, calls: list[Call | None]) -> Clock:
    clock = Clock(step_s)
    monkeypatch.setattr(crew, "time", clock)
    answer_calls(World(1, calls), Host(hostname="here"), lambda *_: None)  # type: ignore[arg-type]
    return clock


def test_a_rank_that_hears_nothing_of_rank_0_ends_the_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AbortedError):
        wait(monkeypatch, 100.0, [BEAT])
    assert capsys.readouterr().err == "llmpi: rank 1: nothing was heard of rank 0 for 3600 s: it leaves\n"


def test_one_that_hears_of_it_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    between: list[Call | None] = [None] * 5
    calls = list(itertools.chain.from_iterable([BEAT, *between] for _ in range(50)))
    clock = wait(monkeypatch, 100.0, [*calls, OVER])
    assert clock.now_s > 5 * SILENCE_MAX_S


def test_a_long_cell_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0)
    monkeypatch.setattr(crew, "time", clock)
    joined: list[str] = []

    def join(_: object, log_dir: str) -> None:
        joined.append(log_dir)
        clock.now_s += 2 * SILENCE_MAX_S

    world = World(1, [Call([0, 1], 1, "logs"), None, OVER])
    answer_calls(world, Host(hostname="here"), join)  # type: ignore[arg-type]
    assert joined == ["logs"]


def test_rank_0_says_each_minute_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0)
    monkeypatch.setattr(crew, "time", clock)
    world = World(0)
    one = Crew(world)  # type: ignore[arg-type]
    while clock.now_s < 10 * BEAT_S:
        one.beat()
    assert 8 <= len(world.posted) / 2 <= 10
    assert {rank for rank, _ in world.posted} == {1, 2}
    assert all(call.beat for _, call in world.posted)
