"""From a job's options, the model and a placement to the engine of one worker.

Options left open are chosen here, by simple arithmetic over the model's own numbers and the device's memory, the same
on every rank with the same facts. A chosen value is stored with the run as it was used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from coordinator.config import JobConfig
from coordinator.simulated import simulated_engine
from scheduling.errors import ConfigError
from scheduling.messages import Gpu, Placement
from scheduling.servicetime import ServiceTimes
from workers.null_engine import NullEngine
from workers.port import Engine
from workers.protocol import EngineConfig
from workers.speculation import SLOTS_MAX as SPECULATION_SLOTS_MAX

CTX_DEFAULT_TOKENS = 4096
SLOTS_GPU = 128
SLOTS_CPU = 8
CONTEXTS_GPU = 2
SLOTS_OF_A_CONTEXT_MAX = 256
"""LLAMA_MAX_SEQ."""
GPU_RESERVE_BYTES = 2 << 30
"""Left free on a GPU beside model and caches: compute buffers of each context, and the driver's own."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the choice needs of a model. `kv_bytes_per_token` None where the file does not tell. `draft`: the model
    that drafts for it, if there is one."""

    path: str
    size_bytes: int
    train_ctx_tokens: int | None
    kv_bytes_per_token: int | None
    draft: ModelFacts | None = None


def engine_config(config: JobConfig, model: ModelFacts, placement: Placement, gpus: dict[str, Gpu]) -> EngineConfig:
    """The engine of one worker. `gpus` are those of its host, by UUID."""
    on_gpu = bool(placement.gpu_uuids)
    ctx = config.ctx or min(model.train_ctx_tokens or CTX_DEFAULT_TOKENS, CTX_DEFAULT_TOKENS)
    slots = config.slots or (fitting_slots(config, model, placement, gpus, ctx) if on_gpu else SLOTS_CPU)
    contexts = chosen_contexts(config, slots, CONTEXTS_GPU if on_gpu else 1)
    threads = config.threads or placement.threads
    if "generate" in placement.lanes:
        refuse_what_cannot_fit(config, model, placement, gpus, slots, ctx)
    return EngineConfig(
        model=model.path, slots=slots, contexts=contexts, ctx_tokens=ctx, batch_tokens=config.batch,
        ubatch_tokens=min(config.ubatch, config.batch), threads=threads,
        sampling_threads=min(8, max(1, threads // contexts)) if on_gpu else 1,
        gpu_layers=config.gpu_layers if on_gpu else 0, flash_attention=config.flash_attention,
        prefix_reuse=config.prefix_reuse, speculate="auto" if config.speculate else "never",
        draft_model=model.draft.path if model.draft is not None else None, draft_max=config.draft_max,
        cpus=placement.cpus, device_mask=placement.device_mask, max_tokens_default=config.max_tokens,
        chat_template=config.chat_template, pooling=config.pooling, lanes_at_start=placement.lanes,
    )  # fmt: skip


def chosen_contexts(config: JobConfig, slots: int, usual: int) -> int:
    """How many contexts the slots are divided among. Raises ConfigError if those asked for cannot hold them."""
    needed = -(-slots // SLOTS_OF_A_CONTEXT_MAX)
    if config.contexts is not None and config.contexts < needed:
        raise ConfigError(
            f"--slots {slots} with --contexts {config.contexts}: llama.cpp has at most {SLOTS_OF_A_CONTEXT_MAX} "
            f"sequences in a context; use --contexts {needed} or more"
        )
    return min(slots, config.contexts or max(usual, needed))


def draft_bytes(model: ModelFacts, slots: int, contexts: int, ctx_tokens: int) -> int:
    """What the model that drafts takes: itself, and caches for the few sequences of each context that it drafts for."""
    if model.draft is None:
        return 0
    sequences = contexts * min(-(-slots // contexts), SPECULATION_SLOTS_MAX)
    return model.draft.size_bytes + sequences * ctx_tokens * (model.draft.kv_bytes_per_token or 0)


def refuse_what_cannot_fit(
    config: JobConfig, model: ModelFacts, placement: Placement, gpus: dict[str, Gpu], slots: int, ctx_tokens: int
) -> None:
    """Refuse caches that exceed the whole memory, before an engine fills it and is killed.

    Raises:
        ConfigError: with the arithmetic, and what would fit.
    """
    if model.kv_bytes_per_token is None:
        return
    if placement.gpu_uuids and config.gpu_layers != 0:
        sizes = [gpus[uuid].memory_bytes for uuid in placement.gpu_uuids if uuid in gpus]
        memory = None if None in sizes or not sizes else sum(size for size in sizes if size is not None)
        what = "GPU memory"
    else:
        memory, what = psutil.virtual_memory().total, "memory"
    needed = slots * ctx_tokens * model.kv_bytes_per_token
    if memory is None or needed <= memory or (what == "GPU memory" and config.gpu_layers > 0):
        return
    fits = memory // (slots * model.kv_bytes_per_token)
    raise ConfigError(
        f"{slots} slots of {ctx_tokens} tokens need {needed / 1e9:,.0f} GB for their caches, and there are "
        f"{memory / 1e9:,.0f} GB of {what}: use --ctx {fits} or less, or fewer --slots"
    )


def fitting_slots(
    config: JobConfig, model: ModelFacts, placement: Placement, gpus: dict[str, Gpu], ctx_tokens: int
) -> int:
    """How many slots of `ctx_tokens` fit beside the model in the memory of the placement's GPUs, at most 128."""
    sizes = [gpus[uuid].memory_bytes for uuid in placement.gpu_uuids if uuid in gpus]
    known = [size for size in sizes if size is not None]
    if not known or model.kv_bytes_per_token is None:
        return SLOTS_GPU
    share = sum(known) // config.ranks_per_gpu
    free = share - model.size_bytes - GPU_RESERVE_BYTES
    free -= draft_bytes(model, SLOTS_GPU, config.contexts or CONTEXTS_GPU, ctx_tokens)
    return max(1, min(SLOTS_GPU, free // (model.kv_bytes_per_token * ctx_tokens)))


def engine_factory(
    config: JobConfig,
    model: ModelFacts,
    gpus: dict[str, Gpu],
    stderr_log: Path | None,
    service_times: ServiceTimes | None = None,
) -> Callable[[Placement], Engine]:
    """What a worker calls to get its engine, at its start and after each death. Simulated with `service_times`."""

    def start(placement: Placement) -> Engine:
        if config.engine == "null":
            return NullEngine(config.slots or SLOTS_GPU, config.null_answer_bytes)
        from workers.supervisor import EngineProcess

        if service_times is not None:
            return EngineProcess(simulated_engine(config, service_times, placement), log_path=stderr_log)
        return EngineProcess(engine_config(config, model, placement, gpus), log_path=stderr_log)

    return start
