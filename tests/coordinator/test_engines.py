"""The engine of a worker, from what was asked for, the model and the placement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.config import JobConfig
from coordinator.engines import GPU_RESERVE_BYTES, ModelFacts, draft_bytes, engine_config
from scheduling.errors import ConfigError
from scheduling.messages import Gpu, Placement
from workers.protocol import EngineConfig

KV_BYTES = 1 << 15
MODEL = ModelFacts("m.gguf", 1 << 30, 8192, KV_BYTES)
GPU_BYTES = 80 << 30
ON_GPU = Placement(gpu_uuids=("GPU-7",), device_mask={"CUDA_VISIBLE_DEVICES": "GPU-7"}, cpus=(0, 1), threads=16)
ON_CPU = Placement(gpu_uuids=(), device_mask={}, cpus=(0, 1), threads=2)


def engine(
    placement: Placement, *, model: ModelFacts = MODEL, gpu_bytes: int = GPU_BYTES, **options: Any
) -> EngineConfig:
    gpu = Gpu(uuid="GPU-7", name="a GPU", index=0, memory_bytes=gpu_bytes)
    return engine_config(JobConfig(model="m.gguf", **options), model, placement, {"GPU-7": gpu})


def test_what_is_left_open_is_chosen_by_device() -> None:
    gpu, cpu = engine(ON_GPU), engine(ON_CPU)
    assert (gpu.slots, gpu.contexts, gpu.ctx_tokens, gpu.gpu_layers) == (128, 2, 4096, -1)
    assert (cpu.slots, cpu.contexts, cpu.ctx_tokens, cpu.gpu_layers, cpu.threads) == (8, 1, 4096, 0, 2)
    assert engine(ON_CPU, model=ModelFacts("m.gguf", 1, 512, None)).ctx_tokens == 512


def test_what_only_embeds_needs_no_memory_for_slots() -> None:
    placement = Placement(lanes=("embed",), threads=2)
    config = engine(placement, slots=4096, ctx=1 << 20, pooling="last")
    assert (config.lanes_at_start, config.pooling) == (("embed",), "last")
    with pytest.raises(ConfigError, match="for their caches"):
        engine(Placement(threads=2), slots=4096, ctx=1 << 20)


def test_slots_are_as_many_as_fit_beside_the_model() -> None:
    memory = MODEL.size_bytes + GPU_RESERVE_BYTES + 10 * 4096 * KV_BYTES + 5
    assert engine(ON_GPU, gpu_bytes=memory).slots == 10
    assert engine(ON_GPU, gpu_bytes=memory, ctx=1024).slots == 40


def test_slots_leave_room_for_a_model_that_drafts() -> None:
    draft = ModelFacts("d.gguf", 1 << 28, 8192, KV_BYTES // 4)
    model = replace(MODEL, draft=draft)
    assert draft_bytes(MODEL, 128, 2, 4096) == 0
    assert draft_bytes(model, 128, 2, 4096) == (1 << 28) + 2 * 8 * 4096 * KV_BYTES // 4
    assert draft_bytes(model, 3, 1, 4096) == (1 << 28) + 3 * 4096 * KV_BYTES // 4
    memory = MODEL.size_bytes + GPU_RESERVE_BYTES + draft_bytes(model, 128, 2, 4096) + 10 * 4096 * KV_BYTES
    assert engine(ON_GPU, gpu_bytes=memory).slots > 10
    assert engine(ON_GPU, model=model, gpu_bytes=memory).slots == 10


def test_speculation_is_decided_by_the_engine_unless_it_is_switched_off() -> None:
    draft = ModelFacts("/models/d.gguf", 1 << 28, 8192, KV_BYTES // 4)
    asked = engine(ON_CPU, model=replace(MODEL, draft=draft), draft_max=5)
    assert (asked.speculate, asked.draft_model, asked.draft_max) == ("auto", "/models/d.gguf", 5)
    assert (engine(ON_CPU, speculate=False).speculate, engine(ON_CPU).draft_model) == ("never", None)


@pytest.mark.parametrize(
    ("options", "contexts", "sampling_threads"),
    [
        ({}, 2, 8),
        ({"contexts": 4}, 4, 4),
        ({"contexts": 32}, 32, 1),
        ({"slots": 1}, 1, 8),
        ({"slots": 3, "contexts": 8}, 3, 5),
        ({"slots": 600, "ctx": 256}, 3, 5),
        ({"threads": 1}, 2, 1),
    ],
)
def test_slots_and_threads_are_divided_among_contexts(
    options: dict[str, Any], contexts: int, sampling_threads: int
) -> None:
    config = engine(ON_GPU, **options)
    assert (config.contexts, config.sampling_threads) == (contexts, sampling_threads)


@pytest.mark.parametrize("placement", [ON_GPU, ON_CPU], ids=["GPU", "CPU"])
def test_more_slots_than_contexts_can_hold_are_refused_with_the_way_out(placement: Placement) -> None:
    with pytest.raises(ConfigError, match="--contexts 3 or more"):
        engine(placement, slots=513, contexts=2, ctx=256)


def test_caches_that_cannot_fit_are_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"use --ctx \d+ or less"):
        engine(ON_GPU, slots=128, ctx=1 << 20)
