"""Facts in, findings out: for each check its levels, and the words of what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from coordinator.doctor.about_files import RUN_DIR, STAGING, STORE, about_files, about_model
from coordinator.doctor.about_gpus import about_devices, about_gpus, about_llama, about_pinning
from coordinator.doctor.about_mpi import MpiFacts, Traffic, about_mpi
from coordinator.doctor.about_network import LinkFacts, Together, about_clocks, about_network, about_versions
from coordinator.doctor.about_processors import about_environment, about_limits, about_processors
from coordinator.doctor.about_slurm import SlurmFacts, about_slurm
from coordinator.doctor.facts import Facts, Limits, ModelFile, Node, Place
from coordinator.doctor.findings import Finding, Level
from scheduling.messages import Gpu, Host
from workers.gpudetails import GpuDetails, User
from workers.llama_build import Device, LlamaBuild

GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """`found` has a finding of `check` with this level, and `words` in what it says or what to do about it."""

    name: str
    found: list[Finding]
    check: str
    level: Level
    words: tuple[str, ...] = ()

    def verify(self) -> None:
        fitting = [one for one in self.found if one.check == self.check and one.level == self.level]
        assert fitting, self.found
        for one in fitting:
            text = f"{one.found} {one.remedy} {one.command}"
            if all(word in text for word in self.words):
                return
        raise AssertionError((self.words, fitting))


def mpi(**told: object) -> list[Finding]:
    silent: list[int] = told.pop("silent", [])  # type: ignore[assignment]
    environ: dict[str, str] = told.pop("environ", {})  # type: ignore[assignment]
    base = {"library": "Open MPI v5.0.11", "vendor": "Open MPI", "standard": "3.1", "launcher": "openmpi", "size": 3}
    base |= {"thread_level": "funneled", "fault_tolerant": False}
    hosts = {rank: f"n{1 + rank // 2}" for rank in range(3) if rank not in silent}
    return about_mpi(MpiFacts(**(base | told)), hosts, silent, environ, 60.0)  # type: ignore[arg-type]


RDMA = Traffic(libraries=("libucp",), devices={"RDMA": ("/dev/infiniband/uverbs0",)}, tcp_peers=(), cards=("mlx5_0",))
OVER_TCP = Traffic(libraries=("libucp",), tcp_peers=("10.0.0.2",), cards=("mlx5_0",), shared=("/dev/shm/a",))
ALONE = {"launcher": "none", "size": 1, "thread_level": "", "fault_tolerant": None}

MPI_CASES = [
    Case("library", mpi(), "library", "ok", ("Open MPI v5.0.11", "MPI 3.1")),
    Case("no library", mpi(problem="cannot load MPI library"), "library", "error", ("cannot load", "llmpi[openmpi]")),
    Case("launcher", mpi(), "launcher", "ok", ("openmpi, 3 ranks",)),
    Case("singletons", mpi(singleton="srun started 4 tasks, but …"), "launcher", "error", ("srun started 4",)),
    Case("threads", mpi(), "thread level", "ok", ("funneled",)),
    Case("no threads", mpi(thread_level="single"), "thread level", "warning", ("thread support",)),
    Case("ULFM on", mpi(fault_tolerant=True), "ULFM", "ok", ("on:",)),
    Case("ULFM off", mpi(), "ULFM", "ok", ("off:", "--with-ft ulfm")),
    Case("ULFM not told", mpi(**ALONE), "ULFM", "ok", ("not told",)),
    Case("ULFM of MPICH", mpi(vendor="MPICH"), "ULFM", "ok", ("Open MPI's only",)),
    Case("all answer", mpi(), "answers", "ok"),
    Case("one is silent", mpi(silent=[2]), "answers", "error", ("within 60 s", "rank 2", "--timeout")),
    Case("ranks per host", mpi(), "ranks per host", "ok", ("n1: 2, n2: 1",)),
    Case("no mpirun", mpi(**ALONE), "mpirun", "warning", ("PATH",)),
    Case("its mpirun", mpi(**ALONE, mpirun="/a/mpirun", mpirun_version="mpirun (Open MPI) 5"), "mpirun", "ok",
         ("/a/",)),
    Case("another's", mpi(**ALONE, mpirun="/b/mpirun", mpirun_version="HYDRA build details: Version: 5"), "mpirun",
         "error", ("MPICH's", "alone")),
    Case("no home", mpi(**ALONE, mpirun="/a/mpirun", mpirun_version="Error: Unable to get", environ={}), "mpirun",
         "error", ("HOME is not set", "export HOME=")),
    Case("RDMA", mpi(traffic=RDMA, environ={"UCX_TLS": "rc"}), "transports in use", "ok", ("RDMA", "UCX_TLS=rc")),
    Case("TCP", mpi(traffic=OVER_TCP), "transports in use", "ok", ("TCP to 10.0.0.2", "shared memory", "holds open")),
    Case("TCP despite a card", mpi(traffic=OVER_TCP), "fast network", "warning", ("mlx5_0", "UCX_NET_DEVICES")),
    Case("no sign", mpi(traffic=Traffic(libraries=())), "transports in use", "ok", ("not told",)),
    Case("not readable", mpi(), "transports in use", "ok", ("not told",)),
    Case("settings", mpi(environ={"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_num_procs": "3"}), "transport settings", "ok",
         ("OMPI_MCA_btl=tcp,self",)),
]  # fmt: skip


def link(**told: object) -> list[Finding]:
    base = {"rank": 2, "host": "n2", "latency_s": 2e-5, "bytes_per_s": 1e9, "payload_bytes": 4 << 20}
    return about_network([LinkFacts(**(base | told))], None)  # type: ignore[arg-type]


def clock(offset_s: float, **told: object) -> list[Finding]:
    return about_clocks([LinkFacts(rank=2, host="n2", clock_offset_s=offset_s, clock_error_s=1e-4, **told)])  # type: ignore[arg-type]


VERSIONS = {"python": "3.11.7", "msgspec": "0.22.0", "llama-cpp-python": "0.3.36"}
HOSTS = {0: "n1", 1: "n1", 2: "n2"}
NETWORK_CASES = [
    Case("a link", link(), "rank 0 to n2", "ok", ("20 us", "1,000 MB/s", "rank 2")),
    Case("high latency", link(latency_s=5e-3), "rank 0 to n2", "warning", ("slow", "UCX_NET_DEVICES")),
    Case("low bandwidth", link(bytes_per_s=1e7), "rank 0 to n2", "warning", ("10 MB/s",)),
    Case("own host", link(same_host=True, latency_s=5e-3), "rank 0 to n2", "ok", ("same host",)),
    Case("whole", link(), "payload to n2", "ok", ("4 MiB", "unchanged")),
    Case("damaged", link(damaged=True), "payload to n2", "error", ("other than they were sent", "out of the job")),
    Case("silent", link(problem="rank 2 did not answer within 10 s"), "rank 0 to n2", "error", ("did not answer",
         "firewall")),
    Case("together", about_network([], Together(barrier_s=1e-4, small_s=2e-4)), "collectives", "ok", ("100 us",
         "200 us")),
    Case("wrong sum", about_network([], Together(wrong=True)), "collectives", "error", ("wrong",)),
    Case("stuck", about_network([], Together(problem="a collective did not end within 20 s")), "collectives", "error",
         ("20 s",)),
    Case("clocks agree", clock(0.002), "clocks", "ok", ("n2 2 ms", "± 100 us")),
    Case("clock ahead", clock(90.0), "clocks", "warning", ("90 s ahead", "NTP")),
    Case("clock behind", clock(-2.0), "clocks", "warning", ("2 s behind",)),
    Case("same versions", about_versions({0: VERSIONS, 2: VERSIONS}, HOSTS), "versions", "ok", ("same on all",)),
    Case("other package", about_versions({0: VERSIONS, 2: VERSIONS | {"msgspec": "0.23.0"}}, HOSTS), "msgspec", "error",
         ("rank 2 on n2 has 0.23.0, rank 0 has 0.22.0", "pip install 'msgspec==0.22.0'")),
    Case("other Python", about_versions({0: VERSIONS, 2: VERSIONS | {"python": "3.12.1"}}, HOSTS), "python", "error",
         ("one installation",)),
    Case("missing", about_versions({0: {"llguidance": "missing"}}, HOSTS), "llguidance", "error",
         ("pip install llguidance",)),
    Case("a checkout", about_versions({0: {"llmpi": "unknown"}}, HOSTS), "llmpi", "warning", ("pip install -e .",)),
]  # fmt: skip


def gpu(**told: object) -> GpuDetails:
    base = {"index": 0, "uuid": "GPU-a", "name": "NVIDIA H200", "memory_bytes": 140 * GIB, "free_bytes": 139 * GIB,
            "compute_capability": "9.0", "numa_node": 1, "near_cpus": "32-63", "users": (),
                 "ecc_uncorrected": 0}  # fmt: skip
    return GpuDetails(**(base | told))  # type: ignore[arg-type]


def gpus(*found: GpuDetails, reason: str = "", **told: object) -> list[Finding]:
    node = Node(gpus=found, driver="580.1" if found else "", cuda_driver="13.0" if found else "", **told)  # type: ignore[arg-type]
    return about_gpus({"n1": node}, {"n1": reason})


def pair(kind: str, *, second_links: int = 18) -> list[Finding]:
    first = gpu(peers={"GPU-b": kind}, nvlinks=18)
    return gpus(first, gpu(index=1, uuid="GPU-b", peers={"GPU-a": kind}, nvlinks=second_links))


def llama(node: dict[str, object], *backends: str, devices: tuple[Device, ...] = (), problem: str = "",
          features: tuple[str, ...] = ("AVX2",)) -> list[Finding]:  # fmt: skip
    build = LlamaBuild(
        version="0.3.36", backends=(*backends, "CPU"), devices=devices, cpu_features=features, problem=problem
    )
    return about_llama({"n1": Node(llama=build, **node)})  # type: ignore[arg-type]


WITH_GPU: dict[str, object] = {"gpus": (gpu(),)}
CUDA0 = Device(name="CUDA0", description="NVIDIA H200", gpu=True)
VULKAN0 = Device(name="Vulkan0", description="NVIDIA H200", gpu=True)


def rank(number: int, *seen: str, host: str = "n1", known: bool = True) -> Facts:
    found = tuple(
        Gpu(uuid=uuid, name="NVIDIA H200", index=k, pci_bus_id=f"0000:0{k}:00.0") for k, uuid in enumerate(seen)
    )
    about = Host(hostname=host, gpus=found, gpus_known=known, cpus=(0, 1, 2, 3), local_rank=number)
    return Facts(rank=number, pid=1, host=about)


def devices(backend: str, *variables: str, known: bool = True, mask: tuple[str, str] | None = None) -> list[Finding]:
    one = rank(1, "GPU-a", known=known)
    about = msgspec.structs.replace(one.host, mask=mask)
    return about_devices({1: msgspec.structs.replace(one, host=about, backend=backend, mask_variables=variables)})


def metal() -> Facts:
    about = Host(hostname="n1", gpus=(SHARED,), gpus_known=False, backends=("metal",), cpus=(0, 1))
    return Facts(rank=0, pid=1, host=about)


SHARED = Gpu(uuid="all-metal", name="all that Metal sees (no list)", index=0, mask_entry=None)


def pinned(*ranks: Facts, alone: bool = False) -> list[Finding]:
    return about_pinning({one.rank: one for one in ranks}, alone=alone)


GPU_CASES = [
    Case("none", gpus(reason="NVML cannot be asked"), "GPUs", "ok", ("none", "NVML cannot be asked", "CPU")),
    Case("AMD's", gpus(other_gpus=("AMD",)), "GPUs", "ok", ("AMD",)),
    Case("no driver", gpus(nvidia_devices=4), "GPUs", "error", ("4 NVIDIA GPUs", "nvidia-smi")),
    Case("driver", gpus(gpu()), "driver", "ok", ("580.1", "CUDA up to 13.0")),
    Case("a GPU", gpus(gpu()), "GPU 0", "ok", ("GPU-a", "139 GiB of 140 GiB free", "NUMA node 1", "32-63",
         "nobody else")),
    Case("retired", gpus(gpu(retired_pages=2)), "GPU 0", "ok", ("retired: 2",)),
    Case("retired, not told", gpus(gpu()), "GPU 0", "ok", ("retired: not told",)),
    Case("in use", gpus(gpu(users=(User(pid=7, name="python", memory_bytes=GIB),))), "GPU 0", "warning",
         ("python (pid 7, 1 GiB)", "exclusive")),
    Case("memory taken", gpus(gpu(free_bytes=60 * GIB)), "GPU 0", "warning", ("not shown",)),
    Case("hidden", gpus(gpu(problem="GPU is lost")), "GPU 0", "error", ("GPU is lost", "reset")),
    Case("ECC", gpus(gpu(ecc_uncorrected=2)), "GPU 0", "error", ("2 uncorrected", "--gpu-reset -i 0")),
    Case("rows", gpus(gpu(remap_failed=True)), "GPU 0", "error", ("remapping",)),
    Case("pending", gpus(gpu(retirement_pending=True)), "GPU 0", "warning", ("next reset",)),
    Case("hot", gpus(gpu(slowed=("thermal (hardware)",))), "GPU 0", "warning", ("thermal", "cooling")),
    Case("prohibited", gpus(gpu(compute_mode="prohibited")), "GPU 0", "error", ("-c DEFAULT",)),
    Case("old", gpus(gpu(compute_capability="5.0")), "GPU 0", "warning", ("CUDA 12",)),
    Case("Xid", gpus(gpu()), "last Xid", "ok", ("not told", "dmesg")),
    Case("mask", gpus(gpu(), reason="CUDA_VISIBLE_DEVICES: '9' names no GPU"), "device mask", "warning", ("'9'",)),
    Case("NVLink", pair("NVLink"), "links between GPUs", "ok", ("NVLink: 0-1", "18 NVLinks each")),
    Case("no peers", pair("no"), "links between GPUs", "ok", ("no peer access: 0-1",)),
    Case("links down", pair("NVLink", second_links=12), "links between GPUs", "warning", ("nvidia-smi nvlink -s",)),
    Case("CUDA", llama(WITH_GPU, "CUDA", devices=(CUDA0,)), "GPU build", "ok", ("CUDA0: NVIDIA H200",)),
    Case("built for", llama(WITH_GPU, "CUDA", devices=(CUDA0,)), "llama.cpp", "ok", ("CUDA, CPU", "0.3.36")),
    Case("CPU-only", llama(WITH_GPU), "GPU build", "error",
         ("GPU present", "CPU-only build", "CMAKE_ARGS=-DGGML_CUDA=ON python -m pip install --force-reinstall "
          "--no-deps --no-cache-dir --no-binary llama-cpp-python 'llama-cpp-python>=0.3.36,<0.4'", "docs/install.md")),
    Case("CPU-only, AMD", llama({"other_gpus": ("AMD",)}), "GPU build", "warning", ("-DGGML_HIP=ON",)),
    Case("CPU-only, Intel", llama({"other_gpus": ("Intel",)}), "GPU build", "warning", ("-DGGML_SYCL=ON",)),
    Case("sees none", llama(WITH_GPU, "CUDA"), "GPU build", "error", ("sees no device", "driver is older")),
    Case("other maker", llama(WITH_GPU, "ROCm"), "GPU build", "error", ("-DGGML_CUDA=ON",)),
    Case("Vulkan", llama(WITH_GPU, "Vulkan", devices=(VULKAN0,)), "GPU build", "ok", ("Vulkan0",)),
    Case("devices", devices("CUDA", "CUDA_VISIBLE_DEVICES"), "devices", "ok",
         ("CUDA: 1 (NVIDIA H200)", "CUDA_VISIBLE_DEVICES hides")),
    Case("masked", devices("ROCm", "ROCR_VISIBLE_DEVICES", mask=("ROCR_VISIBLE_DEVICES", "0")), "devices", "ok",
         ("ROCR_VISIBLE_DEVICES=0 is set",)),
    Case("no list", devices("Metal", known=False), "devices", "ok", ("not told", "nothing hides")),
    Case("CPU build", devices("CPU"), "devices", "ok", ("needs none",)),
    Case("no GPU", llama({}), "GPU build", "ok", ("none needed",)),
    Case("not loadable", llama({}, problem="libcuda.so.1: cannot open"), "llama.cpp", "error", ("libcuda.so.1",
         "pip install")),
    Case("features", llama({}, features=("SSE3", "AVX2")), "CPU features", "ok", ("AVX2",)),
    Case("no AVX2", llama({}, features=("SSE3", "AVX")), "CPU features", "warning", ("-DGGML_NATIVE=ON",)),
    Case("ARM", llama({}, features=("NEON", "DOTPROD")), "CPU features", "ok", ("NEON",)),
    Case("pinned", pinned(rank(0, "GPU-a"), rank(1, "GPU-a")), "rank 1", "ok", ("CUDA_VISIBLE_DEVICES=GPU-a",)),
    Case("rank 0", pinned(rank(0), rank(1)), "rank 0", "ok", ("no engine",)),
    Case("alone", pinned(rank(0, "GPU-a", "GPU-b"), alone=True), "worker 1", "ok", ("GPU-b",)),
    Case("idle GPU", pinned(rank(0), rank(1, "GPU-a", "GPU-b")), "placement", "warning", ("given to no rank",
         "as many")),
    Case("not parted", about_pinning({0: metal()}, alone=True), "worker 0", "ok", ("all that Metal sees",)),
    Case("refused", pinned(rank(0), rank(1, "GPU-a"), rank(2, "GPU-a")), "placement", "error", ("--ranks-per-gpu",)),
    Case("too many", pinned(rank(0), *(rank(k) for k in range(1, 7))), "placement", "warning", ("oversubscribed",
         "fewer")),
]  # fmt: skip


def place(use: str = RUN_DIR, **told: object) -> list[Finding]:
    base = {"use": use, "path": "/p", "type": "ext4", "free_bytes": 100 * GIB, "fsync_s": 1e-3,
         "write_bytes_per_s": 1e9,
            "read_bytes_per_s": 1e9}  # fmt: skip
    return about_files({"n1": Node(places=(Place(**(base | told)),))})  # type: ignore[arg-type]


NFS: dict[str, Any] = {"type": "nfs4", "network": True}


def models(*found: ModelFile) -> list[Finding]:
    return about_model(dict(enumerate(found)), {0: "n1", 1: "n2"})


GOOD = ModelFile(path="/m.gguf", fingerprint="sampled-sha256:aa", size_bytes=GIB)
FILE_CASES = [
    Case("good", place(), RUN_DIR, "ok", ("ext4 (local)", "100 GiB free", "1,000 MB/s", "fsync 1 ms", "lock work")),
    Case("memory", place(STAGING, type="tmpfs", memory=True), STAGING, "ok", ("tmpfs (memory)",)),
    Case("network", place(**NFS), RUN_DIR, "ok", ("nfs4 (network)",)),
    Case("locks", place(**NFS, locks_reach=False), RUN_DIR, "warning", ("between hosts", "nolock")),
    Case("full", place(free_bytes=1 << 20), RUN_DIR, "warning", ("1 MiB free", "-o")),
    Case("store full", place(STORE, free_bytes=GIB), STORE, "warning", ("LLMPI_HOME",)),
    Case("fault", place(faults=("lockf fails: No locks available",)), RUN_DIR, "error", ("No locks", "another one")),
    Case("fsync", place(fsync_s=1.0), RUN_DIR, "warning", ("fsync takes 1 s", "--commit-interval")),
    Case("writes", place(write_bytes_per_s=1e6), RUN_DIR, "warning", ("1.0 MB/s",)),
    Case("reads", place(STORE, read_bytes_per_s=1e7, **NFS), STORE, "warning", ("10 MB/s", "--stage auto")),
    Case("staging", place(STAGING, **NFS), STAGING, "warning", ("itself on a network", "--stage-dir")),
    Case("full", place(problem="writing failed: No space left on device"), RUN_DIR, "error", ("free space there, or",)),
    Case("no run dir", place(problem="you may not write to /"), RUN_DIR, "error", ("may not write", "-o")),
    Case("no store", place(STORE, problem="denied"), STORE, "warning", ("export LLMPI_HOME",)),
    Case("no staging", place(STAGING, problem="denied"), STAGING, "warning", ("--stage-dir",)),
    Case("unmeasured", place(written=False), RUN_DIR, "ok", ("not written to",)),
    Case("model", models(GOOD, GOOD), "model", "ok", ("/m.gguf", "1 GiB")),
    Case("no model", models(GOOD, ModelFile(problem="there is no file")), "model", "error", ("n2: there is no",
         "--stage")),
    Case("other model", models(GOOD, ModelFile(path="/m.gguf", fingerprint="b")), "model", "error",
         ("n2 has another",)),
]  # fmt: skip


def limits(*, ranks: int = 2, **told: object) -> list[Finding]:
    base = {"open_files": 4096, "locked_memory_bytes": 8 << 20, "shm_bytes": GIB, "shm_free_bytes": GIB}
    return about_limits({"n1": Node(limits=Limits(**(base | told)))}, ranks)  # type: ignore[arg-type]


def variables(environ: dict[str, str], launcher: str = "none", bound_cpus: int = 4, **node: object) -> list[Finding]:
    about = Host(hostname="n1", cpus=(0, 1, 2, 3))
    facts = Facts(rank=0, pid=1, host=about, environ=environ, bound_cpus=bound_cpus)
    return about_environment({0: facts}, {"n1": Node(**node)}, launcher)  # type: ignore[arg-type]


def hidden(variable: str, value: str) -> list[Finding]:
    masks = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    one = Facts(rank=0, pid=1, host=Host(hostname="n1"), environ={variable: value}, mask_variables=masks)
    return about_environment({0: one}, {"n1": Node(other_gpus=("AMD",))}, "none")


def processors(count: int, **told: object) -> list[Finding]:
    about = Host(hostname="n1", cpus=(0, 1), numa_cpus={0: (0, 1)}, **told)  # type: ignore[arg-type]
    return about_processors({k: Facts(rank=k, pid=1, host=about, bound_cpus=1) for k in range(count)})


def slurm(**told: object) -> list[Finding]:
    base = {"job": "7", "state": "RUNNING", "partition": "gpu", "nodes": "n[1-2]", "left_s": 7200.0,
         "limit": "04:00:00",
            "partition_limit": "1-00:00:00", "requeue": True}  # fmt: skip
    return about_slurm(SlurmFacts(**(base | told)))  # type: ignore[arg-type]


NO_HOME = Limits(open_files=-1, locked_memory_bytes=-1, home="/root", home_writable=False)
SYSTEM_CASES = [
    Case("processors", processors(2, cpu_limit=1), "processors", "ok", ("2 processors", "quota 1", "bound ranks to 1")),
    Case("too many ranks", processors(3), "processors", "warning", ("3 ranks on 2", "fewer")),
    Case("files", limits(), "open files", "ok", ("4096",)),
    Case("few files", limits(open_files=256), "open files", "warning", ("ulimit -n 1024",)),
    Case("many ranks", limits(ranks=512), "open files", "warning", ("ulimit -n 8192",)),
    Case("locked", limits(), "locked memory", "ok", ("8 MiB",)),
    Case("locked, RDMA", limits(rdma=True), "locked memory", "warning", ("ulimit -l unlimited", "memlock")),
    Case("unlimited", limits(rdma=True, locked_memory_bytes=-1), "locked memory", "ok", ("unlimited",)),
    Case("shm", limits(), "/dev/shm", "ok", ("1 GiB",)),
    Case("small shm", limits(shm_bytes=64 << 20), "/dev/shm", "warning", ("64 MiB", "--shm-size")),
    Case("no shm", limits(shm_bytes=None), "/dev/shm", "warning", ("btl",)),
    Case("clean", variables({}), "environment", "ok"),
    Case("hidden GPUs", variables({"CUDA_VISIBLE_DEVICES": ""}, gpus=(gpu(),)), "CUDA_VISIBLE_DEVICES", "error",
         ("empty", "unset CUDA_VISIBLE_DEVICES")),
    Case("hidden from ROCm", hidden("ROCR_VISIBLE_DEVICES", "-1"), "ROCR_VISIBLE_DEVICES", "error", ("unset ROCR",)),
    Case("HIP's empty one", hidden("HIP_VISIBLE_DEVICES", ""), "environment", "ok"),
    Case("nothing hidden", variables({"CUDA_VISIBLE_DEVICES": ""}), "environment", "ok"),
    Case("OMP", variables({"OMP_NUM_THREADS": "1"}), "OMP_NUM_THREADS", "ok", ("do not go by it",)),
    Case("OMP limit", variables({"OMP_THREAD_LIMIT": "2"}), "OMP_THREAD_LIMIT", "warning", ("unset",)),
    Case("OMP bind", variables({"OMP_PROC_BIND": "close"}), "OMP_PROC_BIND", "warning", ("OMP_PLACES",)),
    Case("srun", variables({"SLURM_CPUS_PER_TASK": "8"}), "SRUN_CPUS_PER_TASK", "warning",
         ("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",)),
    Case("srun told", variables({"SLURM_CPUS_PER_TASK": "8", "SRUN_CPUS_PER_TASK": "8"}), "environment", "ok"),
    Case("srun gave one", variables({"SLURM_CPUS_PER_TASK": "4"}, "slurm", 1), "SRUN_CPUS_PER_TASK", "warning",
         ("a task has 1 processor", "export SRUN_CPUS_PER_TASK=")),
    Case("srun gave all", variables({"SLURM_CPUS_PER_TASK": "4"}, "slurm", 4), "environment", "ok"),
    Case("mpirun does not ask", variables({"SLURM_CPUS_PER_TASK": "4"}, "openmpi", 1), "environment", "ok"),
    Case("home", variables({}, limits=NO_HOME), "home", "warning", ("/root", "export LLMPI_HOME")),
    Case("no job", about_slurm(None), "job", "ok", ("not inside",)),
    Case("job", slurm(), "job 7", "ok", ("RUNNING on n[1-2]",)),
    Case("time", slurm(), "time left", "ok", ("2h00m", "04:00:00", "gpu allows 1-00:00:00")),
    Case("little time", slurm(left_s=60.0), "time left", "warning", ("60 s", "llmpi submit")),
    Case("no end", slurm(left_s=None, unlimited=True), "time left", "ok", ("no end",)),
    Case("requeue", slurm(restarts=2), "requeue", "ok", ("allowed", "2 times")),
    Case("no requeue", slurm(requeue=False), "requeue", "warning", ("--requeue",)),
    Case("silent Slurm", slurm(problem="scontrol did not answer"), "job 7", "warning", ("scontrol show job 7",)),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [*MPI_CASES, *NETWORK_CASES, *GPU_CASES, *FILE_CASES, *SYSTEM_CASES], ids=lambda case: case.name
)
def test_a_fact_becomes_its_finding(case: Case) -> None:
    case.verify()


def test_whoever_is_to_mend_something_is_told_how() -> None:
    cases = [*MPI_CASES, *NETWORK_CASES, *GPU_CASES, *FILE_CASES, *SYSTEM_CASES]
    assert all(one.remedy for case in cases for one in case.found if one.level != "ok")


def test_a_variable_of_the_launchers_own_is_no_choice_of_transport() -> None:
    [settings] = [one for one in mpi(environ={"OMPI_MCA_num_procs": "3"}) if one.check == "transport settings"]
    assert "num_procs" not in settings.found
