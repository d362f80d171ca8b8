"""A job's options: refused when they cannot be, equal on all ranks, stored with the run."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.config import JobConfig, checked_sampling
from scheduling.constraints import Constraint
from scheduling.errors import ConfigError
from scheduling.requests import Sampling
from scheduling.wireform import MAX_TOKENS_LIMIT
from workers.protocol import Adapter

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"schedule": "fastest"}, "work-stealing"),
        ({"draft_model": "m\udcff.gguf"}, "--draft-model is m.*not UTF-8"),
        ({"loras": ("a\udcff.gguf",)}, "--lora is a.*not UTF-8"),
        ({"slots": 0}, "--slots"),
        ({"slots": 4097}, "4096"),
        ({"contexts": -1}, "--contexts"),
        ({"ctx": 0}, "--ctx"),
        ({"batch": 0}, "--batch"),
        ({"ubatch": 0}, "--ubatch"),
        ({"threads": 0}, "--threads"),
        ({"gpus_per_rank": 0}, "--gpus-per-rank"),
        ({"gpu_layers": -2}, "--gpu-layers"),
        ({"ranks_per_gpu": 0}, "--ranks-per-gpu"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"max_tokens": MAX_TOKENS_LIMIT + 1}, str(MAX_TOKENS_LIMIT)),
        ({"draft_model": "m.gguf", "engine": "simulated"}, "not for --engine simulated"),
        ({"draft_max": 0}, "--draft-max"),
        ({"draft_max": 32}, "the most that is accepted is 31"),
        ({"draft_model": "m.gguf", "speculate": False}, "leave out one of them"),
        ({"prefetch": -1}, "--prefetch"),
        ({"copies": True, "schedule": "round-robin"}, "--copies needs --schedule work-stealing"),
        ({"commit_bytes": 0}, "--commit-bytes"),
        ({"commit_interval_s": 0.0}, "--commit-interval"),
        ({"lease_s": -1.0}, "--lease"),
        ({"lease_s": NAN}, "--lease"),
        ({"lease_s": 1.5}, "--lease is 1.5: it must be 2 or more"),
        ({"rope_scale": 2.0}, "--rope-scaling"),
        ({"rope_scaling": "none", "rope_scale": 2.0}, "--rope-scaling"),
        ({"rope_scaling": "yarn", "rope_scale": 0.0}, "--rope-scale"),
        ({"rope_freq_base": NAN}, "--rope-freq-base"),
        ({"flash_attention": False, "cache_type_v": "q8_0"}, "--cache-type-k"),
        ({"split": "row"}, "--gpus-per-rank"),
        ({"split": "tensor", "gpus_per_rank": 2, "flash_attention": False}, "--split tensor"),
        ({"loras": ("a.gguf:much",)}, "--lora a.gguf:much"),
        ({"loras": ("a.gguf:inf",)}, "PATH:SCALE"),
        ({"loras": (":1",)}, "--lora :1"),
    ],
)
def test_option_out_of_range_is_refused_by_its_flag(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        JobConfig(model="m", **options)


def test_who_asks_for_several_gpus_wants_them() -> None:
    assert JobConfig(model="m").want_gpu is None
    assert JobConfig(model="m", gpus_per_rank=2).want_gpu is True
    assert JobConfig(model="m", gpus_per_rank=2, device="cpu").want_gpu is False


@pytest.mark.parametrize(
    ("schedule", "copies", "made"),
    [("work-stealing", None, True), ("work-stealing", False, False), ("round-robin", None, False)],
)
def test_copies_are_made_where_work_is_stolen(schedule: str, copies: bool | None, made: bool) -> None:
    assert JobConfig(model="m", schedule=schedule, copies=copies).makes_copies is made


def test_defaults_are_valid() -> None:
    config = JobConfig(model="m")
    assert config.schedule == "work-stealing"
    assert msgspec.json.decode(msgspec.json.encode(config), type=JobConfig) == config


def test_digest_is_the_same_for_the_same_options_and_differs_otherwise() -> None:
    config = JobConfig(model="m", sampling=Sampling(temperature=0.5, logit_bias={3: 1.0, 1: 2.0}))
    same = JobConfig(model="m", sampling=Sampling(temperature=0.5, logit_bias={1: 2.0, 3: 1.0}))
    assert config.digest() == same.digest()
    assert len(config.digest()) == 16
    changed = [msgspec.structs.replace(config, **change) for change in ({"slots": 3}, {"seed": 1}, {"model": "n"})]
    assert len({config.digest(), *(other.digest() for other in changed)}) == 4


def test_what_decides_the_answers_is_the_identity_and_nothing_else() -> None:
    config = JobConfig(model="m")
    alike = JobConfig(model="elsewhere/m", schedule="round-robin", slots=3, threads=2, ranks_per_gpu=2, lease_s=5.0)
    assert config.identity() == alike.identity()
    changes: list[dict[str, Any]] = [{"ctx": 99}, {"seed": 1}, {"max_tokens": 3}, {"chat_template": "x"}]
    changes += [{"cache_type_k": "q8_0"}, {"rope_freq_base": 1e6}, {"rope_scaling": "linear", "rope_scale": 2.0}]
    for change in [*changes, {"sampling": Sampling(top_k=1)}]:
        assert JobConfig(model="m", **change).identity() != config.identity()


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.5", "a.gguf", 0.5),
        ("a.gguf:-1", "a.gguf", -1.0),
        ("/x:1/a.gguf", "/x:1/a.gguf", 1.0),
        ("v:2.gguf", "v:2.gguf", 1.0),
        ("/x:1/a:b:0", "/x:1/a:b", 0.0),
    ],
)
def test_an_adapter_is_a_path_and_perhaps_a_scale(text: str, path: str, scale: float) -> None:
    assert JobConfig(model="m", loras=(text,)).adapters() == (Adapter(path, scale),)


def test_sampling_of_the_command_line_is_held_to_a_requests_limits() -> None:
    assert checked_sampling(temperature=0.5, top_k=3) == Sampling(temperature=0.5, top_k=3)


def test_grammars_and_schemas_can_be_a_runs_defaults() -> None:
    schema = Sampling(constraint=Constraint("schema", '{"type":"object"}'))
    assert checked_sampling(json_schema={"type": "object"}, grammar=None) == schema
    assert checked_sampling(response_format={"type": "json_object"}) == schema
    assert checked_sampling(grammar='root ::= "a"').constraint == Constraint("grammar", 'root ::= "a"')
    assert JobConfig(model="m", sampling=schema).identity() != JobConfig(model="m").identity()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.5}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
        ({"top_k": -5}, "--top-k"),
        ({"temprature": 1.0}, "temprature"),
        ({"grammar": "root ::= x"}, "--grammar-file: grammar, line 1, column 10"),
        ({"json_schema": {"x-guidance": {}}}, "--json-schema"),
        ({"json_schema": {"const": object()}}, "cannot be written as JSON"),
        ({"response_format": {"type": "json_schema"}}, "--response-format"),
    ],
)
def test_sampling_out_of_range_is_refused_by_its_flag(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        checked_sampling(**values)


@pytest.mark.parametrize(
    ("options", "expected_s"), [({}, 600.0), ({"lease_s": 120.0}, 1200.0), ({"rank0_lease_s": 5.0}, 5.0)]
)
def test_rank_0_may_be_silent_for_ten_leases_and_at_least_ten_minutes(
    options: dict[str, float], expected_s: float
) -> None:
    assert JobConfig(model="m", **options).rank0_silence_max_s == expected_s  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.0, 4.9, -1.0, float("nan")])
def test_rank_0_must_have_time_to_say_that_it_is_there(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--rank0-lease"):
        JobConfig(model="m", rank0_lease_s=seconds)
