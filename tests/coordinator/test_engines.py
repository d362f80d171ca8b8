"""The engine of each worker, from what was asked for, the model, the hosts and the placements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from coordinator.config import JobConfig
from coordinator.engines import ModelFacts, engine_config, fitted_placements
from scheduling.errors import BugError, ConfigError
from scheduling.lengths import Lengths
from scheduling.messages import Gpu, Host, Placement
from tests.scheduling.shapes import B1, B70, llama
from workers.protocol import Adapter, EngineConfig

GB = 10**9
MODEL = ModelFacts("/m.gguf", B1)
LENGTHS = Lengths(2000, {1: 2000}, 256, whole=True)
CPU = Placement(cpus=(0, 1), threads=2)


def on_gpu(*uuids: str, threads: int = 16) -> Placement:
    return Placement(gpu_uuids=uuids, device_mask={"CUDA_VISIBLE_DEVICES": ",".join(uuids)}, threads=threads)


def host(name: str = "here", *, memory: float = 256, **free: float) -> Host:
    gpus = tuple(
        Gpu(uuid=uuid, name="a GPU", index=index, memory_bytes=200 * GB, free_bytes=int(size * GB))
        for index, (uuid, size) in enumerate(free.items())
    )
    return Host(hostname=name, gpus=gpus, memory_bytes=int(memory * GB))


def engine(
    placement: Placement, where: Host | None = None, *, model: ModelFacts = MODEL, **options: Any
) -> EngineConfig:
    config = JobConfig(model="m.gguf", **options)
    found, _ = fitted_placements(config, model, {0: placement}, {0: where or host(a=80, b=80)}, LENGTHS)
    return engine_config(config, model, found[0])


def test_what_is_left_open_is_chosen_by_device() -> None:
    gpu, cpu = engine(on_gpu("a")), engine(CPU)
    assert (gpu.slots, gpu.contexts, gpu.ctx_tokens, gpu.gpu_layers, gpu.ubatch_tokens) == (1024, 4, 256, -1, 2048)
    assert (cpu.slots, cpu.contexts, cpu.ctx_tokens, cpu.gpu_layers, cpu.ubatch_tokens) == (8, 1, 256, 0, 512)


def test_a_large_gpu_that_is_nearly_full_is_left_alone() -> None:
    """What CUDA takes on it by itself is known from its whole memory."""
    assert engine(on_gpu("a"), host(a=1)).gpu_layers == 0
    assert 0 < engine(on_gpu("a"), host(a=1.6)).gpu_layers < B1.offloadable


def test_what_only_embeds_needs_no_memory_for_slots() -> None:
    placement = Placement(lanes=("embed",), threads=2)
    config = JobConfig(model="m.gguf", slots=4096, ctx=1 << 20, pooling="last")
    fitted, _ = fitted_placements(config, MODEL, {0: placement}, {0: host()}, None, embeds_only=True)
    made = engine_config(config, MODEL, fitted[0])
    assert (made.lanes_at_start, made.pooling) == (("embed",), "last")
    with pytest.raises(ConfigError):
        fitted_placements(config, MODEL, {0: placement}, {0: host()}, None)


@pytest.mark.parametrize(("longest", "ctx", "held"), [(900, "auto", 900), (9000, "auto", 4096), (900, 256, 0)])
def test_inputs_to_embed_may_be_longer_than_slots_unless_ctx_says_so(longest: int, ctx: int | str, held: int) -> None:
    config = JobConfig(model="m.gguf", ctx=ctx)  # type: ignore[arg-type]
    lengths = replace(LENGTHS, input_tokens=longest)
    found, _ = fitted_placements(config, MODEL, {0: CPU}, {0: host()}, lengths)
    made = engine_config(config, MODEL, found[0])
    assert (made.ctx_tokens, made.input_tokens) == (256, held)


def test_slots_leave_room_for_a_model_that_drafts() -> None:
    model = replace(MODEL, draft=ModelFacts("/d.gguf", B1))
    assert engine(on_gpu("a"), host(a=8), model=model).slots < engine(on_gpu("a"), host(a=8)).slots
    assert engine(CPU, host(memory=8), model=model).slots == engine(CPU, host(memory=8)).slots == 8


def test_speculation_is_decided_by_the_engine_unless_it_is_switched_off() -> None:
    asked = engine(CPU, model=replace(MODEL, draft=ModelFacts("/models/d.gguf", B1)), draft_max=5)
    assert (asked.speculate, asked.draft_model, asked.draft_max) == ("auto", "/models/d.gguf", 5)
    assert (engine(CPU, speculate=False).speculate, engine(CPU).draft_model) == ("never", None)


@pytest.mark.parametrize(
    ("options", "sampling_threads"), [({"contexts": 2}, 1), ({}, 1), ({"slots": 1}, 4), ({"slots": 1, "threads": 2}, 2)]
)
def test_choosing_threads_do_not_stand_in_each_others_way(options: dict[str, Any], sampling_threads: int) -> None:
    assert engine(on_gpu("a"), **options).sampling_threads == sampling_threads
    assert engine(CPU, **options).sampling_threads == 1


def test_tokens_are_chosen_on_the_gpu_unless_it_is_switched_off() -> None:
    assert (engine(on_gpu("a")).sample_on, engine(on_gpu("a"), gpu_sampling=False).sample_on) == ("auto", "host")
    small = host(a=4)
    assert engine(on_gpu("a"), small, gpu_sampling=False).slots > engine(on_gpu("a"), small).slots


def test_options_of_llama_cpp_reach_the_engine() -> None:
    adapters = (Adapter("/a.gguf", 0.5),)
    config = engine(
        on_gpu("a", "b"), model=ModelFacts("/m.gguf", B1, adapters, 1000), gpus_per_rank=2, split="row",
        cache_type_k="q8_0", rope_scaling="yarn", rope_scale=2.0, rope_freq_base=1e6,
    )  # fmt: skip
    assert (config.loras, config.split, config.cache_type_k, config.cache_type_v) == (adapters, "row", "q8_0", "f16")
    assert (config.rope_scaling, config.rope_scale, config.rope_freq_base) == ("yarn", 2.0, 1e6)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, None),
        ({"flash_attention": False}, False),
        ({"cache_type_k": "q8_0"}, None),
        ({"cache_type_v": "q4_0"}, True),
        ({"gpus_per_rank": 2, "split": "tensor"}, True),
    ],
)
def test_flash_attention_is_chosen_where_something_needs_it(options: dict[str, Any], chosen: bool | None) -> None:
    assert engine(on_gpu("a", "b"), **options).flash_attention is chosen


def test_a_cache_whose_blocks_do_not_divide_the_heads_is_refused() -> None:
    odd = ModelFacts("/m.gguf", llama(2, 64, 128, 4, 2))
    with pytest.raises(ConfigError, match="this model's heads have 16"):
        engine(CPU, model=odd, cache_type_k="q8_0")
    with pytest.raises(ConfigError, match=r"--cache-type-v q4_0: .* the draft model's heads have 16"):
        engine(CPU, model=replace(MODEL, draft=odd), cache_type_v="q4_0")


def test_a_gpu_that_is_too_small_is_hidden_from_the_engine() -> None:
    config = engine(on_gpu("a"), host(a=1), model=ModelFacts("/m.gguf", B70))
    assert (config.gpu_layers, config.device_mask) == (0, {"CUDA_VISIBLE_DEVICES": ""})
    kept = engine(on_gpu("a"), host(a=80), gpu_layers=0)
    assert (kept.gpu_layers, kept.device_mask) == (0, {"CUDA_VISIBLE_DEVICES": "a"})


def test_an_engine_without_a_gpu_is_told_so_where_no_mask_hides_devices() -> None:
    on_metal = Placement(gpu_uuids=("all-metal",), backend="metal", threads=2)
    assert engine(on_metal, host()).use_devices
    beside = msgspec.structs.replace(on_metal, gpu_uuids=())
    assert not engine(beside, host()).use_devices
    assert engine(CPU).use_devices


def said(placements: dict[int, Placement], hosts: dict[int, Host], **options: Any) -> list[str]:
    return fitted_placements(JobConfig(model="m", **options), MODEL, placements, hosts, LENGTHS)[1]


def test_workers_alike_are_told_of_once() -> None:
    both = host(a=80, b=80)
    [line] = said({1: on_gpu("a"), 2: on_gpu("b")}, {1: both, 2: both})
    assert line.startswith("GPU 80.0 GB free")
    lines = said({1: on_gpu("a"), 2: on_gpu("b"), 3: on_gpu("c")}, {1: host(a=80), 2: host(b=40), 3: host("far", c=80)})
    assert [line.split(":")[0] for line in lines] == ["rank 1, 3", "rank 2"]


def test_free_memory_is_divided_among_those_who_share_it() -> None:
    shared = host(a=80)
    [line] = said({1: on_gpu("a"), 2: on_gpu("a")}, {1: shared, 2: shared})
    assert "80.0 GB free / 2 ranks" in line
    [line] = said({1: CPU, 2: CPU}, {1: host(memory=16), 2: host(memory=16)})
    assert "memory 16.0 GB free / 2 ranks" in line
    [line] = said({1: on_gpu("a"), 2: on_gpu("a")}, {1: host("one", a=80), 2: host("other", a=80)})
    assert "80.0 GB free -" in line


def test_a_context_beyond_what_the_model_was_trained_with_is_spoken_of() -> None:
    where = {0: host(a=80)}
    lines = said({0: on_gpu("a")}, where, ctx=200_000, slots=1)
    assert "--rope-scaling" in lines[-1]
    assert len(said({0: on_gpu("a")}, where, ctx=200_000, slots=1, rope_scaling="yarn", rope_scale=2.0)) == 1


def test_what_has_no_model_has_no_size() -> None:
    config = JobConfig(model="m", engine="null")
    found, lines = fitted_placements(config, ModelFacts(""), {0: CPU}, {0: host()}, None)
    assert (found, lines) == ({0: CPU}, [])
    with pytest.raises(BugError):
        engine_config(config, ModelFacts(""), CPU)
