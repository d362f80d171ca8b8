"""Placement: tables of hosts as launchers leave them, and properties over arbitrary masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ConfigError
from scheduling.messages import Gpu, Host
from scheduling.placement import DEVICE_MASK, Plan, match, plan, plan_alone


def gpus(count: int, host: str = "n1", nodes: int = 0) -> tuple[Gpu, ...]:
    """`count` GPUs in PCI order, spread in runs over `nodes` NUMA nodes (0: unknown)."""
    return tuple(
        Gpu(
            uuid=f"GPU-{host}-{k}",
            name="H200",
            index=k,
            pci_bus_id=f"0000:{k:02x}:00.0",
            numa_node=k * nodes // count if nodes else None,
        )
        for k in range(count)
    )


def host(name: str = "n1", seen: Sequence[Gpu] = (), cpus: int | Sequence[int] = 8, **more: Any) -> Host:
    processors = tuple(range(cpus)) if isinstance(cpus, int) else tuple(cpus)
    return Host(hostname=name, gpus=tuple(seen), cpus=processors, **more)


def under_mpirun(ranks: int, count: int, name: str = "n1", first: int = 0, **more: Any) -> dict[int, Host]:
    """`ranks` ranks on one host, all of which see all its GPUs."""
    seen = gpus(count, name)
    return {first + local: host(name, seen, local_rank=local, **more) for local in range(ranks)}


def devices(done: Plan) -> dict[int, list[str]]:
    return {rank: [uuid.rpartition("-")[2] for uuid in place.gpu_uuids] for rank, place in done.placements.items()}


# ---------------------------------------------------------------- devices


def test_workers_are_dealt_gpus_in_order_and_rank_0_none() -> None:
    done = plan(under_mpirun(5, 4))
    assert devices(done) == {1: ["0"], 2: ["1"], 3: ["2"], 4: ["3"]}
    assert not done.coordinator_works
    assert done.placements[3].device_mask == {DEVICE_MASK: "GPU-n1-2"}


def test_dealing_follows_local_rank_not_rank() -> None:
    seen = gpus(2)
    ranks = {0: host(local_rank=2, seen=seen), 5: host(local_rank=1, seen=seen), 9: host(local_rank=0, seen=seen)}
    assert devices(plan(ranks)) == {9: ["0"], 5: ["1"]}


def test_gpus_are_dealt_in_pci_order_however_a_rank_lists_them() -> None:
    seen = gpus(2)[::-1]
    assert devices(plan({rank: host(seen=seen, local_rank=rank) for rank in range(3)})) == {1: ["0"], 2: ["1"]}


def test_rank_0_works_on_a_gpu_that_no_other_rank_is_given() -> None:
    done = plan(under_mpirun(4, 4))
    assert devices(done) == {0: ["3"], 1: ["0"], 2: ["1"], 3: ["2"]}
    assert done.coordinator_works
    assert any("rank 0 works too" in note for note in done.notes)


def test_rank_0_is_kept_from_working_if_told_so_and_the_idle_gpu_is_said() -> None:
    done = plan(under_mpirun(4, 4), rank0_works=False)
    assert sorted(done.placements) == [1, 2, 3]
    assert "n1: 1 of 4 GPUs are given to no rank" in done.notes


def test_each_rank_gets_its_own_gpu_under_a_mask_per_rank() -> None:
    seen = gpus(4)
    done = plan({rank: host(seen=[seen[rank]], local_rank=rank) for rank in range(4)})
    assert devices(done) == {0: ["0"], 1: ["1"], 2: ["2"], 3: ["3"]}
    assert done.coordinator_works


def test_masks_that_overlap_are_untangled() -> None:
    a, b, c = gpus(3)
    ranks = {0: host(), 1: host(seen=[a, b, c]), 2: host(seen=[a, b]), 3: host(seen=[a])}
    assert devices(plan(ranks, rank0_works=False)) == {1: ["2"], 2: ["1"], 3: ["0"]}


def test_a_worker_moves_over_for_rank_0_whose_mask_is_narrower() -> None:
    a, b = gpus(2)
    assert devices(plan({0: host(seen=[a]), 1: host(seen=[a, b])})) == {0: ["0"], 1: ["1"]}


def test_two_hosts_are_planned_apart() -> None:
    done = plan(under_mpirun(3, 2, "n1") | under_mpirun(2, 2, "n2", first=3))
    assert {rank: place.gpu_uuids[0] for rank, place in done.placements.items()} == {
        1: "GPU-n1-0", 2: "GPU-n1-1", 3: "GPU-n2-0", 4: "GPU-n2-1",
    }  # fmt: skip


def test_several_gpus_a_rank_are_neighbours() -> None:
    assert devices(plan(under_mpirun(3, 4), gpus_per_rank=2)) == {1: ["0", "1"], 2: ["2", "3"]}


def test_ranks_that_share_are_spread_first() -> None:
    done = plan(under_mpirun(5, 2), ranks_per_gpu=2)
    assert devices(done) == {1: ["0"], 2: ["1"], 3: ["0"], 4: ["1"]}
    assert devices(plan(under_mpirun(3, 2), ranks_per_gpu=2)) == {1: ["0"], 2: ["1"]}


def test_rank_0_does_not_share_by_itself() -> None:
    assert not plan(under_mpirun(3, 2), ranks_per_gpu=2).coordinator_works
    assert devices(plan(under_mpirun(3, 2), ranks_per_gpu=2, rank0_works=True)) == {0: ["0"], 1: ["1"], 2: ["0"]}


def test_rank_0_alone_on_its_host_works_there() -> None:
    done = plan({0: host("n1", gpus(1)), 1: host("n2", gpus(1, "n2"))})
    assert sorted(done.placements) == [0, 1]


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("ranks", "options", "said"),
    [
        (
            under_mpirun(4, 2),
            {},
            ["n1: 3 worker ranks", "there are 2 GPUs", "at most 2 workers", "--ranks-per-gpu 2"],
        ),
        (under_mpirun(6, 2), {"ranks_per_gpu": 2}, ["5 worker ranks", "up to 2 ranks", "--ranks-per-gpu 3"]),
        (under_mpirun(3, 2), {"gpus_per_rank": 2}, ["2 worker ranks of 2 GPUs each", "at most 1 worker there"]),
        (under_mpirun(2, 2), {"gpus_per_rank": 4}, ["1 worker rank of 4 GPUs each", "--gpus-per-rank 2 or less"]),
        (under_mpirun(3, 2), {"rank0_works": True}, ["3 worker ranks", "there are 2 GPUs"]),
        ({0: host(), 1: host(), 2: host()}, {"want_gpu": True}, ["asked for and is not there", "rank 1 on n1"]),
        ({0: host(gpus_known=False), 1: host(gpus_known=False)}, {"want_gpu": True}, ["NVML cannot be asked"]),
        ({0: host()}, {"rank0_works": False}, ["rank 0 is alone"]),
        ({0: host()}, {"gpus_per_rank": 0}, ["--gpus-per-rank is 0"]),
        ({0: host()}, {"ranks_per_gpu": -1}, ["--ranks-per-gpu is -1"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    ranks: dict[int, Host], options: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(ranks, **options)
    assert [clause for clause in said if clause not in str(caught.value)] == []


def test_two_ranks_behind_the_same_mask_are_refused_unless_they_may_share() -> None:
    seen = gpus(2)
    ranks = {0: host(), 1: host(seen=seen[:1]), 2: host(seen=seen[:1])}
    with pytest.raises(ConfigError, match="there is 1 GPU"):
        plan(ranks)
    assert devices(plan(ranks, ranks_per_gpu=2)) == {1: ["0"], 2: ["0"]}


def test_masks_that_leave_a_free_gpu_out_of_reach_are_named() -> None:
    a, b, c = gpus(3)
    with pytest.raises(ConfigError, match=r"rank 1 sees GPU-n1-0; rank 2 sees GPU-n1-0; rank 3 sees"):
        plan({0: host(), 1: host(seen=[a]), 2: host(seen=[a]), 3: host(seen=[a, b, c])})


def test_mig_devices_cannot_be_joined() -> None:
    part = Gpu(uuid="MIG-1", name="H200 MIG", index=0)
    with pytest.raises(ConfigError, match="MIG devices"):
        plan({0: host(seen=[part])}, gpus_per_rank=2)


# ---------------------------------------------------------------- hosts that could not be asked


def test_a_rank_that_could_not_ask_takes_its_neighbours_answer() -> None:
    ranks = under_mpirun(3, 2)
    ranks[2] = host(gpus_known=False, local_rank=2)
    done = plan(ranks)
    assert devices(done) == {1: ["0"], 2: ["1"]}
    assert any("rank 2 on n1 could not ask" in note for note in done.notes)


def test_a_rank_that_could_not_ask_under_its_own_mask_stays_on_the_cpu() -> None:
    ranks = under_mpirun(3, 2)
    ranks[2] = host(gpus_known=False, local_rank=2, mask=(DEVICE_MASK, "1"))
    done = plan(ranks)
    assert done.placements[2].gpu_uuids == ()
    assert any("device mask is its own" in note for note in done.notes)


def test_a_mask_that_nobody_could_resolve_is_left_and_said() -> None:
    done = plan({0: host(gpus_known=False, mask=(DEVICE_MASK, "0"))})
    assert done.placements[0].device_mask == {}
    assert any("could not be asked for" in note for note in done.notes)


# ---------------------------------------------------------------- processors


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [(2, 2, [(0,), (1,)]), (8, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]), (5, 2, [(0, 1, 2), (3, 4)]), (3, 1, [(0, 1, 2)])],
)
def test_processors_are_divided_among_workers_and_rank_0_gets_none(
    cpus: int, workers: int, expected: list[tuple[int, ...]]
) -> None:
    done = plan({rank: host(cpus=cpus) for rank in range(workers + 1)})
    assert [place.cpus for place in done.placements.values()] == expected
    assert [place.threads for place in done.placements.values()] == [len(share) for share in expected]
    assert all(place.device_mask == {} for place in done.placements.values())
    assert 0 not in done.placements


def test_more_workers_than_processors_is_said() -> None:
    done = plan({rank: host(cpus=2) for rank in range(5)})
    assert {place.threads for place in done.placements.values()} == {1}
    assert {place.cpus for place in done.placements.values()} == {(0, 1)}
    assert "n1: 4 workers on 2 processors: oversubscribed, one thread each" in done.notes


def test_one_rank_works_on_all_processors() -> None:
    done = plan({0: host(cpus=2)})
    assert done.coordinator_works
    assert (done.placements[0].cpus, done.placements[0].threads) == ((0, 1), 2)
    assert done.placements[0].note == "CPU, 2 threads of 2"


def test_neighbours_stay_together() -> None:
    done = plan({rank: host(cpus=(0, 4, 1, 5)) for rank in range(3)})
    assert [place.cpus for place in done.placements.values()] == [(0, 4), (1, 5)]


def test_workers_get_processors_near_their_gpu() -> None:
    seen = gpus(4, nodes=2)
    near = {0: (0, 2, 4, 6), 1: (1, 3, 5, 7)}
    done = plan({rank: host(seen=seen, local_rank=rank, numa_cpus=near) for rank in range(5)})
    assert [place.cpus for place in done.placements.values()] == [(0, 2), (4, 6), (1, 3), (5, 7)]


def test_too_few_processors_near_the_gpus_are_widened() -> None:
    seen = gpus(2, nodes=1)
    done = plan({rank: host(seen=seen, numa_cpus={0: (0,)}, cpus=4) for rank in range(3)})
    assert [place.cpus for place in done.placements.values()] == [(0, 1), (2, 3)]


def test_gpus_of_an_unknown_node_share_all_processors() -> None:
    done = plan(under_mpirun(3, 2, cpus=4, numa_cpus={0: (0, 1), 1: (2, 3)}))
    assert [place.cpus for place in done.placements.values()] == [(0, 1), (2, 3)]


def test_ranks_confined_to_different_processors_stay_there() -> None:
    ranks = {0: host(cpus=(0, 1)), 1: host(cpus=(2, 3)), 2: host(cpus=(0, 1, 2, 3, 4, 5))}
    done = plan(ranks)
    assert {rank: place.cpus for rank, place in done.placements.items()} == {1: (2, 3), 2: (0, 1, 4, 5)}


def test_cpus_per_task_bounds_a_share() -> None:
    done = plan({rank: host(cpus=16, cpus_per_task=2) for rank in range(3)})
    assert [place.cpus for place in done.placements.values()] == [(0, 1), (8, 9)]


def test_a_quota_bounds_threads_but_not_places() -> None:
    done = plan({rank: host(cpus=16, cpu_limit=5) for rank in range(3)})
    assert [(len(place.cpus), place.threads) for place in done.placements.values()] == [(8, 2), (8, 2)]


def test_unknown_processors_leave_the_affinity_alone() -> None:
    place = plan({0: host(cpus=())}).placements[0]
    assert (place.cpus, place.threads) == ((), 1)


# ---------------------------------------------------------------- CPU by choice or for want of a GPU


def test_gpus_are_hidden_if_they_are_not_wanted() -> None:
    done = plan(under_mpirun(3, 4), want_gpu=False)
    assert [place.device_mask for place in done.placements.values()] == [{DEVICE_MASK: ""}] * 2
    assert not done.coordinator_works
    assert plan({0: host()}, want_gpu=False).placements[0].device_mask == {DEVICE_MASK: ""}


def test_a_rank_that_sees_none_of_its_hosts_gpus_runs_on_the_cpu_and_that_is_said() -> None:
    done = plan({0: host(), 1: host(seen=gpus(1)), 2: host(mask=(DEVICE_MASK, ""))})
    assert devices(done) == {1: ["0"], 2: []}
    assert done.placements[2].device_mask == {DEVICE_MASK: ""}
    assert any("1 worker on the CPU, for they see none" in note for note in done.notes)


def test_a_note_says_which_device_and_how_many_threads() -> None:
    assert plan(under_mpirun(2, 1)).placements[1].note == "GPU-n1-0 (index 0), 8 threads"
    assert plan({0: host(), 1: host()}).notes == ("n1: 1 worker on the CPU, 8 threads",)


# ---------------------------------------------------------------- without MPI


def test_alone_there_is_a_worker_for_each_gpu() -> None:
    places = plan_alone(host(seen=gpus(2), cpus=4))
    assert [(place.gpu_uuids, place.cpus) for place in places] == [
        (("GPU-n1-0",), (0, 1)),
        (("GPU-n1-1",), (2, 3)),
    ]


def test_alone_without_a_gpu_there_is_one_worker_on_all_processors() -> None:
    (place,) = plan_alone(host(cpus=4))
    assert (place.gpu_uuids, place.threads) == ((), 4)


def test_alone_options_count_too() -> None:
    assert len(plan_alone(host(seen=gpus(4)), gpus_per_rank=2)) == 2
    assert len(plan_alone(host(seen=gpus(2)), ranks_per_gpu=2)) == 4
    assert len(plan_alone(host(seen=gpus(2)), want_gpu=False)) == 1
    with pytest.raises(ConfigError, match="not there"):
        plan_alone(host(), want_gpu=True)
    with pytest.raises(ConfigError, match="--gpus-per-rank 2 or less"):
        plan_alone(host(seen=gpus(2)), gpus_per_rank=3)


# ---------------------------------------------------------------- properties


@st.composite
def any_hosts(draw: st.DrawFn) -> dict[int, Host]:
    """1 to 3 hosts with 0 to 4 GPUs and 1 to 9 processors, ranks with masks and processors of any kind."""
    ranks: dict[int, Host] = {}
    names = draw(st.integers(1, 3))
    count = draw(st.integers(1, 8))
    machines = {f"n{k}": (draw(st.integers(0, 4)), draw(st.integers(1, 9))) for k in range(names)}
    for rank in range(count):
        name = f"n{draw(st.integers(0, names - 1))}"
        have, cpus = machines[name]
        all_seen = gpus(have, name, nodes=draw(st.sampled_from([0, 2])))
        seen = draw(st.one_of(st.just(all_seen), st.lists(st.sampled_from(all_seen), unique=True))) if have else ()
        mine = draw(st.one_of(st.just(range(cpus)), st.sets(st.integers(0, cpus - 1), min_size=1)))
        ranks[rank] = host(
            name,
            seen,
            sorted(mine),
            local_rank=draw(st.one_of(st.none(), st.integers(0, 3))),
            cpu_limit=draw(st.one_of(st.none(), st.integers(1, 4))),
            numa_cpus={0: tuple(cpu for cpu in mine if cpu % 2 == 0), 1: tuple(cpu for cpu in mine if cpu % 2)},
        )
    return ranks


@pytest.mark.slow
@given(
    any_hosts(),
    st.sampled_from([None, True]),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([None, None, True, False]),
)
def test_every_plan_keeps_its_promises(
    hosts: dict[int, Host], rank0: bool | None, each: int, share: int, want: bool | None
) -> None:
    def attempt() -> Plan | str:
        try:
            return plan(hosts, rank0_works=rank0, gpus_per_rank=each, ranks_per_gpu=share, want_gpu=want)
        except ConfigError as error:
            return str(error)

    done = attempt()
    assert attempt() == done
    if isinstance(done, str):
        assert want is not False
        return
    assert set(done.placements) == set(hosts) - (set() if done.coordinator_works else {0})
    loads = Counter(uuid for place in done.placements.values() for uuid in place.gpu_uuids)
    assert max(loads.values(), default=0) <= share
    for rank, place in done.placements.items():
        assert set(place.gpu_uuids) <= {gpu.uuid for gpu in hosts[rank].gpus}
        assert len(place.gpu_uuids) in (0, each)
        assert len(place.gpu_uuids) == each or want is False or not hosts[rank].gpus
        assert place.cpus
        assert set(place.cpus) <= set(hosts[rank].cpus)
        assert 1 <= place.threads <= len(place.cpus)
    for name in {one.hostname for one in hosts.values()}:
        used = Counter(
            cpu for rank, place in done.placements.items() if hosts[rank].hostname == name for cpu in place.cpus
        )
        crowded = any(note.startswith(f"{name}: ") and "oversubscribed" in note for note in done.notes)
        assert crowded or max(used.values(), default=0) <= 1


@pytest.mark.slow
@given(st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=5), st.integers(1, 2))
def test_matching_serves_all_exactly_if_halls_condition_holds(sees: list[set[int]], capacity: int) -> None:
    visible = {rank: [str(gpu) for gpu in sorted(mine)] for rank, mine in enumerate(sees)}
    possible = all(
        len(set().union(*(sees[rank] for rank in range(len(sees)) if group >> rank & 1))) * capacity
        >= group.bit_count()
        for group in range(1, 1 << len(sees))
    )
    assert (match(visible, each=1, capacity=capacity) is not None) == possible
