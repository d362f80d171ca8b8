"""The property driver can fail: each bug planted here is found within a few seeds."""

from __future__ import annotations

import pytest

from tests.scheduling.fakes import World, scenario_of
from tests.scheduling.mutants_copies import mutants as of_copies
from tests.scheduling.mutants_deadline import mutants as of_deadline
from tests.scheduling.mutants_requests import mutants as of_requests
from tests.scheduling.mutants_suspects import mutants as of_suspects
from tests.scheduling.planting import Patch

SEEDS = 400
MUTANTS = (*of_requests, *of_suspects, *of_copies, *of_deadline)


def seeds_to_find(limit: int) -> int | None:
    """How many seeds it takes until a scenario fails; None if none of `limit` does."""
    for seed in range(limit):
        try:
            World(scenario_of(seed)).run()
        except AssertionError:
            return seed + 1
    return None


@pytest.mark.slow
@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert seeds_to_find(SEEDS) is not None, f"no scenario of {SEEDS} notices that {plant.__name__}"
