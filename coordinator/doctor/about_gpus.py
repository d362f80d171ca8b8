"""GPUs, the llama.cpp that is to use them, and which rank would get which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.doctor.facts import Facts, Node
from coordinator.doctor.findings import Finding, error, listed, merged, ok, size_text, warning
from scheduling.errors import ConfigError
from scheduling.messages import Host, Placement
from scheduling.placement import plan, plan_alone
from workers.gpudetails import GpuDetails
from workers.llama_build import LlamaBuild

FREE_SHARE = 0.9
"""A GPU with less of its memory free than this is used by somebody."""
OLDEST_FOR_CUDA_13 = (7, 5)
REQUIREMENT = "llama-cpp-python>=0.3.36,<0.4"
BUILDS = {"NVIDIA": ("CUDA", "GGML_CUDA"), "AMD": ("ROCm", "GGML_HIP"), "Intel": ("SYCL", "GGML_SYCL")}
"""By maker: the backend that uses its GPUs, and the option that builds it."""
REMEDIES = {
    "given to no rank": "start as many worker ranks as there are GPUs",
    "oversubscribed": "start fewer ranks there",
    "not parted": "start one worker rank there",
    "could not": "see above: why GPUs cannot be asked for",
}
"""What to do about a note on the placement, by words of it. Other notes only tell."""
GPU_BACKENDS = ("CUDA", "ROCm", "Vulkan", "SYCL", "Metal", "MTL", "OpenCL", "MUSA", "CANN")


def about_gpus(nodes: Mapping[str, Node], reasons: Mapping[str, str]) -> list[Finding]:
    """By host. `reasons`: why GPUs of a host could not be asked for, or a remark about its mask; '' if neither."""
    findings = []
    for host, node in nodes.items():
        if not node.gpus:
            findings.append(_none(host, node, reasons.get(host, "")))
            continue
        told = f"driver {node.driver or 'not told'}, runs CUDA up to {node.cuda_driver or 'not told'}"
        findings.append(ok("driver", told, host))
        for gpu in node.gpus:
            findings += _gpu(host, gpu)
        findings += _links(host, node.gpus)
        findings.append(
            ok("last Xid", "not told: NVML reports Xids only while somebody listens; `dmesg | grep Xid`", host)
        )
        if reasons.get(host):
            findings.append(warning("device mask", reasons[host], "correct the mask, or unset it", host))
    return merged(findings)


def _none(host: str, node: Node, reason: str) -> Finding:
    if node.nvidia_devices:
        return error(
            "GPUs",
            f"/dev has {node.nvidia_devices} NVIDIA GPUs, and the driver cannot be asked: {reason or 'no answer'}",
            "see whether nvidia-smi works there; in a container, start it with the NVIDIA runtime", host,
            command="nvidia-smi",
        )  # fmt: skip
    if node.other_gpus:
        kinds = listed(node.other_gpus)
        return ok("GPUs", f"{kinds} (what llama.cpp sees of them is below); none of NVIDIA's", host)
    return ok("GPUs", f"none{f' ({reason})' if reason else ''}: workers run on the CPU", host)


def _gpu(host: str, gpu: GpuDetails) -> list[Finding]:
    name = f"GPU {gpu.index}"
    if gpu.problem:
        return [
            error(
                name, f"it cannot be asked: {gpu.problem}",
                "it is hidden from this job by its cgroup, or it is lost: then reset it or drain the node", host,
            )
        ]  # fmt: skip
    findings = [_memory(host, name, gpu)]
    if gpu.remap_failed or gpu.ecc_uncorrected:
        what = [f"{gpu.ecc_uncorrected} uncorrected ECC errors"] if gpu.ecc_uncorrected else []
        what += ["remapping of a damaged row failed"] if gpu.remap_failed else []
        findings.append(
            error(name, f"{gpu.uuid}: {' and '.join(what)}", "reset the GPU; if it comes again, have it replaced", host,
                  command=f"nvidia-smi --gpu-reset -i {gpu.index}")
        )  # fmt: skip
    elif gpu.retirement_pending:
        findings.append(
            warning(name, f"{gpu.uuid}: damaged memory is to be retired at the next reset", "reset the GPU", host,
                    command=f"nvidia-smi --gpu-reset -i {gpu.index}")
        )  # fmt: skip
    if gpu.slowed:
        findings.append(
            warning(name, f"{gpu.uuid} is slowed down: {', '.join(gpu.slowed)}",
                    "look at cooling and power; the slow GPU gets less work, and is not otherwise harmful", host)
        )  # fmt: skip
    if gpu.compute_mode == "prohibited":
        findings.append(
            error(name, f"{gpu.uuid}: its compute mode prohibits CUDA", "set the default mode", host,
                  command=f"nvidia-smi -c DEFAULT -i {gpu.index}")
        )  # fmt: skip
    if _capability(gpu) and _capability(gpu) < OLDEST_FOR_CUDA_13:
        findings.append(
            warning(name, f"compute capability {gpu.compute_capability}: CUDA 13 has no support for it",
                    "build llama.cpp with CUDA 12", host)
        )  # fmt: skip
    return findings


def _capability(gpu: GpuDetails) -> tuple[int, ...]:
    return tuple(map(int, (gpu.compute_capability or "").split("."))) if gpu.compute_capability else ()


def _memory(host: str, name: str, gpu: GpuDetails) -> Finding:
    memory = "memory not told"
    if gpu.memory_bytes is not None and gpu.free_bytes is not None:
        memory = f"{size_text(gpu.free_bytes)} of {size_text(gpu.memory_bytes)} free"
    ecc = "ECC errors not told" if gpu.ecc_uncorrected is None else f"{gpu.ecc_uncorrected} uncorrected ECC errors"
    retired = "not told" if gpu.retired_pages is None else gpu.retired_pages
    ecc += f", damaged rows or pages retired: {retired}"
    place = [f"NUMA node {gpu.numa_node}"] if gpu.numa_node is not None else ["NUMA node not told"]
    place += [f"near processors {gpu.near_cpus}"] if gpu.near_cpus else []
    said = f"{gpu.name} {gpu.uuid}, {memory}, {', '.join(place)}, {ecc}{', cut into MIG devices' if gpu.mig else ''}"
    if gpu.users:
        who = listed(
            f"{user.name or 'a process'} (pid {user.pid}"
            + (f", {size_text(user.memory_bytes)})" if user.memory_bytes else ")")
            for user in gpu.users
        )
        return warning(
            name, f"{said}; in use by {who}",
            "end these, ask for exclusive GPUs, or take what is left (llmpi fits a model to the free memory)", host,
        )  # fmt: skip
    if gpu.memory_bytes and gpu.free_bytes is not None and gpu.free_bytes < FREE_SHARE * gpu.memory_bytes:
        return warning(
            name, f"{said}; its memory is used by processes that are not shown (another container or user)",
            "ask for exclusive GPUs, or take what is left (llmpi fits a model to the free memory)", host,
        )  # fmt: skip
    return ok(name, f"{said}; nobody else uses it", host)


def _links(host: str, gpus: Sequence[GpuDetails]) -> list[Finding]:
    if len(gpus) < 2:
        return []
    name = {gpu.uuid: gpu.index for gpu in gpus}
    kinds: dict[str, list[str]] = {}
    for gpu in gpus:
        for peer, kind in gpu.peers.items():
            if name.get(peer, -1) > gpu.index:
                kinds.setdefault(kind, []).append(f"{gpu.index}-{name[peer]}")
    if not kinds:
        return [ok("links between GPUs", "not told", host)]
    said = "; ".join(f"{'no peer access' if kind == 'no' else kind}: {listed(pairs)}" for kind, pairs in kinds.items())
    up = {gpu.nvlinks for gpu in gpus if gpu.nvlinks is not None}
    if len(up) > 1:
        return [
            warning("links between GPUs", f"{said}; NVLinks up: {listed(f'GPU {g.index} {g.nvlinks}' for g in gpus)}",
                    "some NVLinks are down: `nvidia-smi nvlink -s`; matters for --gpus-per-rank above 1", host,
                    command="nvidia-smi nvlink -s")
        ]  # fmt: skip
    return [ok("links between GPUs", f"{said}{f'; {up.pop()} NVLinks each' if up else ''}", host)]


# ---------------------------------------------------------------- llama.cpp


def about_llama(nodes: Mapping[str, Node]) -> list[Finding]:
    findings: list[Finding] = []
    for host, node in nodes.items():
        if node.llama is not None:
            findings += _llama(host, node, node.llama)
    return merged(findings)


def about_devices(facts: Mapping[int, Facts]) -> list[Finding]:
    """What a worker may choose from, and what hides it: by the same look as a run's."""
    findings = []
    for one in facts.values():
        if not one.backend:
            continue
        host = one.host
        hides = (
            f"{listed(one.mask_variables)} hides some of them" if one.mask_variables else "nothing hides some of them"
        )
        mask = f", {host.mask[0]}={host.mask[1] or chr(39) * 2} is set" if host.mask else ""
        seen = listed(dict.fromkeys(gpu.name for gpu in host.gpus)) or "none"
        if one.backend == "CPU":
            said = "a build for the CPU: it needs none"
        elif host.gpus_known:
            said = f"{one.backend}: {len(host.gpus)} ({seen}); {hides}{mask}"
        else:
            said = f"{one.backend}: not told ({one.gpu_reason}); {hides}{mask}"
        findings.append(ok("devices", said, host.hostname))
    return merged(findings)


