"""A run done again: every option as it was unless it is given, and refusals where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import cli
from coordinator.batch import replayed
from coordinator.batchoptions import BatchOptions
from coordinator.config import JobConfig, checked_sampling
from coordinator.inputfile import ends_identity
from coordinator.replay import _RENAMED, _SAMPLING, NOT_CONFIGURATION, read_recorded
from scheduling.errors import ConfigError, InputError, ModelFileError, RunDirError
from scheduling.requests import Sampling

CONFIG = JobConfig(
    model="models/m.gguf", max_tokens=16, slots=3, loras=("a.gguf:0.5",), seed=5, draft_model="d.gguf",
    sampling=checked_sampling(temperature=0.5, logit_bias={"7": 1.5}, json_schema={"type": "object"}),
)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    given = tmp_path / "in.jsonl"
    given.write_text('{"prompt": "x"}\n')
    identity = ends_identity(given, "jsonl")
    path = tmp_path / "run"
    path.mkdir()
    details = {
        "config": msgspec.to_builtins(CONFIG), "input": str(given), "model": "/models/m.gguf", "cwd": "/home/one",
        "batch": {"format": None, "columns": {}, "ranks": 2}, "input_identity": {**identity, "sha256": "abc"},
    }  # fmt: skip
    state = {
        "format": "llmpi-run", "version": 1, "complete": True, "total": 1, "details": details, "sessions": [],
        "identity": {"model": "print", "adapters": ["ad*0.5"], "input": identity},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(state))
    return path


def edit(run_dir: Path, **changes: Any) -> None:
    """Give run.json other values, by dotted name; None takes one away."""
    state = json.loads((run_dir / "run.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        place = state
        for key in path:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    (run_dir / "run.json").write_text(json.dumps(state))


def options(tmp_path: Path) -> BatchOptions:
    return BatchOptions(input=Path("in"), output=tmp_path / "new")


def test_without_options_everything_is_as_it_was(run_dir: Path, tmp_path: Path) -> None:
    config, made = replayed(run_dir, {}, options(tmp_path), frozenset({"replay", "output"}))
    whole = {"model": "/models/m.gguf", "loras": ("/home/one/a.gguf:0.5",), "draft_model": "/home/one/d.gguf"}
    assert config == msgspec.structs.replace(CONFIG, **whole)
    assert (made.input, made.format, made.ranks) == (tmp_path / "in.jsonl", "jsonl", 2)
    assert made.replay is not None
    made.replay.check("print", ("ad*0.5",))


@pytest.mark.parametrize(
    ("names", "given", "changed"),
    [
        ({"max_tokens"}, JobConfig(model="", max_tokens=512), {"max_tokens": 512}),
        ({"slots", "lease"}, JobConfig(model="", slots=9, lease_s=3.0, seed=8), {"slots": 9, "lease_s": 3.0}),
        ({"lora"}, JobConfig(model="", loras=("b",)), {"loras": ("b",)}),
        ({"cache_type"}, JobConfig(model="", cache_type_k="q8_0"), {"cache_type_k": "q8_0"}),
        (
            {"temperature"},
            JobConfig(model="", sampling=Sampling(temperature=1.0, top_k=4)),
            {"sampling": msgspec.structs.replace(CONFIG.sampling, temperature=1.0)},
        ),
        (
            {"grammar_file"},
            JobConfig(model=""),
            {"sampling": msgspec.structs.replace(CONFIG.sampling, constraint=None)},
        ),
    ],
)
def test_what_is_given_replaces_what_was_also_with_a_default(
    run_dir: Path, names: set[str], given: JobConfig, changed: dict[str, Any]
) -> None:
    recorded = read_recorded(run_dir)
    assert recorded.job(msgspec.structs.asdict(given), names) == msgspec.structs.replace(recorded.config, **changed)


def test_an_option_is_checked_with_what_the_run_was_and_not_with_the_defaults(run_dir: Path) -> None:
    edit(run_dir, details__config=msgspec.to_builtins(CONFIG) | {"engine": "simulated", "draft_model": None})
    alone = {"time_scale": 0.5}
    assert read_recorded(run_dir).job(alone, {"time_scale"}).time_scale == 0.5
    with pytest.raises(ConfigError, match="are for --engine simulated"):
        read_recorded(run_dir).job(alone | {"engine": "llama"}, {"time_scale", "engine"})


def test_every_option_of_batch_decides_a_known_field_or_none() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["batch"]  # type: ignore[attr-defined]
    names = {parameter.name for parameter in command.params} - {"help"} - NOT_CONFIGURATION
    fields = set(JobConfig.__struct_fields__)
    assert {name for name in names if name not in fields and name not in _RENAMED and name not in _SAMPLING} == set()
    assert {name for renamed in _RENAMED.values() for name in renamed} <= fields
    assert set(_SAMPLING.values()) <= set(Sampling.__struct_fields__)


def test_models_of_the_store_are_asked_of_the_store_again(run_dir: Path) -> None:
    """A blob's path would lose the model's name, and what is said where the store has it no more."""
    edit(run_dir, details__model_digest="sha256:" + "0" * 64, details__config__draft_model="drafts/small:q4")
    config = read_recorded(run_dir).config
    assert (config.model, config.draft_model) == ("sha256:" + "0" * 64, "drafts/small:q4")


@pytest.mark.parametrize("name", ["details__cwd", "details__config", "details__batch", "identity__model"])
def test_a_run_that_does_not_say_enough_is_refused(run_dir: Path, name: str) -> None:
    edit(run_dir, **{name: None})
    with pytest.raises(RunDirError, match=f"lacks {name.replace('__', '.')}"):
        read_recorded(run_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"details__config__unheard_of": 1}, "no option unheard_of"),
        ({"details__config__sampling": {"unheard_of": 1}}, "no sampling parameter unheard_of"),
        ({"details__config__max_tokens": -3}, "--max-tokens is -3"),
        ({"details__config__max_tokens": "many"}, "max_tokens"),
        ({"details__batch": {"format": None}}, "'ranks'"),
    ],
)
def test_a_run_json_of_another_version_is_refused(run_dir: Path, changes: dict[str, Any], words: str) -> None:
    edit(run_dir, **changes)
    with pytest.raises(RunDirError, match="cannot be used to do the run again") as caught:
        read_recorded(run_dir)
    assert words in str(caught.value)


def test_a_changed_input_is_refused_unless_it_is_given(run_dir: Path, tmp_path: Path) -> None:
    recorded = read_recorded(run_dir)
    expected = recorded.expected(frozenset())
    (tmp_path / "in.jsonl").write_text('{"prompt": "y"}\n')
    with pytest.raises(InputError, match="its content is another"):
        expected.check("print", ("ad*0.5",))
    (tmp_path / "in.jsonl").write_text('{"prompt": "longer"}\n')
    with pytest.raises(InputError, match="it had 16 bytes and has 21"):
        expected.check("print", ("ad*0.5",))
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot be used again: .*in\.jsonl does not exist"):
        expected.check("print", ("ad*0.5",))
    recorded.expected(frozenset({"requests"})).check("print", ("ad*0.5",))


def test_a_change_in_the_middle_is_seen_when_all_of_it_was_read(run_dir: Path) -> None:
    expected = read_recorded(run_dir).expected(frozenset())
    expected.check_content({"bytes": 16, "sha256": "abc"})
    with pytest.raises(InputError, match="its content is another"):
        expected.check_content({"bytes": 16, "sha256": "abd"})


@pytest.mark.parametrize(
    ("fingerprint", "adapter", "what"), [("other", "ad*0.5", "model"), ("print", "ad*1", "adapters")]
)
def test_another_model_is_refused_unless_it_is_given(run_dir: Path, fingerprint: str, adapter: str, what: str) -> None:
    recorded = read_recorded(run_dir)
    with pytest.raises(ModelFileError, match=f"the {what} of .* changed"):
        recorded.expected(frozenset()).check(fingerprint, (adapter,))
    recorded.expected(frozenset({"model"})).check(fingerprint, (adapter,))


def test_what_was_converted_is_taken_from_the_run(run_dir: Path) -> None:
    (run_dir / "requests.jsonl").write_text('{"prompt": "x"}\n')
    identity = ends_identity(run_dir / "requests.jsonl", "jsonl")
    edit(run_dir, identity__input={**identity, "source": {"path": "-"}}, details__input="-")
    recorded = read_recorded(run_dir)
    assert (recorded.input, recorded.format) == (run_dir / "requests.jsonl", "jsonl")
    recorded.expected(frozenset()).check("print", ("ad*0.5",))
    with pytest.raises(InputError, match="--prompt-column with --replay needs -i"):
        recorded.expected(frozenset({"prompt_column"}))


def test_a_run_is_not_replayed_into_itself(run_dir: Path) -> None:
    same = BatchOptions(input=Path("in"), output=run_dir / ".." / "run")
    with pytest.raises(RunDirError, match="give another run directory"):
        replayed(run_dir, {}, same, frozenset())
