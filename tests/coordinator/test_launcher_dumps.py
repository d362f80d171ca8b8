"""Which launcher, which local rank and which GPU: from the variables that launchers really set.

launcher_dumps.json has what ranks saw on a Slurm 22.05 of two nodes with four GPUs each that confines no devices, under
the command that names the dump (`tests/system/test_slurm.py` compares them with the Slurm at hand), and under mpirun
of Open MPI 5.0 and of MPICH 5.0 in its jobs. Those of launchers that are not at hand are written down after their
documentation:

- Intel MPI starts ranks with Hydra, whose variables are those of MPICH (MPI_LOCALRANKID, PMI_RANK, PMI_SIZE):
  https://rmeli.github.io/TIL/hpc/mpi for the latter two, https://www.intel.com/content/www/us/en/docs/mpi-library/
  developer-reference-linux/2021-13/hydra-environment-variables.html for what a user may set;
- HPE PALS: PALS_RANKID, PALS_LOCAL_RANKID beside PMI_RANK, PMI_LOCAL_RANK, PMI_SIZE, as in
  https://github.com/argonne-lcf/user-guides (Polaris, Aurora);
- Slurm that confines devices (ConstrainDevices in cgroup.conf) numbers those of each task from 0:
  https://slurm.schedmd.com/gres.html#GPU_Management.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from coordinator.launch import detect
from scheduling.messages import Host
from scheduling.placement import plan
from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.gpus import inventory
from workers.hosts import describe_host

DUMPS: dict[str, list[dict[str, str]]] = json.loads(Path(__file__).with_name("launcher_dumps.json").read_text())

INTEL = [
    {"HOST": "n1", "PMI_SIZE": "3", "PMI_RANK": str(k), "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": str(k)}
    | {"I_MPI_HYDRA_BOOTSTRAP": "slurm", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
    | {"SLURM_STEP_NUM_TASKS": "1"}
    for k in range(3)
]
PALS = [
    {"HOST": f"n{1 + k // 2}", "PALS_RANKID": str(k), "PALS_LOCAL_RANKID": str(k % 2), "PMI_SIZE": "4"}
    | {"PMI_RANK": str(k), "PMI_LOCAL_RANK": str(k % 2)}
    for k in range(4)
]


def gpu(host: str, number: int) -> FakeGpu:
    return FakeGpu(f"GPU-{host}-{number}", bus=f"00000000:{number:02x}:00.0")


def hosts_of(
    dump: Sequence[Mapping[str, str]], root: Path, seen: Sequence[Sequence[int]] | None = None
) -> dict[int, Host]:
    """What each rank says of its host, which has four GPUs; `seen`: those that a rank's cgroup lets it see."""
    found = {}
    for rank, environ in enumerate(dump):
        there = range(4) if seen is None else seen[rank]
        nvml = FakeNvml([gpu(environ["HOST"], number) for number in there])
        gpus = inventory(environ, nvml=nvml, sysfs=root)
        found[rank] = describe_host(
            environ, gpus=gpus, root=root, hostname=environ["HOST"], affinity=frozenset(range(8))
        )
    return found


def devices(hosts: dict[int, Host], each: int = 1) -> dict[int, list[str]]:
    done = plan(hosts, gpus_per_rank=each)
    return {
        rank: [f"{hosts[rank].hostname}:{uuid.rpartition('-')[2]}" for uuid in place.gpu_uuids]
        for rank, place in sorted(done.placements.items())
    }


def on(host: str, **of_rank: str) -> dict[int, list[str]]:
    return {int(rank[1:]): [f"{host}:{number}" for number in numbers] for rank, numbers in of_rank.items()}


