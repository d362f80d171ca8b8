"""What rank 0 tells the others as a job ends."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordinator.closing import Size, gather_s, metrics_s
from coordinator.ending import Ending
from scheduling import events as ev
from storage.recovery import Recovery
from tests.coordinator.fakes import FakeClock
from tests.launch import ROOT

ROWS = 10_000_000
ALL_S, METRICS_S = (part(Size(ROWS, 0)) for part in (lambda size: gather_s(size) + metrics_s(size), metrics_s))


LOADED = """
import sys, coordinator.lead, coordinator.ending
assert "coordinator.report" not in sys.modules, "rank 0 loads it before it is ready"
coordinator.ending.load_ahead()
assert "coordinator.report" in sys.modules
"""


def test_what_the_end_needs_is_not_loaded_at_the_start_and_can_be_before_the_end() -> None:
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr


class ToldError(Exception):
    """Ends the end, once the ranks have been told."""


class FakeSession:
    engine_end_s = 10.0
    patience_s: float | None = None

    def collect(self, take: Any, begin: Any, patience_s: float | None, *_: Any, work_s: float = 0.0) -> None:
        self.patience_s = patience_s
        raise ToldError("collect", work_s)

    def let_go(self, work_s: float = 0.0) -> None:
        raise ToldError("let go", work_s)


@pytest.mark.parametrize(
    ("left_s", "told"),
    [
        (2 * ALL_S + 10.0, ("collect", ALL_S)),
        (2 * METRICS_S + 10.0, ("let go", METRICS_S)),
        (METRICS_S, ("let go", 0.0)),
    ],
)
def test_ranks_are_told_of_all_that_rank_0_is_about_to_make(left_s: float, told: tuple[str, float]) -> None:
    assert end(FakeSession(), ROWS, left_s) == told


@pytest.mark.parametrize("left_s", [1.0, 4.0, 30.0])
def test_engines_have_at_most_half_of_the_time_for_which_their_ranks_are_waited_for(left_s: float) -> None:
    session = FakeSession()
    end(session, 0, left_s)
    assert session.patience_s is not None
    rank_s = session.patience_s / 2  # see Session.collect
    assert 0 < session.engine_end_s <= rank_s / 2


def end(session: FakeSession, rows: int, left_s: float) -> tuple[Any, ...]:
    """Drain a run of so many rows, so long before the job has to be gone, until the ranks have been told."""
    clock = FakeClock()
    totals = SimpleNamespace(done=0, failed=0, output_tokens=0)
    coordinator = SimpleNamespace(
        snapshot=lambda: None, outcome=ev.Stop("drained", "asked"), dropped=set(), plane=SimpleNamespace(totals=totals)
    )
    keeper = SimpleNamespace(exit_by=clock() + left_s)
    setup, nothing = SimpleNamespace(config=None), SimpleNamespace(total=None)
    found = Recovery(np.zeros(0, np.uint8), ok=rows, failed=0, durable_bytes=0, torn_bytes=0, sessions=1)
    parts: list[Any] = [setup, session, nothing, nothing, keeper, clock]
    given: list[Any] = [coordinator, nothing, found, nothing, 0]
    with pytest.raises(ToldError) as ended:
        Ending(*parts).finish(*given)
    return ended.value.args
