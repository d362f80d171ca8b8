"""What every rank finds out about itself before it talks to the others: its model file, its host, its versions."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.config import JobConfig
from coordinator.engines import ModelFacts, engine_factory
from coordinator.modelnames import find_model
from coordinator.simulated import read_service_times
from coordinator.staging import adapter_role
from coordinator.versions import package_versions
from scheduling import messages as m
from scheduling.errors import UserError
from scheduling.link import Spoke
from scheduling.servicetime import ServiceTimes, service_times_json
from storage.adapter import check_adapter
from storage.gguf import check_gguf, fingerprint
from storage.staging import Staged, StagedModel
from workers.gpuhealth import GpuHealth
from workers.gpus import load_nvml
from workers.hosts import describe_host
from workers.protocol import Adapter
from workers.telemetry import Telemetry
from workers.worker import Worker, WorkerOptions


@dataclass(frozen=True, slots=True)
class Setup:
    """One rank's facts. `problem` is set instead of raising, so that rank 0 can name the rank that has it.

    `adapters`: a fingerprint of each, with its scale.
    """

    config: JobConfig
    model: ModelFacts
    model_name: str
    fingerprint: str
    host: m.Host
    problem: UserError | None = None
    service_times: ServiceTimes | None = None
    """Of the simulated engine, where the job asks for it."""
    adapters: tuple[str, ...] = ()
    model_digest: str | None = None
    """Of all its bytes, where the model store knows it."""
    source: str = ""
    """The file that a model was staged from; '' where it is loaded from where it is."""

    def hello(self) -> m.Hello:
        return m.Hello(
            protocol=m.PROTOCOL_VERSION, versions=package_versions(), config_digest=self.config.digest(),
            model_fingerprint="+".join((self.fingerprint, *self.adapters)), host=self.host, pid=os.getpid(),
            problem=str(self.problem) if self.problem else "",
        )  # fmt: skip


def prepare(config: JobConfig, staged: Staged | None = None) -> Setup:
    """Look at this rank's model file and host; at this node's copy, where the model was `staged`.

    Raises nothing that the user can mend: see `Setup.problem`.
    """
    host = describe_host(os.environ)
    if config.engine == "null":
        return Setup(config, ModelFacts(""), "null", "none", host)
    if config.engine == "simulated":
        return _prepare_simulated(config, Path(config.model).stem, host)
    path, name = Path(config.model), Path(config.model).stem
    try:
        copies = {} if staged is None else staged.models
        copy = copies.get("model")
        named = copy or find_model(config.model)
        path, name = named.path, named.name
        draft = None
        if config.draft_model is not None:
            draft = model_facts(str(copies["draft"].path) if "draft" in copies else config.draft_model)
        info = check_gguf(path)
        wanted = _adapters(config, copies)
        sizes = [check_adapter(Path(adapter.path), info) for adapter in wanted]
        whole = tuple(Adapter(str(Path(adapter.path).resolve()), adapter.scale) for adapter in wanted)
        facts = ModelFacts(str(path.absolute()), info.shape, whole, sum(sizes), draft)
        prints = tuple(f"{fingerprint(Path(adapter.path))}*{adapter.scale:g}" for adapter in whole)
        return Setup(
            config, facts, name, fingerprint(path), host, adapters=prints, model_digest=named.digest,
            source="" if copy is None else copy.source,
        )  # fmt: skip
    except UserError as error:
        return Setup(config, ModelFacts(str(path)), name, "none", host, error)


def _adapters(config: JobConfig, copies: Mapping[str, StagedModel]) -> list[Adapter]:
    """Where this rank finds them: the `copies`, of those that were staged."""
    found = []
    for number, adapter in enumerate(config.adapters()):
        copy = copies.get(adapter_role(number))
        found.append(adapter if copy is None else Adapter(str(copy.path), adapter.scale))
    return found


def _prepare_simulated(config: JobConfig, name: str, host: m.Host) -> Setup:
    nothing = ModelFacts(config.model)
    try:
        times = read_service_times(config)
    except UserError as error:
        return Setup(config, nothing, f"simulated-{name}", "none", host, error)
    # All ranks must simulate the same, and a run must be resumed with the same.
    digest = hashlib.sha256(service_times_json(times)).hexdigest()[:16]
    return Setup(config, nothing, f"simulated-{name}", f"simulated-{digest}", host, service_times=times)


def model_facts(model: str) -> ModelFacts:
    """Raises `UserError` if `model` is neither a readable GGUF file nor in the store."""
    path = find_model(model).path
    return ModelFacts(str(path.absolute()), check_gguf(path).shape)


def build_worker(
    setup: Setup, rank: int, spoke: Spoke, stderr_log: Path | None, clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> Worker:  # fmt: skip
    """A worker with the engine that the job asks for."""
    return Worker(
        spoke,
        WorkerOptions(
            rank=rank, hello=setup.hello(), model_name=setup.model_name, defaults=setup.config.sampling,
            engine_factory=engine_factory(setup.config, setup.model, stderr_log, setup.service_times),
            clock=clock, wall_clock=wall_clock, telemetry_factory=_telemetry,
            metrics_interval_s=setup.config.metrics_interval_s, engine_lease_s=setup.config.engine_lease_s,
            lease_s=setup.config.lease_s, request_timeout_s=setup.config.request_timeout_s,
            welcome_max_s=setup.config.welcome_max_s, health_factory=_health,
        ),
    )  # fmt: skip


def _health(placement: m.Placement) -> GpuHealth:
    return GpuHealth(load_nvml() if placement.gpu_uuids else None, placement.gpu_uuids)


def _telemetry(placement: m.Placement, engine_pid: int | None) -> Callable[[], list[tuple[Any, ...]]]:
    nvml = load_nvml() if placement.gpu_uuids else None
    telemetry = Telemetry(time.monotonic, nvml, placement.gpu_uuids, lambda: engine_pid)
    return lambda: [tuple(sample)[1:] for sample in telemetry.sample()]