GPUS = {
    "srun --gpus-per-task=1 -n4 -N1": on("n1", r0="0", r1="1", r2="2", r3="3"),
    "srun --gpus-per-task=1 --ntasks-per-node=2 -N2 -n4": on("n1", r0="0", r1="1") | on("n2", r2="0", r3="1"),
    # One mask for all ranks: they are dealt it, and rank 0 takes what is left, if anything is.
    "srun --gpus-per-node=4 --ntasks-per-node=4 -N1": on("n1", r0="3", r1="0", r2="1", r3="2"),
    "srun --gres=gpu:2 -n3 -N1": on("n1", r1="0", r2="1"),
    "srun --gpus=3 -n3 -N1": on("n1", r0="2", r1="0", r2="1"),
    "srun --gres=gpu:4 --gpu-bind=single:1 -n4 -N1": on("n1", r0="0", r1="1", r2="2", r3="3"),
    "srun --gres=gpu:4 --gpu-bind=map_gpu:3,2,1,0 -n4 -N1": on("n2", r0="3", r1="2", r2="1", r3="0"),
    "srun --gres=gpu:4 --gpu-bind=mask_gpu:0x3,0xc -n2 -N1": on("n1", r0="0", r1="2"),
    "srun --gpus-per-task=2 -n2 -N1": on("n1", r0="0", r1="2"),
    # No mask at all: every rank sees what the host has.
    "srun --gres=gpu:4 --gpu-bind=none -n4 -N1": on("n1", r0="3", r1="0", r2="1", r3="2"),
    "srun -n3 -N1": on("n1", r0="2", r1="0", r2="1"),
    "srun --mpi=pmi2 -n2 -N1 --gpus-per-task=1": on("n1", r0="0", r1="1"),
    "srun --mpi=pmix -n2 -N1": on("n1", r0="1", r1="0"),
    "mpirun of Open MPI in sbatch -N2 -n3 --gpus-per-node=4": on("n1", r0="1", r1="0") | on("n2", r2="0"),
    "mpirun of MPICH in sbatch -N2 -n3 --gpus-per-node=4": on("n1", r0="1", r1="0") | on("n2", r2="0"),
    "no launcher in sbatch -n3 --gpus-per-node=2": on("n1", r0="0"),
}


@pytest.mark.parametrize("command", sorted(DUMPS))
def test_each_rank_gets_a_gpu_that_its_launcher_gave_it_and_nobody_elses(command: str, tmp_path: Path) -> None:
    assert devices(hosts_of(DUMPS[command], tmp_path)) == GPUS[command]


def test_two_gpus_a_rank_are_those_of_its_mask(tmp_path: Path) -> None:
    hosts = hosts_of(DUMPS["srun --gpus-per-task=2 -n2 -N1"], tmp_path)
    assert devices(hosts, each=2) == on("n1", r0="01", r1="23")


def test_where_slurm_confines_devices_each_tasks_index_0_is_another_gpu(tmp_path: Path) -> None:
    dump = [
        environ | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "0"}
        for environ in DUMPS["srun --gpus-per-task=1 -n4 -N1"]
    ]
    hosts = hosts_of(dump, tmp_path, seen=[[0], [1], [2], [3]])
    assert devices(hosts) == on("n1", r0="0", r1="1", r2="2", r3="3")


def test_ranks_of_launchers_without_masks_are_dealt_gpus_by_local_rank(tmp_path: Path) -> None:
    assert devices(hosts_of(INTEL, tmp_path)) == on("n1", r0="2", r1="0", r2="1")
    assert devices(hosts_of(PALS, tmp_path)) == on("n1", r0="1", r1="0") | on("n2", r2="0", r3="1")


@pytest.mark.parametrize(
    ("launcher", "dump"),
    [
        *(("slurm", DUMPS[name]) for name in sorted(DUMPS) if name.startswith("srun")),
        *(("openmpi", DUMPS[name]) for name in DUMPS if "Open MPI" in name),
        *(("mpich", DUMPS[name]) for name in DUMPS if "MPICH" in name),
        ("mpich", INTEL),
        ("pals", PALS),
    ],
)
def test_rank_size_and_local_rank_are_read_from_any_launcher(launcher: str, dump: list[dict[str, str]]) -> None:
    local: dict[str, int] = {}
    for rank, environ in enumerate(dump):
        found = detect(environ)
        own = local[environ["HOST"]] = local.get(environ["HOST"], -1) + 1
        told = (found.launcher, found.size_claimed, found.rank_claimed, found.local_rank)
        assert told == (launcher, len(dump), rank, own)


def test_a_plain_call_in_a_batch_script_is_a_job_of_its_own() -> None:
    (environ,) = DUMPS["no launcher in sbatch -n3 --gpus-per-node=2"]
    assert environ["SLURM_NTASKS"] == "3"
    assert detect(environ).launcher == "none"
