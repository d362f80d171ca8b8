"""Device lists in the form in which drivers and kernels print them, cut down to what is read.

Forms and most values are those of lists that people have published, the machines are put together from them: issues of
ROCm and LocalAI for the topology (MI300X; a Radeon RX 6800 beside the graphics of a Ryzen); `vulkaninfo --summary` of
laptops in issues of Vulkan-Tools and elsewhere, ggml-vulkan.cpp for two drivers of one GPU; `sycl-ls` from SYCL.md of
llama.cpp and Intel's guides for the Max series. None was taken on a machine of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

KFD_CPU = "cpu_cores_count 96\nsimd_count 0\nmem_banks_count 1\ngfx_target_version 0\nlocation_id 0\ndomain 0\n"


def kfd_gpu(version: int, location: int, unique: int, domain: int = 0, simd: int = 1216) -> str:
    return (
        f"cpu_cores_count 0\nsimd_count {simd}\nmem_banks_count 1\ngfx_target_version {version}\nvendor_id 4098\n"
        f"device_id 29857\nlocation_id {location}\ndomain {domain}\ndrm_render_minor 128\nunique_id {unique}\n"
    )


KFD_MI300X = (
    KFD_CPU,
    KFD_CPU,
    kfd_gpu(90402, 29952, 0x21B6D61638A86F8C),
    kfd_gpu(90402, 1280, 0x1F9DE0957D137942),
    kfd_gpu(90402, 8960, 0xDEADBEEF, domain=1),
)
KFD_DESKTOP = (KFD_CPU, kfd_gpu(100300, 2816, 0x9246000000000001, simd=144), kfd_gpu(100306, 5888, 0, simd=4))
KFD_PARTITIONS = (KFD_CPU, *(kfd_gpu(90402, 29952 + part, 0x21B6D61638A86F8C) for part in range(2)))


def write_kfd(sysfs: Path, nodes: Sequence[str | None], bank_bytes: int = 206_141_652_992) -> None:
    """The topology below `sysfs`; None is a node that a device cgroup hides: its folder is there and says nothing."""
    for number, text in enumerate(nodes):
        node = sysfs / "class/kfd/kfd/topology/nodes" / str(number)
        bank = node / "mem_banks/0"
        bank.mkdir(parents=True)
        if text is not None:
            (node / "properties").write_text(text)
            heap = 0 if "simd_count 0" in text else 1
            (bank / "properties").write_text(f"heap_type {heap}\nsize_in_bytes {bank_bytes}\nflags 0\n")


def _vulkan(index: int, kind: str, name: str, uuid: str, driver: str) -> str:
    return (
        f"GPU{index}:\n\tapiVersion         = 1.4.318\n\tdeviceType         = PHYSICAL_DEVICE_TYPE_{kind}\n"
        f"\tdeviceName         = {name}\n\tdriverID           = DRIVER_ID_{driver}\n\tdeviceUUID         = {uuid}\n"
    )


_VULKAN_HEAD = (
    "==========\nVULKANINFO\n==========\n\nVulkan Instance Version: 1.4.341\n\nInstance Extensions: count = 1\n"
    "-------------------------------\nVK_KHR_surface : extension revision 25\n\nDevices:\n========\n"
)
IRIS, GEFORCE, RADEON = (
    "868088a7-0400-0000-0002-000000000000",
    "7e611089-1272-699d-8985-ab84fef4311e",
    "00000000-0500-0000-0000-000000000000",
)
_LLVMPIPE = ("CPU", "llvmpipe (LLVM 20.1.2, 256 bits)", "6d657361-3235-2e32-2e38-2d3075627500", "MESA_LLVMPIPE")
VULKAN_LAPTOP = _VULKAN_HEAD + "".join(
    _vulkan(index, *facts)
    for index, facts in enumerate(
        [
            ("INTEGRATED_GPU", "Intel(R) Graphics (RPL-S)", IRIS, "INTEL_OPEN_SOURCE_MESA"),
            ("DISCRETE_GPU", "NVIDIA GeForce RTX 4070 Laptop GPU", GEFORCE, "NVIDIA_PROPRIETARY"),
            _LLVMPIPE,
        ]
    )
)
VULKAN_TWO_DRIVERS = _VULKAN_HEAD + "".join(
    _vulkan(index, *facts)
    for index, facts in enumerate(
        [
            _LLVMPIPE,
            ("DISCRETE_GPU", "AMD Radeon RX 7900 XTX", RADEON, "AMD_OPEN_SOURCE"),
            ("DISCRETE_GPU", "AMD Radeon RX 7900 XTX (RADV NAVI31)", RADEON, "MESA_RADV"),
        ]
    )
)
VULKAN_ONLY_INTEGRATED = _VULKAN_HEAD + _vulkan(
    0, "INTEGRATED_GPU", "AMD Radeon Graphics (RADV RENOIR)", RADEON, "MESA_RADV"
)
VULKAN_ONLY_SOFTWARE = _VULKAN_HEAD + _vulkan(0, *_LLVMPIPE)

_ZE = "Intel(R) oneAPI Unified Runtime over Level-Zero, "
SYCL_ARC = (
    f"[level_zero:gpu][level_zero:0] {_ZE}Intel(R) Arc(TM) A770 Graphics 12.55.8 [1.3.29735+27]\n"
    f"[level_zero:gpu][level_zero:1] {_ZE}Intel(R) UHD Graphics 730 12.2.0 [1.3.29735+27]\n"
    "[opencl:cpu][opencl:0] Intel(R) OpenCL, 13th Gen Intel(R) Core(TM) i5-13400 OpenCL 3.0 (Build 0) [2025.20.8]\n"
    "[opencl:gpu][opencl:1] Intel(R) OpenCL Graphics, Intel(R) Arc(TM) A770 Graphics OpenCL 3.0 NEO  [24.39.31294]\n"
)
SYCL_MAX = (
    "[opencl:gpu][opencl:0] Intel(R) OpenCL Graphics, Intel(R) Data Center GPU Max 1550 OpenCL 3.0 NEO\n"
    + "".join(
        f"[level_zero:gpu][level_zero:{index}] Intel(R) Level-Zero, Intel(R) Data Center GPU Max 1550 1.3 [1.3.29735]\n"
        for index in range(4)
    )
)
SYCL_2024 = (
    "[ext_oneapi_level_zero:gpu][level_zero:0] Intel(R) Level-Zero, Intel(R) Arc(TM) A750 Graphics 1.3 [1.3.25]\n"
)
SYCL_NO_GPU = (
    "[opencl:cpu][opencl:0] Intel(R) OpenCL, Intel(R) Core(TM) i7-8750H CPU OpenCL 3.0 (Build 0) [2024.18.7]\n"
)
