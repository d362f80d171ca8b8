"""A run done once more: what `llmpi batch --replay RUN_DIR` takes from run.json, and what must not have changed.

Every option is as it was, unless it is given again. The input is the recorded one (or `requests.jsonl` in RUN_DIR,
where it had been converted), and must be what it was byte for byte; so must model and adapters. What is given again is
meant to differ and not compared. What differed afterwards `coordinator.compare` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coordinator.config import JobConfig
from coordinator.inputfile import ends_identity, same_input
from coordinator.modelnames import whole_name
from coordinator.slicing.slices import Slice, parse_slice
from scheduling.errors import InputError, LlmpiError, ModelFileError, RunDirError
from scheduling.requests import Sampling
from storage.rundir import REQUESTS_NAME
from storage.runjson import RUN_NAME, read_run

_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "stop")} | {
    "json_schema": "constraint",
    "grammar_file": "constraint",
}
"""Options of `llmpi batch` by the field of `Sampling` that they decide."""
_RENAMED = {
    "lease": ("lease_s",), "rank0_lease": ("rank0_lease_s",), "commit_interval": ("commit_interval_s",),
    "lora": ("loras",), "metrics_interval": ("metrics_interval_s",), "engine_lease": ("engine_lease_s",),
    "request_timeout": ("request_timeout_s",),
    "cache_type": ("cache_type_k", "cache_type_v"),
}  # fmt: skip
"""Options whose field of `JobConfig` has another name."""
NOT_CONFIGURATION = frozenset(
    ("requests", "output", "part", "hostfile", "ranks", "drain_timeout", "time_limit", "on_limit", "input_format",
     "prompt_column", "template", "id_column", "show", "quiet", "as_json", "replay")
)  # fmt: skip
"""Options of `llmpi batch` that are no part of `JobConfig`."""
_OF_MODEL = frozenset(("model", "engine", "service_times", "time_scale", "lora"))
_OF_INPUT = ("input_format", "prompt_column", "template", "id_column", "part")


@dataclass(frozen=True, slots=True)
class Replay:
    """What the run in `run_dir` was, for a job that does it again. None: given anew, so that it may differ."""

    run_dir: Path
    input: Path | None
    input_identity: Mapping[str, Any] | None
    model: tuple[str, tuple[str, ...]] | None
    """Fingerprints of the model and of its adapters."""

    def check(self, fingerprint: str, adapters: tuple[str, ...]) -> None:
        """Raises ModelFileError or InputError where model or input are not what they were."""
        if self.model is not None and self.model != (fingerprint, adapters):
            what = "model" if self.model[0] != fingerprint else "adapters"
            raise ModelFileError(
                f"the {what} of {self.run_dir} changed since: the fingerprint was {_short(self.model, what)} and is "
                f"{_short((fingerprint, adapters), what)}; restore it, or give -m (and --lora) to have it differ"
            )
        if self.input is None or self.input_identity is None:
            return
        try:
            found = ends_identity(self.input, self.input_identity.get("format", "jsonl"))
        except InputError as error:
            raise InputError(f"the input of {self.run_dir} cannot be used again: {error}") from None
        self.check_content(found)

    def check_content(self, found: Mapping[str, Any]) -> None:
        """Raises InputError where the input's identity is not what it was. Only what both know of is compared."""
        before = self.input_identity
        if before is None or same_input(dict(before), dict(found)):
            return
        sizes = before.get("bytes"), found.get("bytes")
        why = f"it had {sizes[0]:,} bytes and has {sizes[1]:,}" if sizes[0] != sizes[1] else "its content is another"
        raise InputError(
            f"{self.input} was changed since {self.run_dir} was run on it ({why}): restore it, or give -i to run on "
            "what there is"
        )


