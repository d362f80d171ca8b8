"""Rank 0 between fake workers, a fake record and a fake source: messages in, messages out, nothing sleeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.callbacks import Callbacks
from coordinator.loop import Coordinator
from scheduling import messages as m
from scheduling.control import ControlPlane, Limits
from scheduling.errors import RequestError
from scheduling.link import Hub
from tests.coordinator.fakes import FakeClock, FakeEndpoint, FakeRecord, FakeSource, Said, fake_rank

LIMITS = Limits(prefetch=1, lease_s=60.0)


class Stage:
    """Rank 0 and its surroundings. `workers` speak for the ranks."""

    def __init__(
        self,
        prompts: Sequence[str | RequestError],
        workers: int = 1,
        limits: Limits = LIMITS,
        **callbacks: Any,
    ) -> None:
        self.clock = FakeClock()
        self.record = FakeRecord()
        self.source = FakeSource(prompts)
        self.results: list[bytes] = []
        self.notes: list[str] = []
        self.endpoint = endpoint = FakeEndpoint()
        ids = list(range(1, workers + 1))
        self.workers: dict[int, Said] = {rank: fake_rank(endpoint, rank) for rank in ids}
        self.hub = Hub(endpoint, ids)
        given: dict[str, Any] = {"on_result": self.results.append, "on_note": self.notes.append} | callbacks
        self.coordinator = Coordinator(
            self.hub, ControlPlane(ids, "work-stealing", self.clock(), limits=limits), self.source, self.record,
            self.clock, names={rank: f"rank {rank} on node{rank}" for rank in ids}, session=2, earlier=10,
            callbacks=Callbacks(**given),
        )  # fmt: skip

    def hear(self, worker: int, *messages: m.FromWorker) -> list[Any]:
        """The worker says this; returns what rank 0 answers it in that turn."""
        self.workers[worker].say(*messages)
        return self.step(worker)

    def step(self, worker: int = 1) -> list[Any]:
        self.coordinator.step()
        self.coordinator.plane.check()
        return self.workers[worker].take()

    def ready(self, worker: int = 1, slots: int = 2, generation: int = 1) -> list[Any]:
        message = m.Ready(slots=slots, generation=generation, load_s=0.1, backend="FAKE")
        self.workers[worker].say(message)
        said = []
        for _ in range(3):  # ready; read; assign
            said += self.step(worker)
        return said

    def durable(self) -> None:
        self.record.commit()
        self.coordinator.step()


def assigned(messages: list[Any]) -> list[int]:
    return [item.index for message in messages if isinstance(message, m.Assign) for item in message.items]
