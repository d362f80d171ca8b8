"""What one rank finds out about itself. Whatever may not answer (file systems, drivers) is asked in a thread, with an
end: then it is `unanswered`, and the rest is told all the same."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from coordinator.doctor.about_files import RUN_DIR, STAGING, STORE
from coordinator.doctor.facts import ENVIRONMENT, Facts, Limits, ModelFile, Node, Place
from coordinator.doctor.probe_files import look_at
from coordinator.modelnames import find_model
from coordinator.versions import package_versions
from scheduling.backends import CPU
from scheduling.errors import UserError
from scheduling.messages import Host
from storage.gguf import check_gguf, fingerprint
from storage.modelstore import default_root
from storage.stagedir import candidates
from workers.devices import look
from workers.gpudetails import Survey, survey
from workers.gpus import GpuInventory, load_nvml
from workers.hosts import describe_host
from workers.llama_build import LlamaBuild, ask_build
from workers.supervisor import engine_environment

PROBE_S = 30.0
OTHER_MAKERS = {"0x1002": "AMD", "0x8086": "Intel"}

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line. `patience_s`: for one probe."""

    model: str | None = None
    run_dir: Path | None = None
    stage_dir: str | None = None
    quick: bool = False
    patience_s: float = PROBE_S


class Probe(threading.Thread, Generic[T]):
    """Runs `look` beside us."""

    def __init__(self, look: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._look = look
        self._found: list[T] = []
        self._error = ""
        self._began_s = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            self._found.append(self._look())
        except Exception as error:  # what is asked here is what may be broken
            self._error = f"{type(error).__name__}: {error}"

    def result(self, otherwise: T, patience_s: float) -> tuple[T, str]:
        """What was found, and why not. The patience is from the probe's start: those that hang, hang together."""
        self.join(max(0.0, self._began_s + patience_s - time.monotonic()))
        if self._found:
            return self._found[0], ""
        return otherwise, self._error or f"no answer within {patience_s:.0f} s"


def gather(rank: int, options: Options, environ: Mapping[str, str] = os.environ) -> Facts:
    """This rank's facts; those of its node too if it is the first one there."""
    unanswered: dict[str, str] = {}

    def wait(name: str, probe: Probe[Any], otherwise: Any) -> Any:
        found, why = probe.result(otherwise, options.patience_s)
        if why:
            unanswered[name] = why
        return found

    nvml = load_nvml()
    seen = wait("GPUs", Probe(lambda: look(environ, nvml=nvml)), None)
    if seen is None:
        host, backend, variables, reason = describe_host(environ, gpus=GpuInventory(False, "", ())), "", (), ""
    else:
        backends = tuple(one.name for one in seen.build.backends if one != CPU)
        gpus = GpuInventory(seen.known, seen.reason, seen.gpus)
        host = describe_host(environ, gpus=gpus, backends=backends)
        backend, variables, reason = seen.backend.title, seen.backend.variables, seen.reason
    name = options.model
    model = None if name is None else Probe(lambda: look_at_model(name, environ))
    node = _node(nvml, host, options, environ, wait) if not host.local_rank else None
    return Facts(
        rank=rank, pid=os.getpid(), host=host, gpu_reason=reason, backend=backend,
        mask_variables=variables, python=platform.python_version(),
        versions={"python": platform.python_version(), **package_versions()}, bound_cpus=_bound(),
        environ={name: value for name, value in environ.items() if name.startswith(ENVIRONMENT)},
        model=None if model is None else wait("model", model, ModelFile(problem="it could not be read in time")),
        node=node, unanswered=unanswered,
    )  # fmt: skip


def _node(
    nvml: object, host: Host, options: Options, environ: Mapping[str, str],
    wait: Callable[[str, Probe[Any], Any], Any],
) -> Node:  # fmt: skip
    """The first rank of a host looks for all."""
    seen = Probe(lambda: survey(nvml))
    build = Probe(lambda: ask_build(engine_environment(environ, {}), options.patience_s))
    places = [(use, path, Probe(lambda use=use, path=path: _look(use, path, options)))  # type: ignore[misc]
              for use, path in _places(options, environ)]  # fmt: skip
    found: Survey = wait("GPU details", seen, Survey())
    told: LlamaBuild = wait("llama.cpp", build, LlamaBuild(problem="it did not load in time"))
    looked: list[Place] = [
        wait(use, probe, Place(use=use, path=str(path), problem=f"no answer within {options.patience_s:.0f} s"))
        for use, path, probe in places
    ]
    return Node(
        gpus=found.gpus, driver=found.driver, cuda_driver=found.cuda_driver, other_gpus=other_gpus(),
        nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))), llama=told, places=tuple(looked),
        limits=limits(environ),
    )  # fmt: skip


def _places(options: Options, environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    staging = next((one for one in candidates(options.stage_dir, environ)), None)
    return [
        *([(RUN_DIR, options.run_dir)] if options.run_dir is not None else [(RUN_DIR, Path.cwd())]),
        (STORE, default_root(environ)),
        *([(STAGING, staging)] if staging is not None else []),
    ]


def _look(use: str, path: Path, options: Options) -> Place:
    return look_at(use, path, speed=not options.quick)


def look_at_model(model: str, environ: Mapping[str, str]) -> ModelFile:
    """Raises nothing that the user can mend: see `ModelFile.problem`."""
    try:
        path = find_model(model, environ).path
        check_gguf(path)
        return ModelFile(path=str(path.absolute()), fingerprint=fingerprint(path), size_bytes=path.stat().st_size)
    except (UserError, OSError) as error:
        return ModelFile(path=model, problem=str(error))


def other_gpus(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """Makers of GPUs that the kernel has render nodes for, NVIDIA left out. Intel's in a processor count too."""
    found = []
    for card in sorted((sysfs / "class/drm").glob("renderD*/device/vendor")):
        try:
            found.append(OTHER_MAKERS.get(card.read_text().strip(), ""))
        except OSError:
            continue
    return tuple(dict.fromkeys(filter(None, found)))


def limits(environ: Mapping[str, str], shm: Path = Path("/dev/shm"), sysfs: Path = Path("/sys")) -> Limits:
    def soft(kind: int) -> int:
        value = resource.getrlimit(kind)[0]
        return -1 if value == resource.RLIM_INFINITY else value

    try:
        memory = shutil.disk_usage(shm)
    except OSError:
        memory = None
    home = environ.get("HOME", "")
    return Limits(
        open_files=soft(resource.RLIMIT_NOFILE), locked_memory_bytes=soft(resource.RLIMIT_MEMLOCK),
        shm_bytes=None if memory is None else memory.total, shm_free_bytes=None if memory is None else memory.free,
        rdma=any((sysfs / "class/infiniband").glob("*")), home=home,
        home_writable=bool(home) and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK),
    )  # fmt: skip


def _bound() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS
        return 0