def _short(model: tuple[str, tuple[str, ...]], what: str) -> str:
    return model[0] if what == "model" else (", ".join(model[1]) or "none")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run's own account of what it was asked to do, from run.json. Paths are whole."""

    run_dir: Path
    config: JobConfig
    input: Path
    format: str | None
    ranks: int | None
    input_identity: Mapping[str, Any]
    model: tuple[str, tuple[str, ...]]
    part: Slice | None = None

    def job(self, given: Mapping[str, Any], names: Set[str]) -> JobConfig:
        """The recorded configuration with the fields of `given` that the options `names` decide."""
        changes: dict[str, Any] = {}
        sampling: dict[str, Any] = {}
        for name in names - NOT_CONFIGURATION:
            if name in _SAMPLING:
                sampling[_SAMPLING[name]] = getattr(given["sampling"], _SAMPLING[name])
                continue
            for field in _RENAMED.get(name, (name,)):
                changes[field] = given[field]
        if sampling:
            changes["sampling"] = msgspec.structs.replace(self.config.sampling, **sampling)
        return msgspec.structs.replace(self.config, **changes)

    def expected(self, names: Set[str]) -> Replay:
        """What has to be as it was where the options `names` are given anew.

        Raises InputError for options that say how an input is written, without an input.
        """
        anew = "requests" in names
        if not anew and (alone := [name for name in _OF_INPUT if name in names]):
            flag = {"input_format": "--format", "part": "--slice"}.get(alone[0], "--" + alone[0].replace("_", "-"))
            raise InputError(f"{flag} with --replay needs -i: the requests are taken as {self.run_dir} had them")
        return Replay(
            self.run_dir, None if anew else self.input, None if anew else self.input_identity,
            None if names & _OF_MODEL else self.model,
        )  # fmt: skip


def read_recorded(run_dir: Path) -> Recorded:
    """What the run in `run_dir` was asked to do.

    Raises RunDirError: there is no run, or its run.json does not say enough to do it again.
    """
    state = read_run(run_dir)
    details, identity = state["details"], state["identity"]
    file = run_dir / RUN_NAME
    lacks = [f"details.{key}" for key in ("config", "input", "model", "cwd", "batch") if not details.get(key)]
    lacks += [f"identity.{key}" for key in ("input", "model") if not identity.get(key)]
    if lacks:
        raise RunDirError(
            f"{file} lacks {', '.join(lacks)}, without which the run cannot be done again; it was no `llmpi batch`, or "
            "one of an older version: give its command anew"
        )
    try:
        config = _config(details, Path(details["cwd"]))
        batch = details["batch"]
        converted = "source" in identity["input"]
        known = dict(details.get("input_identity") or {}) | dict(identity["input"])
        known.pop("source", None)
        part = known.pop("slice", None)
        return Recorded(
            run_dir=run_dir,
            config=config,
            input=run_dir / REQUESTS_NAME if converted else Path(details["input"]),
            format="jsonl" if converted else known["format"],
            ranks=batch["ranks"],
            input_identity=known,
            model=(identity["model"], tuple(identity.get("adapters") or ())),
            part=None if part is None else parse_slice(part),
        )
    except (KeyError, TypeError, AttributeError, ValueError, msgspec.MsgspecError) as error:
        raise RunDirError(f"{file} cannot be used to do the run again: {_said(error)}") from None
    except LlmpiError as error:
        raise RunDirError(f"{file} cannot be used to do the run again: {error}") from None


def _said(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _config(details: Mapping[str, Any], cwd: Path) -> JobConfig:
    """The recorded configuration, its paths whole."""
    plain = dict(details["config"])
    unknown = sorted(plain.keys() - set(JobConfig.__struct_fields__))
    if unknown:
        raise ValueError(f"this version has no option {', '.join(unknown)}; use the llmpi that ran it")
    if unknown := sorted(plain.get("sampling", {}).keys() - set(Sampling.__struct_fields__)):
        raise ValueError(f"this version has no sampling parameter {', '.join(unknown)}; use the llmpi that ran it")
    config = msgspec.convert(plain, JobConfig, str_keys=True)
    whole = {
        # By its digest a model of the store is found under any name, and is missed in words that say what to do.
        "model": details.get("model_digest") or details["model"] if config.engine == "llama" else config.model,
        "loras": tuple(_whole_adapter(text, cwd) for text in config.loras),
    }
    whole["service_times"] = None if config.service_times is None else str(cwd / config.service_times)
    whole["draft_model"] = None if config.draft_model is None else whole_name(config.draft_model, cwd)
    return msgspec.structs.replace(config, **whole)


def _whole_adapter(text: str, cwd: Path) -> str:
    return str(cwd / text)  # a scale at its end stays there
