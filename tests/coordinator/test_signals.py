"""What counts as a wish to stop."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from coordinator import signals
from coordinator.signals import StopSignals


@pytest.mark.parametrize(
    ("number", "seconds", "count"),
    [
        (signal.SIGTERM, [0.0, 0.1, 1.5], 1),
        (signal.SIGTERM, [0.0, 3.0], 2),
        (signal.SIGINT, [0.0, 0.1], 2),
        (signal.SIGUSR2, [0.0, 0.1], 2),
    ],
)
def test_a_sigterm_that_comes_by_two_ways_counts_once(
    number: signal.Signals, seconds: list[float], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends it to launcher and ranks, and the launcher hands it on."""
    times = iter(seconds)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with StopSignals() as stop:
        for _ in seconds:
            signal.raise_signal(number)
    assert (stop.count, stop.name) == (count, number.name)
