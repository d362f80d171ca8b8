"""What a rank knows of itself and of its host, as plain data that travels to rank 0.

None, or '' for texts, is always 'not told', never 'none'.
"""

from __future__ import annotations

import msgspec

from scheduling.messages import Host
from workers.gpudetails import GpuDetails
from workers.llama_build import LlamaBuild

ENVIRONMENT = (
    "OMPI_MCA_", "PRTE_MCA_", "UCX_", "MPIR_CVAR_", "MPICH_", "FI_", "I_MPI_FABRICS", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GGML_VK_VISIBLE_DEVICES",
    "OMP_", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_JOB_ID", "SLURM_JOB_PARTITION",
)  # fmt: skip
"""What names begin with, of the variables that are looked at. Others stay where they are: some hold secrets."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A folder and the file system that it lies on. `use`: what for. Speeds in bytes a second; 0: not measured."""

    use: str
    path: str
    problem: str = ""
    """Why it cannot be used."""
    type: str = ""
    mounted: str = ""
    network: bool = False
    memory: bool = False
    locks_reach: bool = True
    """Whether locks are those of all hosts that have these files."""
    free_bytes: int | None = None
    write_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    fsync_s: float | None = None
    faults: tuple[str, ...] = ()
    """Of rename, fsync and lock, what did not work, and why."""
    written: bool = True
    """Whether something was written there to try it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process on this host. -1 is unlimited."""

    open_files: int
    locked_memory_bytes: int
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    rdma: bool = False
    """Whether the kernel knows a network card with RDMA."""
    home: str = ""
    home_writable: bool = True


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str = ""
    fingerprint: str = ""
    size_bytes: int = 0
    problem: str = ""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all ranks of a host, found by one of them."""

    gpus: tuple[GpuDetails, ...] = ()
    driver: str = ""
    cuda_driver: str = ""
    """The newest CUDA that the driver can run, '12.8'."""
    other_gpus: tuple[str, ...] = ()
    """Kinds of GPUs beside NVIDIA's that the kernel knows: 'AMD', 'Intel'."""
    nvidia_devices: int = 0
    """Of /dev/nvidia0 and so on: also where NVML cannot be asked."""
    llama: LlamaBuild | None = None
    places: tuple[Place, ...] = ()
    limits: Limits | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True, tag="facts"):
    """Of one rank. `unanswered`: what could not be found out in time, with the reason."""

    rank: int
    pid: int
    host: Host
    gpu_reason: str = ""
    backend: str = ""
    """Whose devices the `host`'s are: 'CUDA', 'ROCm', …; 'CPU' for a build without any."""
    mask_variables: tuple[str, ...] = ()
    """What hides devices from it."""
    python: str = ""
    versions: dict[str, str] = {}
    bound_cpus: int = 0
    """How many processors the launcher has bound this rank to."""
    environ: dict[str, str] = {}
    model: ModelFile | None = None
    node: Node | None = None
    unanswered: dict[str, str] = {}
