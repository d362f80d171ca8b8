"""A job on the simulated engine: its service times, and the engine of one worker made from them.

What was not asked for is as it was measured: slots, contexts, the context's size. Times hold for as many contexts as
worked together when they were taken, so another number is refused.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.config import JobConfig
from scheduling.errors import ConfigError
from scheduling.messages import Placement
from scheduling.servicetime import EXAMPLE, ServiceTimes, parse_service_times
from workers.protocol import EngineConfig

WARNING = "the engine was simulated: times are those of its service times, and the answers mean nothing"


def read_service_times(config: JobConfig) -> ServiceTimes:
    """The times that the job asks for, `--time-scale` applied. Raises ConfigError if the file cannot be used."""
    return _as_measured(config).scaled(config.time_scale)


def _as_measured(config: JobConfig) -> ServiceTimes:
    if config.service_times is None:
        return EXAMPLE
    path = Path(config.service_times)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--service-times {path}: {error.strerror or error}") from None
    return parse_service_times(data, f"--service-times {path}")


def simulated_engine(config: JobConfig, times: ServiceTimes, placement: Placement) -> EngineConfig:
    """The simulated engine of one worker. Raises ConfigError for contexts that were not measured."""
    measured = times.measured
    if config.contexts is not None and config.contexts != measured.contexts:
        raise ConfigError(
            f"--contexts {config.contexts}: the service times were measured with {measured.contexts} at once, and hold "
            "for no other number; leave it out, or measure again with `llmpi bench engine --calibrate --contexts "
            f"{config.contexts}`"
        )
    slots = config.slots if isinstance(config.slots, int) else measured.slots
    ctx = config.ctx if isinstance(config.ctx, int) else measured.ctx_tokens
    return EngineConfig(
        model=config.model, slots=slots, contexts=min(slots, measured.contexts),
        ctx_tokens=ctx, batch_tokens=config.batch, ubatch_tokens=config.ubatch or measured.ubatch_tokens,
        # Its text means nothing, so how much of it can be guessed means nothing either.
        speculate="never", cpus=placement.cpus, max_tokens_default=config.max_tokens,
        chat_template=config.chat_template, prefix_reuse=config.prefix_reuse, service_times=times,
    )  # fmt: skip
