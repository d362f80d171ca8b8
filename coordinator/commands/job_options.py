"""Options of a job that several commands take, other than its engine's: what is answered how, where models are kept on
nodes, when it stops, and what is simulated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coordinator.commands.groups import OptionGroup
from coordinator.commands.parameters import StageDir
from coordinator.commands.sections import ANSWERS, MODEL, SIMULATION, STOPPING, section
from coordinator.values import held_to, read_text

if TYPE_CHECKING:
    from coordinator.timekeeper import StopOptions
    from scheduling.requests import Sampling

_of_answers = section(ANSWERS)
_of_model = section(MODEL)
_of_stopping = section(STOPPING)
_of_simulation = section(SIMULATION)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup):
    """How tokens are chosen."""

    temperature: Annotated[float, typer.Option(help="For requests that do not say; 0 is greedy.")] = 1.0
    top_k: Annotated[int, _of_answers(help="For requests that do not say; 0 is off.")] = 0
    top_p: Annotated[float, _of_answers(help="For requests that do not say; 1 is off.")] = 1.0
    min_p: Annotated[float, _of_answers(help="For requests that do not say; 0 is off.")] = 0.0

    def sampling(self) -> Sampling:
        """Raises `ConfigError` for a value that a request may not have either."""
        from coordinator.config import checked_sampling

        return checked_sampling(**self._parameters())

    def _parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    def job(self) -> dict[str, Any]:
        return {"sampling": self.sampling()}


GREEDY = SamplingOptions(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class RequestOptions(SamplingOptions):
    """And what else a request need not say."""

    max_tokens: Annotated[int, typer.Option(help="Most output tokens of a request that does not say.")] = 512
    chat_template: Annotated[
        Path | None, _of_answers(help="File with a Jinja chat template that replaces the model's.")
    ] = None

    def job(self) -> dict[str, Any]:
        template = read_text("--chat-template", self.chat_template)
        return super().job() | {"max_tokens": self.max_tokens, "chat_template": template}


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(RequestOptions):
    """And what its answer is held to."""

    seed: Annotated[
        int, _of_answers(help="Seed of the run: requests without a seed get one from it and their index.")
    ] = 0
    stop: Annotated[
        list[str] | None,
        _of_answers(help="Text before which an answer ends, for requests that do not say. May be given again."),
    ] = None
    json_schema: Annotated[
        str | None,
        _of_answers(help="JSON schema, or a file with one, that the answers of requests that do not say are held to."),
    ] = None
    grammar_file: Annotated[
        Path | None,
        _of_answers(help="File with a GBNF grammar that the answers of requests that do not say are held to."),
    ] = None

    def _parameters(self) -> dict[str, Any]:
        stop = {"stop": self.stop} if self.stop else {}
        return super()._parameters() | stop | held_to(self.json_schema, self.grammar_file)

    def job(self) -> dict[str, Any]:
        return super().job() | {"seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class StagingOptions(OptionGroup):
    """Copies of the model on nodes."""

    stage: Annotated[
        Literal["never", "auto", "always"],
        _of_model(help="Give every node a copy of the model, read once. auto: if it is on a network file system."),
    ] = "auto"
    stage_dir: StageDir = None

    def job(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StoppingOptions(OptionGroup):
    """When a job ends before its work does."""

    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|none",
            help="The job is gone by then, and nothing is started that would not end in time: minutes, MM:SS, "
            "HH:MM:SS, D-HH:MM:SS, 90s, 2h. [default: what Slurm knows of its job]",
        ),
    ] = None
    drain_timeout: Annotated[
        float, _of_stopping(help="Seconds from a request to stop to the job's end. What runs longer is cut off.")
    ] = 20.0

    def stopping(self, on_limit: Literal["stop", "requeue"] = "stop") -> StopOptions:
        """Raises `ConfigError`."""
        from coordinator.timekeeper import StopOptions
        from coordinator.timelimit import parse_time_limit

        limit_s = None if self.time_limit is None else parse_time_limit(self.time_limit)
        return StopOptions(
            drain_timeout_s=self.drain_timeout, on_limit=on_limit,
            time_limit_s=limit_s, slurm_limit=self.time_limit is None or limit_s is not None,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SimulationOptions(OptionGroup):
    """Whether there is an engine."""

    engine: Annotated[
        Literal["llama", "simulated"],
        _of_simulation(
            help="'simulated' computes nothing, needs no model, and takes as long as --service-times say: for studies "
            "and tests, its answers mean nothing."
        ),
    ] = "llama"
    service_times: Annotated[
        Path | None,
        _of_simulation(
            help="Of the simulated engine, as `llmpi bench engine --calibrate` writes them. [default: an example's]"
        ),
    ] = None
    time_scale: Annotated[float, _of_simulation(help="The simulated engine takes so many times as long.")] = 1.0

    def job(self) -> dict[str, Any]:
        return asdict(self) | {"service_times": None if self.service_times is None else str(self.service_times)}
