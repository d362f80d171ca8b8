"""A rank's `Host`: launchers' variables, cgroups of both versions, and machines built in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.gpus import GpuInventory
from workers.hosts import allowed_cpus, cpu_quota, describe_host, free_memory, local_rank, parse_cpu_list

NO_GPUS = GpuInventory(True, "", ())
ALL = frozenset(range(8))


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
ONLINE = {"sys/devices/system/cpu/online": "0-7\n"}
# A Slurm job on a node with cgroup version 2: the step's folder has the set, the task's has none of its own.
V2 = ONLINE | {
    "proc/self/mountinfo": V2_MOUNT,
    "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_1\n",
    "sys/fs/cgroup/cpuset.cpus.effective": "0-7\n",
    "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/cpuset.cpus.effective": "2-5\n",
}
V1 = ONLINE | {
    "proc/self/mountinfo": V1_MOUNTS,
    "proc/self/cgroup": "3:cpuset:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n0::/\n",
    "sys/fs/cgroup/cpuset/cpuset.cpus": "0-7\n",
    "sys/fs/cgroup/cpuset/slurm/job_7/cpuset.cpus": "0,4\n",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", (0, 1, 2, 3, 8)), ("5", (5,)), ("", ()), ("odd", ()), ("0-1,0", (0, 1)), ("0,2,", (0, 2))],
)
def test_cpu_lists(text: str, expected: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == expected


def test_the_nearest_cgroup_with_a_cpuset_decides_under_version_2(tmp_path: Path) -> None:
    assert allowed_cpus({}, _machine(tmp_path, V2), frozenset({2})) == (2, 3, 4, 5)


def test_the_cpuset_decides_under_version_1(tmp_path: Path) -> None:
    assert allowed_cpus({}, _machine(tmp_path, V1), frozenset({0})) == (0, 4)


def test_effective_set_wins_over_the_configured_one_under_version_1(tmp_path: Path) -> None:
    files = V1 | {"sys/fs/cgroup/cpuset/slurm/job_7/cpuset.effective_cpus": "4\n"}
    assert allowed_cpus({}, _machine(tmp_path, files), ALL) == (4,)


def test_in_a_container_the_mounts_own_root_is_read(tmp_path: Path) -> None:
    files = ONLINE | {
        "proc/self/mountinfo": "31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup ro\n",
        "proc/self/cgroup": "0::/docker/abc\n",
        "sys/fs/cgroup/cpuset.cpus.effective": "6-7\n",
    }
    assert allowed_cpus({}, _machine(tmp_path, files), ALL) == (6, 7)


def test_without_cgroups_the_online_processors_are_allowed_whatever_mpirun_bound(tmp_path: Path) -> None:
    assert allowed_cpus({}, _machine(tmp_path, ONLINE), frozenset({3})) == tuple(range(8))


def test_without_any_file_the_affinity_is_what_is_known(tmp_path: Path) -> None:
    assert allowed_cpus({}, tmp_path, frozenset({1, 3})) == (1, 3)


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}


def test_srun_without_a_confining_cgroup_keeps_the_affinity_that_slurm_set(tmp_path: Path) -> None:
    assert allowed_cpus(SRUN, _machine(tmp_path, ONLINE), frozenset({4, 5})) == (4, 5)


def test_srun_with_a_confining_cgroup_takes_all_of_it(tmp_path: Path) -> None:
    assert allowed_cpus(SRUN, _machine(tmp_path, V2), frozenset({2})) == (2, 3, 4, 5)


@pytest.mark.parametrize("mpirun", [{"OMPI_COMM_WORLD_RANK": "1"}, {"MPI_LOCALRANKID": "1"}])
def test_mpirun_inside_a_slurm_step_is_not_srun(tmp_path: Path, mpirun: dict[str, str]) -> None:
    assert len(allowed_cpus(SRUN | mpirun, _machine(tmp_path, ONLINE), frozenset({4}))) == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("", None),
        ("odd", None),
    ],
)
def test_quota_of_version_2_counts_whole_processors(tmp_path: Path, quota: str, expected: int | None) -> None:
    assert cpu_quota(_machine(tmp_path, V2 | {"sys/fs/cgroup/cpu.max": quota})) == expected


def test_the_tightest_quota_above_decides(tmp_path: Path) -> None:
    above = "sys/fs/cgroup/system.slice/cpu.max"
    below = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/cpu.max"
    assert cpu_quota(_machine(tmp_path, V2 | {above: "300000 100000", below: "600000 100000"})) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("400000", 4)])
def test_quota_of_version_1(tmp_path: Path, quota: str, expected: int | None) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/"
    files = V1 | {f"{folder}cpu.cfs_quota_us": quota, f"{folder}cpu.cfs_period_us": "100000"}
    assert cpu_quota(_machine(tmp_path, files)) == expected


OPENMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (OPENMPI, 1),
        (HYDRA, 0),
        ({"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "5"}, 1),
        ({"PMI_RANK": "5", "PMI_LOCAL_RANK": "3"}, 3),
        ({"MV2_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}, 2),
        (OPENMPI | {"SLURM_LOCALID": "0"}, 1),
        (HYDRA | {"SLURM_LOCALID": "7"}, 0),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "odd", "SLURM_LOCALID": "2"}, 2),
        ({"MPI_LOCALRANKID": ""}, None),
    ],
)
def test_local_rank_by_launcher(environ: dict[str, str], expected: int | None) -> None:
    assert local_rank(environ) == expected


def test_processors_of_a_core_and_of_a_node_stand_together(tmp_path: Path) -> None:
    """Two nodes of two cores with two threads each, numbered as Linux does: siblings are 4 apart."""
    siblings = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n"
        for cpu in range(8)
    }
    nodes = {
        "sys/devices/system/node/node0/cpulist": "0,2,4,6\n",
        "sys/devices/system/node/node1/cpulist": "1,3,5,7\n",
    }
    host = describe_host({}, gpus=NO_GPUS, root=_machine(tmp_path, ONLINE | siblings | nodes), affinity=ALL)
    assert host.cpus == (0, 4, 2, 6, 1, 5, 3, 7)
    assert host.numa_cpus == {0: (0, 2, 4, 6), 1: (1, 3, 5, 7)}


def test_nodes_outside_of_the_cgroup_are_not_named(tmp_path: Path) -> None:
    nodes = {"sys/devices/system/node/node0/cpulist": "0-3\n", "sys/devices/system/node/node1/cpulist": "6-7\n"}
    host = describe_host({}, gpus=NO_GPUS, root=_machine(tmp_path, V2 | nodes), affinity=ALL)
    assert host.numa_cpus == {0: (2, 3)}


def test_host_carries_what_the_launcher_and_slurm_said(tmp_path: Path) -> None:
    environ = OPENMPI | {"SLURM_CPUS_PER_TASK": "3", "CUDA_VISIBLE_DEVICES": "0,1"}
    host = describe_host(
        environ,
        gpus=GpuInventory(False, "no driver", ()),
        root=_machine(tmp_path, V2),
        hostname="gpu01",
        affinity=ALL,
    )
    assert (host.hostname, host.gpus_known, host.cpus_per_task, host.local_rank) == ("gpu01", False, 3, 1)
    assert host.mask == ("CUDA_VISIBLE_DEVICES", "0,1")


def test_this_machine_can_be_described() -> None:
    host = describe_host({}, gpus=NO_GPUS)
    assert host.hostname
    assert host.cpus
    assert host.mask is None


MEMINFO = {"proc/meminfo": "MemTotal:       32000000 kB\nMemFree:  1 kB\nMemAvailable:   16000000 kB\n"}


def test_memory_is_what_the_kernel_says_is_available(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(_machine(tmp_path, MEMINFO)) == 16_000_000 * 1024


def test_the_tightest_cgroup_bounds_memory_and_its_idle_file_pages_do_not_count(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    files = (
        V2
        | MEMINFO
        | {
            f"{job}/memory.max": "8000000000\n",
            f"{job}/memory.current": "5000000000\n",
            f"{job}/memory.stat": "anon 3000000000\nfile 2000000000\ninactive_file 1500000000\n",
            f"{job}/step_0/memory.max": "max\n",
            f"{job}/step_0/memory.current": "5\n",
        }
    )
    assert free_memory(_machine(tmp_path, files)) == 4_500_000_000


def test_memory_is_bounded_under_version_1_too(tmp_path: Path) -> None:
    files = (
        V1
        | MEMINFO
        | {
            "proc/self/mountinfo": "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            "proc/self/cgroup": "4:memory:/slurm/job_7\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "2000000000\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "500000000\n",
        }
    )
    assert free_memory(_machine(tmp_path, files)) == 1_500_000_000