def install_command(*options: str) -> str:
    """Compiles and installs llama.cpp anew, with CMake options switched on."""
    flags = " ".join(f"-D{option}=ON" for option in options)
    chosen = f"CMAKE_ARGS={flags} " if flags else ""
    own = "--force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
    return f"{chosen}python -m pip install {own} '{REQUIREMENT}'"


def _llama(host: str, node: Node, build: LlamaBuild) -> list[Finding]:
    if build.problem:
        return [
            error("llama.cpp", f"it cannot be loaded: {build.problem}",
                  "install llama-cpp-python for this machine; a CUDA build needs the driver's libcuda.so.1", host,
                  command=install_command())
        ]  # fmt: skip
    kinds = tuple(name for name in build.backends if _is_gpu(name))
    findings = [
        ok("llama.cpp", f"llama-cpp-python {build.version}, built for {', '.join(build.backends) or 'nothing'}", host)
    ]
    makers = (["NVIDIA"] if node.gpus or node.nvidia_devices else []) + list(node.other_gpus)
    gpus = [device for device in build.devices if device.gpu]
    if makers and not kinds:
        backend, option = BUILDS[makers[0]]
        # Others' may be the picture's alone, a part of the processor.
        tell = error if makers[0] == "NVIDIA" else warning
        findings.append(
            tell("GPU build", f"GPU present ({', '.join(makers)}), CPU-only build: models would run on the processors",
                  f"install it for {backend} (what else it needs: docs/install.md)", host,
                  command=install_command(option))
        )  # fmt: skip
    elif makers and not gpus:
        findings.append(
            error("GPU build", f"GPU present ({', '.join(makers)}), but this build ({', '.join(kinds)}) sees no device",
                  "the driver is older than the toolkit of the build, the build is for another maker, or a mask "
                  "(CUDA_VISIBLE_DEVICES and the like) hides all", host, command=_right_build(makers[0], kinds))
        )  # fmt: skip
    elif gpus:
        findings.append(ok("GPU build", listed(f"{device.name}: {device.description}" for device in gpus), host))
    else:
        findings.append(
            ok(
                "GPU build",
                "no GPU here, and none needed" + (f" ({', '.join(kinds)} is built in)" if kinds else ""),
                host,
            )
        )
    if build.cpu_features:
        findings.append(_cpu(host, build.cpu_features))
    return findings


