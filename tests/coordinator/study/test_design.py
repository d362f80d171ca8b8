"""Which cells a study has, in which order, on which ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.study.design import CELLS_MAX, Design, fill_hosts
from coordinator.study.scaling import check_room
from scheduling.errors import ConfigError

designs = st.builds(
    Design.checked,
    st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True),
    st.integers(1, 5),
    st.integers(0, 1000),
)


@given(designs)
def test_every_block_has_each_number_of_workers_once(design: Design) -> None:
    cells = design.cells()
    assert [cell.order for cell in cells] == list(range(len(cells)))
    assert len({cell.name for cell in cells}) == len(cells) == len(design.workers) * design.repeats
    width = len(design.workers)
    for repeat in range(design.repeats):
        block = cells[repeat * width : (repeat + 1) * width]
        assert sorted(cell.workers for cell in block) == list(design.workers)
        assert {cell.repeat for cell in block} == {repeat + 1}


def test_the_order_is_the_seeds() -> None:
    of = [tuple(cell.name for cell in Design.checked([1, 2, 4, 8], 3, seed).cells()) for seed in (0, 0, 1, 2)]
    assert of[0] == of[1]
    assert len(set(of)) == 3


def test_blocks_are_in_orders_of_their_own() -> None:
    cells = Design.checked(range(1, 9), 2, 0).cells()
    assert [cell.workers for cell in cells[:8]] != [cell.workers for cell in cells[8:]]


@pytest.mark.parametrize(
    ("workers", "repeats", "told"),
    [((), 1, "empty"), ((2, 1, 2), 1, "2,1,2 names a number twice"), ((1, 2), CELLS_MAX, "1000 cells")],
)
def test_a_design_that_cannot_be_run_is_refused(workers: tuple[int, ...], repeats: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Design.checked(workers, repeats, 0)


def test_hosts_are_filled_one_after_another_and_rank_0_is_left_out() -> None:
    assert fill_hosts({0: "a", 1: "b", 2: "a", 3: "c", 4: "b", 5: "a"}) == [2, 5, 1, 4, 3]
    assert fill_hosts({0: "a", 1: "c", 2: "b", 3: "c"}) == [1, 3, 2]


def test_too_few_ranks_are_told_with_what_to_start_instead() -> None:
    design = Design.checked([1, 4], 2, 0)
    check_room(design, 5)
    with pytest.raises(ConfigError, match=r"has 3 ranks: start it with mpirun -n 5, or ask for at most 2"):
        check_room(design, 3)
    with pytest.raises(ConfigError, match=r"one rank: start it with mpirun -n 5"):
        check_room(design, 1)
