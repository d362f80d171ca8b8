"""Which backend the build has, and what `look` makes of its devices: fake library folders, fake kernels and tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from scheduling.backends import BACKENDS, CPU, CUDA, HIP, METAL, SYCL, VULKAN
from tests.workers.device_lists import KFD_MI300X, SYCL_ARC, VULKAN_LAPTOP, write_kfd
from tests.workers.fake_nvml import FakeGpu, FakeNvml
from workers.devices import look
from workers.devices.build import Build, build_in, installed_build
from workers.devices.look import run_tool
from workers.hosts import describe_host

BASE = ("libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu.so")


def _folder(at: Path, *names: str) -> Path:
    for name in (*BASE, *names):
        (at / name).touch()
    return at


def _build(*names: str) -> Build:
    return Build((*(BACKENDS[name] for name in names), CPU), Path("/nowhere"))


def _says(text: str) -> object:
    def ask(command: Sequence[str], environ: Mapping[str, str]) -> str:
        return text

    return ask


def _missing(command: Sequence[str], environ: Mapping[str, str]) -> str:
    raise OSError(f"{command[0]} is not installed")


@pytest.mark.parametrize(
    ("libraries", "backends"),
    [
        ((), ("cpu",)),
        (("libggml-cuda.so", "libggml-cuda.so.0"), ("cuda", "cpu")),
        (("libggml-hip.so",), ("hip", "cpu")),
        (("libggml-vulkan.so",), ("vulkan", "cpu")),
        (("libggml-sycl.so",), ("sycl", "cpu")),
        (("libggml-metal.dylib", "libggml-blas.dylib"), ("metal", "cpu")),
        # What is made for the device comes before what is made for all.
        (("libggml-vulkan.so", "libggml-cuda.so"), ("cuda", "vulkan", "cpu")),
        (("libggml-rpc.so", "libggml-blas.so"), ("cpu",)),
    ],
)
def test_the_libraries_tell_the_backends(libraries: tuple[str, ...], backends: tuple[str, ...], tmp_path: Path) -> None:
    assert tuple(backend.name for backend in build_in(_folder(tmp_path, *libraries)).backends) == backends


def test_a_build_with_a_variant_for_each_processor_is_one_for_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "libggml-cpu-haswell.so").touch()
    assert build_in(tmp_path).backends == (CPU,)


def test_a_build_in_one_file_is_unknown_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").touch()
    assert build_in(tmp_path).backends == ()
    assert "cannot be told" in build_in(tmp_path).reason
    assert "cannot be read" in build_in(tmp_path / "none").reason


def test_the_folder_that_the_user_chose_is_looked_at(tmp_path: Path) -> None:
    _folder(tmp_path, "libggml-vulkan.so")
    assert installed_build({"LLAMA_CPP_LIB_PATH": str(tmp_path)}).backends == (VULKAN, CPU)


def test_the_installed_build_is_found_without_loading_it() -> None:
    found = installed_build({})
    assert found.backends[-1:] == (CPU,)
    assert found.folder is not None
    assert (found.folder / "libllama.so").exists()


@pytest.mark.parametrize("build", [_build("cuda"), _build(), Build((), None, "unknown")])
def test_nvml_is_asked_for_cuda_and_where_the_build_has_no_devices(build: Build, tmp_path: Path) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", bus="00000000:06:00.0"), FakeGpu("GPU-b", bus="00000000:07:00.0")])
    found = look({"CUDA_VISIBLE_DEVICES": "1"}, build=build, nvml=nvml, root=tmp_path)
    assert ([gpu.uuid for gpu in found.gpus], found.known) == (["GPU-b"], True)
    assert found.backend == (CUDA if build.backends[:1] == (CUDA,) else CPU)


def test_rocm_is_read_from_the_kernel(tmp_path: Path) -> None:
    write_kfd(tmp_path / "sys", KFD_MI300X)
    found = look({"ROCR_VISIBLE_DEVICES": "1"}, build=_build("hip"), root=tmp_path, ask=_missing)
    assert (found.backend, found.known, found.variable) == (HIP, True, "ROCR_VISIBLE_DEVICES")
    assert [gpu.index for gpu in found.gpus] == [1]


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("vulkan", VULKAN_LAPTOP, ["NVIDIA GeForce RTX 4070 Laptop GPU"]),
        ("sycl", SYCL_ARC, ["Intel(R) Arc(TM) A770 Graphics", "Intel(R) UHD Graphics 730"]),
    ],
)
def test_drivers_programs_are_asked(name: str, text: str, names: list[str], tmp_path: Path) -> None:
    found = look({}, build=_build(name), root=tmp_path, ask=_says(text))  # type: ignore[arg-type]
    assert ([gpu.name for gpu in found.gpus], found.known) == (names, True)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (HIP, "No such file"),
        (VULKAN, "vulkaninfo is not installed"),
        (SYCL, "sycl-ls is not installed"),
        (METAL, "no list"),
    ],
)
def test_without_a_list_one_stands_for_all_and_says_why(backend: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    found = look({}, build=_build(backend.name), root=tmp_path, ask=_missing)  # type: ignore[attr-defined]
    assert not found.known
    (gpu,) = found.gpus
    assert reason in found.reason
    assert reason in gpu.name
    assert (gpu.mask_entry, gpu.memory_bytes) == (None, None)


def test_ranks_that_see_different_devices_do_not_share_the_one_that_stands_for_all(tmp_path: Path) -> None:
    def uuid(**environ: str) -> str:
        return look(environ, build=_build("sycl"), root=tmp_path, ask=_missing).gpus[0].uuid

    assert uuid(ZE_AFFINITY_MASK="0") != uuid(ZE_AFFINITY_MASK="1")
    assert uuid(ZE_AFFINITY_MASK="0") == uuid(ZE_AFFINITY_MASK="0", CUDA_VISIBLE_DEVICES="3")


def test_all_devices_are_listed_whatever_the_masks_are(tmp_path: Path) -> None:
    asked: list[Mapping[str, str]] = []

    def ask(command: Sequence[str], environ: Mapping[str, str]) -> str:
        asked.append(environ)
        return SYCL_ARC

    look({"ZE_AFFINITY_MASK": "1", "PATH": "/bin"}, build=_build("sycl"), root=tmp_path, ask=ask)
    assert asked == [{"PATH": "/bin"}]


def test_a_host_says_whose_devices_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kfd(tmp_path / "sys", KFD_MI300X)
    libraries = tmp_path / "lib"
    libraries.mkdir()
    _folder(libraries, "libggml-hip.so", "libggml-vulkan.so")
    # Slurm writes its list into every vendor's variable: that of the build is the one that counts.
    masks = {"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0", "LLAMA_CPP_LIB_PATH": str(libraries)}
    host = describe_host(masks, root=tmp_path)
    assert (host.backends, host.gpus_known) == (("hip", "vulkan"), True)
    assert host.mask == ("ROCR_VISIBLE_DEVICES", "0")
    assert len(host.gpus) == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [(("llmpi-no-such-program",), "is not installed"), (("sh", "-c", "echo why >&2; exit 3"), "exit code 3: why")],
)
def test_a_program_that_cannot_be_asked_is_a_reason(command: tuple[str, ...], reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        run_tool(command, {"PATH": "/usr/bin:/bin"})
    assert run_tool(("sh", "-c", "echo $A"), {"PATH": "/usr/bin:/bin", "A": "7"}) == "7\n"
