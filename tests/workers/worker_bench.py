"""A worker between a fake rank 0 and a fake engine: no process, no clock, no network."""

from __future__ import annotations

import json
from typing import Any

from scheduling import messages as m
from scheduling.link import Spoke
from scheduling.requestlines import text_line
from scheduling.requests import Sampling
from tests.coordinator.fakes import FakeClock, FakeEndpoint, FakeEngine, fake_rank0, hello, loaded
from workers.worker import Worker, WorkerOptions

RANK_NUMBER = 3
SEED = 11


class Bench:
    """A worker with everything around it. `engines` lists those it has started, the last one being in use."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.engines: list[FakeEngine] = []
        self.refuse: Exception | None = None
        endpoint = FakeEndpoint()
        self.rank0 = fake_rank0(endpoint)
        fields: dict[str, Any] = {
            "rank": RANK_NUMBER, "hello": hello(), "model_name": "m", "defaults": Sampling(max_tokens=9),
            "engine_factory": self._start, "clock": self.clock, "wall_clock": lambda: 1_700_000_000.9,
        }  # fmt: skip
        self.worker = Worker(Spoke(endpoint), WorkerOptions(**(fields | options)))

    def _start(self, placement: m.Placement) -> FakeEngine:
        if self.refuse is not None:
            raise self.refuse
        self.engines.append(FakeEngine())
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def hear(self, *messages: Any) -> list[Any]:
        """Rank 0 says this; returns what the worker answers in that turn."""
        self.rank0.say(*messages)
        self.worker.step()
        return self.rank0.take()

    def step(self) -> list[Any]:
        self.worker.step()
        return self.rank0.take()

    def pass_(self, seconds: float) -> list[Any]:
        self.clock.pass_(seconds)
        return self.step()

    def ready(self, slots: int = 2) -> Bench:
        """Past hello and welcome, with a loaded engine."""
        self.hear(m.Welcome(placement=m.Placement(note="CPU"), run_seed=SEED, session=4))
        self.engine.say(loaded(slots))
        *_, message = self.step()
        assert isinstance(message, m.Ready)
        return self

    def assign(self, *indexes: int, attempt: int = 1, generation: int = 1) -> list[Any]:
        items = [m.WorkItem(index, attempt, text_line(f"prompt {index}", f"id-{index}")) for index in indexes]
        return self.hear(m.Assign(generation, items))


def line_of(finished: m.Finished) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(finished.line)
    return line
