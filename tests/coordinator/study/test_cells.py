"""What is read off the run of a cell."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.study.cells import AllLoaded, measure
from coordinator.study.design import Cell
from scheduling.ledger import WorkerState


class View:
    def __init__(self, id: int, state: WorkerState) -> None:
        self.id, self.state = id, state


class Workers:
    """Of a coordinator, what the gate looks at."""

    def __init__(self, *ids: int) -> None:
        self.views = [View(id, WorkerState.JOINING) for id in ids]
        self.ready: dict[int, Any] = {}
        self.plane = self

    def workers(self) -> list[View]:
        return self.views

    def load(self, id: int, slots: int) -> None:
        self.ready[id] = type("Ready", (), {"slots": slots})


def test_nothing_is_handed_out_before_the_last_engine_is_loaded() -> None:
    now, workers = [10.0], Workers(1, 2)
    gate = AllLoaded(lambda: now[0])
    assert not gate(workers)  # type: ignore[arg-type]
    workers.load(1, 4)
    assert not gate(workers)  # type: ignore[arg-type]
    now[0] = 13.0
    workers.load(2, 8)
    assert gate(workers)  # type: ignore[arg-type]
    assert gate.slots == 12
    assert gate.waited_slot_s(13.5) == 4 * 3.5 + 8 * 0.5


def test_an_engine_that_cannot_be_loaded_is_not_waited_for() -> None:
    workers = Workers(1, 2)
    gate = AllLoaded(lambda: 0.0)
    workers.load(1, 4)
    assert not gate(workers)  # type: ignore[arg-type]
    workers.views[1].state = WorkerState.GONE
    assert gate(workers)  # type: ignore[arg-type]


def report(*ranks: tuple[float, float]) -> dict[str, Any]:
    """Of ranks with `slot_s` and `starved_slot_s`."""
    return {
        "last_session": {"wall_s": 10.0}, "requests": 5, "failed": 1, "prompt_tokens": 20, "output_tokens": 40,
        "energy": None, "ranks": [{"slot_s": used, "starved_slot_s": starved} for used, starved in ranks],
    }  # fmt: skip


def test_idle_and_starved_are_shares_of_all_slot_time() -> None:
    found = measure(
        Cell(2, 1, 0), report((30.0, 5.0), (18.0, 7.0)), slots=8, start_unix_s=1.0, load_s=2.0, waited_slot_s=4.0
    )
    assert found.idle_share == pytest.approx(1 - 48 / 80)
    assert found.starved_share == pytest.approx((12 - 4) / 80)
    assert (found.wall_s, found.load_s, found.failed, found.output_tokens_per_s) == (10.0, 2.0, 1, 4.0)


def test_starved_is_a_part_of_idle() -> None:
    found = measure(Cell(1, 1, 0), report((36.0, 9.0)), slots=4, start_unix_s=1.0, load_s=2.0, waited_slot_s=0.0)
    assert found.starved_share == found.idle_share == pytest.approx(0.1)


def test_what_two_clocks_differ_by_makes_no_share_below_0() -> None:
    found = measure(Cell(1, 1, 0), report((40.5, 0.1)), slots=4, start_unix_s=1.0, load_s=2.0, waited_slot_s=0.2)
    assert (found.idle_share, found.starved_share) == (0.0, 0.0)
