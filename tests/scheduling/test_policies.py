"""Policies alone: order, turns, and that none loses or invents a request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import ConfigError
from scheduling.policies import POLICIES, Policy, RoundRobin, WorkStealing, policy_named


@dataclass(frozen=True)
class Item:
    index: int


def items(*indexes: int) -> list[Item]:
    return [Item(index) for index in indexes]


def take_all(policy: Policy[Item], worker: int) -> list[int]:
    return [policy.take(worker).index for _ in range(policy.available(worker))]


def dealt(workers: list[int], count: int) -> RoundRobin[Item]:
    policy: RoundRobin[Item] = RoundRobin()
    for worker in workers:
        policy.worker_joined(worker)
    for item in items(*range(count)):
        policy.arrive(item)
    return policy


def test_policies_are_found_by_name_and_are_fresh() -> None:
    assert {name: policy_named(name).name for name in POLICIES} == {name: name for name in POLICIES}
    assert policy_named("round-robin") is not policy_named("round-robin")
    with pytest.raises(ConfigError, match="'fifo'"):
        policy_named("fifo")


def test_only_work_stealing_steals() -> None:
    assert {name for name in POLICIES if policy_named(name).steals} == {"work-stealing"}


def test_one_queue_serves_whoever_asks_oldest_first() -> None:
    policy: WorkStealing[Item] = WorkStealing()
    for item in items(0, 1, 2):
        policy.arrive(item)
    assert [policy.available(worker) for worker in (1, 2)] == [3, 3]
    assert [policy.take(2).index, policy.take(1).index, policy.take(2).index] == [0, 1, 2]
    assert policy.starving(1)


def test_what_is_put_back_goes_first_oldest_first() -> None:
    policy: WorkStealing[Item] = WorkStealing()
    policy.arrive(Item(7))
    policy.put_back(items(5, 3, 4))
    assert take_all(policy, 1) == [3, 4, 5, 7]


def test_turns_follow_the_workers_numbers() -> None:
    policy = dealt([3, 1, 2], 7)
    assert [take_all(policy, worker) for worker in (1, 2, 3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_slow_workers_turns_wait_for_it() -> None:
    policy = dealt([1, 2], 4)
    assert take_all(policy, 1) == [0, 2]
    assert policy.starving(1)
    assert not policy.starving(2)
    assert policy.waiting() == policy.available(2) == 2


def test_a_leavers_requests_are_dealt_anew() -> None:
    policy = dealt([1, 2, 3], 9)
    policy.worker_left(2)
    assert policy.waiting() == 9
    assert policy.available(2) == 0
    assert sorted(take_all(policy, 1) + take_all(policy, 3)) == list(range(9))


def test_requests_wait_for_the_first_worker_to_join() -> None:
    policy = dealt([], 3)
    assert policy.waiting() == 3
    policy.worker_joined(4)
    assert take_all(policy, 4) == [0, 1, 2]


def test_all_workers_leave_and_one_comes_back() -> None:
    policy = dealt([1, 2], 4)
    policy.worker_left(1)
    policy.worker_left(2)
    assert policy.waiting() == 4
    policy.worker_joined(2)
    assert sorted(take_all(policy, 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_clear_gives_everything_back(name: str) -> None:
    policy = policy_named(name)
    policy.arrive(Item(0))
    policy.worker_joined(1)
    policy.arrive(Item(1))
    assert sorted(item.index for item in policy.clear()) == [0, 1]
    assert policy.waiting() == policy.available(1) == 0
    assert policy.clear() == []


moves = st.lists(st.tuples(st.sampled_from(["arrive", "take", "back", "join", "leave"]), st.integers(1, 4)))


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40)
@given(moves)
def test_no_request_is_lost_or_given_twice(name: str, moves: list[tuple[str, int]]) -> None:
    policy = policy_named(name)
    joined: set[int] = set()
    held: dict[int, Item] = {}
    waiting: set[int] = set()
    arrived = 0
    for move, worker in moves:
        if move == "arrive":
            policy.arrive(Item(arrived))
            waiting.add(arrived)
            arrived += 1
        elif move == "take" and worker in joined and policy.available(worker):
            item = policy.take(worker)
            waiting.remove(item.index)
            held[item.index] = Item(item.index)
        elif move == "back":
            policy.put_back(list(held.values()))
            waiting.update(held)
            held.clear()
        elif move == "join" and worker not in joined:
            joined.add(worker)
            policy.worker_joined(worker)
        elif move == "leave" and worker in joined:
            joined.remove(worker)
            policy.worker_left(worker)
        assert policy.waiting() == len(waiting)
    assert sorted(item.index for item in policy.clear()) == sorted(waiting)
