"""What a study measures, and in which order: cells, each of which is one run. Pure.

Order: block by block. A block has each number of workers once, in an order that the seed decides. So what drifts
(a machine that gets warm, neighbours that come and go) does not fall on one number of workers, and a study that was
stopped half-way has about as many repeats of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scheduling.errors import ConfigError

CELLS_MAX = 500
"""MPI libraries bound how many communicators can be made in one job; each cell makes two."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run on `workers` workers. `order`: its place in the study, from 0; `repeat` from 1."""

    workers: int
    repeat: int
    order: int

    @property
    def name(self) -> str:
        """Of its folder, too."""
        return f"w{self.workers}-r{self.repeat}"


@dataclass(frozen=True, slots=True)
class Design:
    """A strong scaling study: the same requests on each of these numbers of workers, `repeats` times."""

    workers: tuple[int, ...]
    repeats: int
    seed: int
    warm_up: bool = True

    @classmethod
    def checked(cls, workers: Sequence[int], repeats: int, seed: int, *, warm_up: bool = True) -> Design:
        """Raises ConfigError for a design that cannot be run."""
        if not workers:
            raise ConfigError("--workers is empty: give numbers of workers, as in --workers 1,2,4")
        if len(set(workers)) < len(workers):
            raise ConfigError(
                f"--workers {','.join(map(str, workers))} names a number twice: --repeats N measures each N times"
            )
        if len(workers) * repeats > CELLS_MAX:
            raise ConfigError(
                f"{len(workers)} numbers of workers and {repeats} repeats are {len(workers) * repeats} cells: the most "
                f"that one study takes is {CELLS_MAX}"
            )
        return cls(tuple(sorted(workers)), repeats, seed, warm_up)

    @property
    def most(self) -> int:
        return self.workers[-1]

    @property
    def base(self) -> int:
        """The number of workers that speed-up is measured against: the fewest."""
        return self.workers[0]

    def cells(self) -> list[Cell]:
        """All cells in the order in which they are run."""
        chance = random.Random(self.seed)
        found: list[Cell] = []
        for repeat in range(1, self.repeats + 1):
            block = list(self.workers)
            chance.shuffle(block)
            found += [Cell(workers, repeat, len(found) + place) for place, workers in enumerate(block)]
        return found

    def identity(self) -> dict[str, Any]:
        """What it is made of."""
        return {
            "kind": "strong scaling", "workers": list(self.workers), "repeats": self.repeats, "seed": self.seed,
            "warm_up": self.warm_up,
        }  # fmt: skip

    def as_data(self) -> dict[str, Any]:
        """With what follows from it: cells in the order in which they are run."""
        return self.identity() | {"base_workers": self.base, "cells": [cell.name for cell in self.cells()]}


def fill_hosts(hostnames: dict[int, str]) -> list[int]:
    """Worker ranks in the order in which cells take them: host by host, hosts by their lowest rank, rank 0 left out.

    `hostnames`: of all ranks, rank 0 included. A cell of k workers takes the first k.
    """
    lowest: dict[str, int] = {}
    for rank, name in sorted(hostnames.items()):
        lowest.setdefault(name, rank)
    return sorted(hostnames.keys() - {0}, key=lambda rank: (lowest[hostnames[rank]], rank))
