"""One look at the build and its devices, under the masks that are set."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduling.backends import CPU, CUDA, HIP, METAL, SYCL, VULKAN, Backend
from scheduling.messages import Gpu
from workers.devices import rocm, sycl, vulkan
from workers.devices.build import Build, installed_build
from workers.gpus import GpuInventory, inventory, load_nvml

TOOL_TIMEOUT_S = 20.0
"""For vulkaninfo and sycl-ls: drivers can hang."""

Ask = Callable[[Sequence[str], Mapping[str, str]], str]
"""What a program prints, given its command and environment. Raises OSError where it cannot be had."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What `look` found.

    `backend`: whose devices they are; CPU where the build has no other. `build`: all of the backends, and the folder
    of the libraries. `gpus`: those that this process may use under the masks that are set. `known` False: nobody could
    be asked; `gpus` then has one stand-in for whatever the backend sees, if it is one that could see anything.
    `reason`: why not known, or a remark. `variable`: what names devices for the backend; None where nothing does.
    """

    backend: Backend
    build: Build
    known: bool
    reason: str
    gpus: tuple[Gpu, ...]

    @property
    def variable(self) -> str | None:
        return next(iter(self.backend.variables), None)


def look(
    environ: Mapping[str, str],
    *,
    build: Build | None = None,
    nvml: Any | None = None,
    root: Path = Path("/"),
    ask: Ask | None = None,
) -> Devices:
    """The devices that a process with `environ` may use with the installed llama.cpp.

    A build for the CPU alone, or one that cannot be told, is looked at as one for CUDA: NVIDIA's GPUs are found, and
    the engine then says what is missing. Never raises for a machine that is odd.
    """
    build = installed_build(environ) if build is None else build
    backend = next(iter(build.backends), CPU)
    if backend in (CUDA, CPU):
        nvml = load_nvml() if nvml is None else nvml
        found = inventory(environ, nvml=nvml, sysfs=root / "sys")
        return Devices(backend, build, found.known, found.reason, found.gpus)
    found = _others(backend, environ, root, run_tool if ask is None else ask)
    gpus = found.gpus if found.known else (_all_of(backend, environ, found.reason),)
    return Devices(backend, build, found.known, found.reason, gpus)


def _others(backend: Backend, environ: Mapping[str, str], root: Path, ask: Ask) -> GpuInventory:
    try:
        if backend == HIP:
            return rocm.inventory(environ, root / "sys")
        if backend == VULKAN:
            return vulkan.inventory(environ, ask(vulkan.COMMAND, environ))
        if backend == SYCL:
            return sycl.inventory(environ, ask(sycl.COMMAND, sycl.unmasked(environ)))
    except OSError as error:
        return GpuInventory(False, str(error), ())
    assert backend == METAL, backend
    return GpuInventory(False, "Metal has no list of devices", ())


def _all_of(backend: Backend, environ: Mapping[str, str], reason: str) -> Gpu:
    """Stands for whatever the backend sees under the masks that are set: two ranks under one mask share it."""
    masks = [f"{name}={environ[name]}" for name in backend.variables if name in environ]
    return Gpu(
        uuid=" ".join([f"all-{backend.name}", *masks]),
        name=f"all that {backend.title} sees ({reason})",
        index=0,
        mask_entry=None,
    )


def run_tool(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """What `command` prints. Raises OSError if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_TIMEOUT_S
        )
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not end within {TOOL_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise OSError(f"{command[0]} failed with exit code {done.returncode}: {last[0]}")
    return done.stdout.decode("utf-8", "replace")
