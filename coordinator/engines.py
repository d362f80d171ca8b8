"""From a job's options, the model, the hosts and the requests to the engine of each worker.

Rank 0 decides for all: it knows what every rank has free (`Host`), who shares what (`Placement`) and how long the
requests are (`Lengths`); `scheduling.fitting` does the arithmetic. What was decided travels in `Placement.fit`, is
printed, and is stored with the run as it was used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from coordinator.config import JobConfig
from coordinator.simulated import simulated_engine
from scheduling.backends import CUDA, hide_all
from scheduling.errors import BugError, ConfigError
from scheduling.fitting import CTX_UNKNOWN_TOKENS, SLOTS_CPU, UBATCH_CPU, Fit, Room, fit
from scheduling.lengths import Lengths
from scheduling.messages import Host, Placement
from scheduling.modelsize import Ask, ModelShape
from scheduling.servicetime import ServiceTimes
from workers.null_engine import NullEngine
from workers.port import Engine
from workers.protocol import Adapter, EngineConfig

SLOTS_NULL = 128
QUANTISED_TOGETHER = 32
"""Values of a head that a quantised cache keeps in one block."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of the model on this rank. `shape` None: there is no model. Paths are whole. `draft`: the model
    that drafts for it, if there is one."""

    path: str
    shape: ModelShape | None = None
    adapters: tuple[Adapter, ...] = ()
    adapter_bytes: int = 0
    draft: ModelFacts | None = None


def fitted_placements(
    config: JobConfig,
    model: ModelFacts,
    placements: Mapping[int, Placement],
    hosts: Mapping[int, Host],
    lengths: Lengths | None,
    *,
    embeds_only: bool = False,
) -> tuple[dict[int, Placement], list[str]]:
    """`placements` with what each worker's engine is to be, and what to tell people about it. `hosts`: of each worker.
    `embeds_only`: engines have no slots until something is to be generated.

    Raises:
        ConfigError: it cannot fit; nothing has been loaded.
    """
    if model.shape is None:
        return dict(placements), []
    check_caches(config, model.shape, "this model")
    if model.draft is not None and model.draft.shape is not None:
        check_caches(config, model.draft.shape, "the draft model")
    if embeds_only:
        plain = embedding_fit(config, model.shape)
        return {rank: msgspec.structs.replace(one, fit=plain) for rank, one in placements.items()}, []
    ask = ask_of(config, model)
    if lengths is not None:
        most = min(lengths.input_tokens, CTX_UNKNOWN_TOKENS)
        ask = replace(ask, scores=lengths.scores, input_tokens=most)
    inputs = input_tokens(model.shape, lengths) if ask.ctx_tokens is None else 0
    fitted = {}
    for rank, placement in placements.items():
        room = room_of(rank, placements, hosts)
        chosen = msgspec.structs.replace(fit(model.shape, ask, room, lengths), input_tokens=inputs)
        fitted[rank] = msgspec.structs.replace(placement, fit=chosen)
    return fitted, [*_said(fitted), *_warnings(config, model.shape)]


def embedding_fit(config: JobConfig, shape: ModelShape) -> Fit:
    """An engine that embeds: the model whole, batches without caches."""
    layers, trained = _number(config.gpu_layers), shape.train_ctx_tokens or CTX_UNKNOWN_TOKENS
    return Fit(
        slots=_number(config.slots) or SLOTS_CPU, contexts=config.contexts or 1,
        ctx_tokens=_number(config.ctx) or min(trained, CTX_UNKNOWN_TOKENS), gpu_layers=-1 if layers is None else layers,
        ubatch_tokens=config.ubatch or UBATCH_CPU,
    )  # fmt: skip


def input_tokens(shape: ModelShape, lengths: Lengths | None) -> int:
    """What the longest input of a file takes that asks for embeddings among other things: it is in no slot. No more
    than if it were a file of embeddings alone."""
    if lengths is None:
        return 0
    return min(lengths.input_tokens, shape.train_ctx_tokens or CTX_UNKNOWN_TOKENS, CTX_UNKNOWN_TOKENS)


def check_caches(config: JobConfig, shape: ModelShape, whose: str) -> None:
    """Raises ConfigError, which names `whose` they are, if a cache's type does not go with the model's heads."""
    for flag, kind, length in (
        ("--cache-type-k", config.cache_type_k, shape.key_length),
        ("--cache-type-v", config.cache_type_v, shape.value_length),
    ):
        if kind != "f16" and length % QUANTISED_TOGETHER:
            raise ConfigError(
                f"{flag} {kind}: it keeps {QUANTISED_TOGETHER} values in a block, and {whose}'s heads have "
                f"{length}; use f16"
            )


def ask_of(config: JobConfig, model: ModelFacts) -> Ask:
    """What the options leave open, and what they do not."""
    ask = Ask(
        slots=_number(config.slots), ctx_tokens=_number(config.ctx), contexts=config.contexts,
        gpu_layers=_number(config.gpu_layers), ubatch_tokens=config.ubatch, batch_tokens=config.batch,
        type_k=config.cache_type_k, type_v=config.cache_type_v, flash=config.flash_attention is not False,
        rope_factor=config.rope_scale or 1.0, split=config.split, adapter_bytes=model.adapter_bytes,
        gpu_sampling=config.gpu_sampling,
    )  # fmt: skip
    draft = None if model.draft is None else model.draft.shape
    if draft is None:
        return ask
    return replace(
        ask, draft_weight_bytes=draft.weight_bytes, draft_token_bytes=draft.token_bytes(ask.type_k, ask.type_v)
    )


def room_of(rank: int, placements: Mapping[int, Placement], hosts: Mapping[int, Host]) -> Room:
    """The memory that a worker finds, and how many share it."""
    placement, name = placements[rank], hosts[rank].hostname
    beside = [other for other in placements if hosts[other].hostname == name]
    gpus = {gpu.uuid: gpu for other in beside for gpu in hosts[other].gpus}
    mine = [gpus.get(uuid) for uuid in placement.gpu_uuids]
    sharing = [sum(uuid in placements[other].gpu_uuids for other in beside) for uuid in placement.gpu_uuids]
    return Room(
        gpu_bytes=tuple(None if gpu is None else gpu.free_bytes for gpu in mine),
        gpu_total_bytes=tuple(None if gpu is None else gpu.memory_bytes for gpu in mine),
        gpu_ranks=max(sharing, default=1),
        host_bytes=hosts[rank].memory_bytes, host_ranks=len(beside), workers=len(placements),
    )  # fmt: skip


def engine_config(config: JobConfig, model: ModelFacts, placement: Placement) -> EngineConfig:
    """The engine of one worker, which has its fit."""
    fitted = placement.fit
    if fitted is None:
        raise BugError(f"a placement without a fit: {placement.note}")
    on_gpu = bool(placement.gpu_uuids) and (fitted.gpu_layers != 0 or config.gpu_layers == 0)
    # A GPU that is too small for a single layer would be used for prompts all the same, and might not hold even that.
    mask = placement.device_mask if on_gpu else hide_all(placement.device_mask)
    threads = config.threads or placement.threads
    return EngineConfig(
        model=model.path, slots=fitted.slots, contexts=fitted.contexts, ctx_tokens=fitted.ctx_tokens,
        long_slots=fitted.long_slots, long_ctx_tokens=fitted.long_ctx_tokens,
        input_tokens=fitted.input_tokens, batch_tokens=config.batch,
        ubatch_tokens=min(fitted.ubatch_tokens, config.batch), threads=threads,
        sampling_threads=min(4, threads) if on_gpu and fitted.contexts == 1 else 1,
        gpu_layers=fitted.gpu_layers if on_gpu else 0, flash_attention=_flash_attention(config),
        cache_type_k=config.cache_type_k, cache_type_v=config.cache_type_v, loras=model.adapters,
        rope_scaling=config.rope_scaling, rope_scale=config.rope_scale, rope_freq_base=config.rope_freq_base,
        split=config.split, tensor_split=fitted.tensor_split, cpus=placement.cpus, device_mask=mask,
        use_devices=on_gpu or placement.backend == CUDA.name,
        max_tokens_default=config.max_tokens, chat_template=config.chat_template, prefix_reuse=config.prefix_reuse,
        sample_on="auto" if config.gpu_sampling else "host",
        constraint=config.sampling.constraint if "generate" in placement.lanes else None,
        speculate="auto" if config.speculate else "never",
        draft_model=model.draft.path if model.draft is not None else None, draft_max=config.draft_max,
        pooling=config.pooling, lanes_at_start=placement.lanes,
    )  # fmt: skip


def engine_factory(
    config: JobConfig, model: ModelFacts, stderr_log: Path | None, service_times: ServiceTimes | None = None
) -> Callable[[Placement], Engine]:
    """What a worker calls to get its engine, at its start and after each death. Simulated with `service_times`."""

    def start(placement: Placement) -> Engine:
        if config.engine == "null":
            return NullEngine(_number(config.slots) or SLOTS_NULL, config.null_answer_bytes)
        from workers.supervisor import EngineProcess

        if service_times is not None:
            return EngineProcess(simulated_engine(config, service_times, placement), log_path=stderr_log)
        return EngineProcess(engine_config(config, model, placement), log_path=stderr_log)

    return start


def _flash_attention(config: JobConfig) -> bool | None:
    """Chosen where something needs it, so that llama.cpp does not choose otherwise."""
    if config.cache_type_v != "f16" or config.split == "tensor":
        return True
    return config.flash_attention


def _said(fitted: Mapping[int, Placement]) -> list[str]:
    """One line where all workers have the same, else one for each kind."""
    ranks: dict[str, list[int]] = {}
    for rank, placement in fitted.items():
        ranks.setdefault(_text(placement.fit), []).append(rank)
    if len(ranks) == 1:
        return list(ranks)
    return [f"rank {', '.join(map(str, who))}: {said}" for said, who in ranks.items()]


def _text(fitted: Fit | None) -> str:
    return "" if fitted is None else fitted.said


def _warnings(config: JobConfig, shape: ModelShape) -> list[str]:
    asked, trained = _number(config.ctx), shape.train_ctx_tokens
    if asked is None or trained is None or asked <= trained * (config.rope_scale or 1.0):
        return []
    if config.rope_scaling is not None or config.rope_freq_base is not None:
        return []
    return [
        f"--ctx {asked} is more than the {trained} tokens that the model was trained with: answers beyond them will be "
        "poor without --rope-scaling"
    ]


def _number(value: int | str | None) -> int | None:
    """None for 'auto'."""
    return value if isinstance(value, int) else None
