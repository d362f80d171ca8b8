"""Measured cells to order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coordinator.study.summary import Measured


def cell(workers: int, repeat: int, wall_s: float, **more: float) -> Measured:
    made = Measured(
        name=f"w{workers}-r{repeat}", workers=workers, repeat=repeat, order=0, start_unix_s=1e9, wall_s=wall_s,
        load_s=1.0, requests=10, failed=0, prompt_tokens=50, output_tokens=100, slots=4 * workers, idle_share=0.25,
        starved_share=0.125, energy_j=float("nan"),
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


def cells(times: Mapping[int, Sequence[float]]) -> list[Measured]:
    """By number of workers, seconds of each repeat."""
    return [cell(k, repeat, wall_s) for k, walls in times.items() for repeat, wall_s in enumerate(walls, 1)]