def _right_build(maker: str, kinds: Sequence[str]) -> str:
    backend, option = BUILDS[maker]
    return "" if any(kind.startswith(backend) for kind in kinds) else install_command(option)


def _is_gpu(backend: str) -> bool:
    return backend.startswith(GPU_BACKENDS)


def _cpu(host: str, found: Sequence[str]) -> Finding:
    x86 = any(name.startswith(("SSE", "AVX")) for name in found)
    if x86 and "AVX2" not in found:
        return warning("CPU features", f"{', '.join(found)}: no AVX2, which halves the speed or worse",
                       "compile llama.cpp on this machine instead of taking a build for all", host,
                       command=install_command("GGML_NATIVE"))  # fmt: skip
    return ok("CPU features", ", ".join(found), host)


# ---------------------------------------------------------------- pinning


def about_pinning(facts: Mapping[int, Facts], *, alone: bool) -> list[Finding]:
    """What a run with the default options would do, by the same code."""
    hosts = {rank: one.host for rank, one in facts.items()}
    try:
        if alone:
            return _placed(dict(enumerate(plan_alone(hosts[0]))), dict.fromkeys(range(64), hosts[0]), "worker", ())
        chosen = plan(hosts)
    except ConfigError as refused:
        return [error("placement", f"a run would be refused: {refused}", "start the ranks otherwise, as it says")]
    placed = _placed(chosen.placements, hosts, "rank", chosen.notes)
    coordinator = ok("rank 0", f"{hosts[0].hostname}: reads, assigns and records, and runs no engine")
    return placed if chosen.coordinator_works else [coordinator, *placed]


def _placed(
    placements: Mapping[int, Placement], hosts: Mapping[int, Host], what: str, notes: Sequence[str]
) -> list[Finding]:
    findings = []
    shown = list(placements)[:16]
    for rank in shown:
        placed = placements[rank]
        mask = " ".join(f"{name}={value or chr(39) * 2}" for name, value in placed.device_mask.items())
        findings.append(ok(f"{what} {rank}", f"{hosts[rank].hostname}: {placed.note}{f' ({mask})' if mask else ''}"))
    if len(placements) > len(shown):
        findings.append(ok(f"other {what}s", f"{len(placements) - len(shown)} more are placed likewise"))
    for note in notes:
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in note), "")
        findings.append(warning("placement", note, remedy) if remedy else ok("placement", note))
    return findings
