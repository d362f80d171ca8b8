"""What a job is asked to do: one frozen value, the same on every rank, stored in run.json with the run.

Ranks are started with the same command line; the handshake compares `JobConfig.digest`, so that a rank started with
another one is refused by name instead of computing something else.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import msgspec

from scheduling.errors import ConfigError, RequestError
from scheduling.policies import POLICIES, policy_named
from scheduling.requests import Request, Sampling, parse_request
from scheduling.wireform import MAX_TOKENS_LIMIT
from workers.care import LEASE_S
from workers.loading import CacheType, RopeScaling, Split
from workers.protocol import Adapter

Auto = Literal["auto"]

RANK0_LEASE_MIN_S = 600.0
"""Rank 0 may stand still for long: its record may lie on a file system that hangs."""
LEASE_LEAST_S = 2.0
"""An idle rank looks about twice a second whether it should say that it is here."""
RANK0_LEASE_LEAST_S = 5.0
WELCOME_LEAST_S = 60.0
"""Before work begins rank 0 loads more than the others, and sorts what it has read, without a word."""

DRAFT_TOKENS_LIMIT = 31
"""With the token before them as many rows as a pass that checks drafts may have."""

FANOUT = 256
"""Ranks that rank 0 speaks to itself, and ranks that a leader carries for, where nobody says otherwise."""


class JobConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a job. None and "auto": chosen when the facts are known (model, devices, requests), and then said.

    `loras` are adapters for all requests, each as PATH or PATH:SCALE.
    """

    model: str
    schedule: str = "work-stealing"
    slots: int | Auto = "auto"
    contexts: int | None = None
    ctx: int | Auto = "auto"
    batch: int = 4096
    ubatch: int | None = None
    threads: int | None = None
    gpu_layers: int | Auto = "auto"
    flash_attention: bool | None = None
    prefix_reuse: bool = True
    gpu_sampling: bool = True
    speculate: bool = True
    draft_model: str | None = None
    draft_max: int = 15
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    loras: tuple[str, ...] = ()
    rope_scaling: RopeScaling | None = None
    rope_scale: float | None = None
    rope_freq_base: float | None = None
    split: Split = "layer"
    device: Literal["auto", "gpu", "cpu"] = "auto"
    gpus_per_rank: int = 1
    ranks_per_gpu: int = 1
    coordinator_works: bool | None = None
    sampling: Sampling = Sampling()
    max_tokens: int = 512
    seed: int = 0
    copies: bool | None = None
    """Whether what runs on a slow worker near the end is started again on an idle one. None: with work stealing."""
    prefetch: int | None = None
    fanout: int = FANOUT
    """Where more ranks than these are started there are leaders, each for up to so many (`coordinator.relays`)."""
    lease_s: float = 60.0
    rank0_lease_s: float | None = None
    """The same of rank 0, seen by workers; None: ten leases, and at least RANK0_LEASE_MIN_S."""
    engine_lease_s: float = LEASE_S
    request_timeout_s: float | None = None
    max_deaths: int = 3
    commit_interval_s: float = 0.05
    commit_bytes: int = 16 << 20
    metrics_interval_s: float = 10.0
    precheck: bool = True
    chat_template: str | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    embeddings: bool = False
    """Nothing is made ready for generating text before a request asks for some."""
    stage: Literal["never", "auto", "always"] = "auto"
    """Whether nodes load copies of their own of the model; auto: where it lies on a network file system."""
    stage_dir: str | None = None
    """Folder on every node for those copies; None: the node's own scratch space."""
    engine: Literal["llama", "null", "simulated"] = "llama"
    null_answer_bytes: int = 200
    service_times: str | None = None
    """File with the times of the simulated engine; None: an example's."""
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        _must_be_unicode("-m", self.model)
        _must_be_unicode("--draft-model", self.draft_model)
        _must_be_unicode("--stage-dir", self.stage_dir)
        for lora in self.loras:
            _must_be_unicode("--lora", lora)
        if self.schedule not in POLICIES:
            raise ConfigError(f"no schedule is named {self.schedule!r}: choose one of {', '.join(sorted(POLICIES))}")
        least_one = {
            "--slots": self.slots, "--contexts": self.contexts, "--ctx": self.ctx, "--batch": self.batch,
            "--ubatch": self.ubatch, "--threads": self.threads, "--max-tokens": self.max_tokens,
            "--gpus-per-rank": self.gpus_per_rank, "--ranks-per-gpu": self.ranks_per_gpu,
            "--commit-bytes": self.commit_bytes, "--draft-max": self.draft_max, "--fanout": self.fanout,
        }  # fmt: skip
        for flag, value in least_one.items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{flag} is {value}: it must be 1 or more")
        if self.max_tokens > MAX_TOKENS_LIMIT:
            raise ConfigError(f"--max-tokens is {self.max_tokens}: the most that is accepted is {MAX_TOKENS_LIMIT}")
        if isinstance(self.slots, int) and self.slots > 4096:
            raise ConfigError(f"--slots is {self.slots}: the most that is accepted is 4096")
        if self.draft_max > DRAFT_TOKENS_LIMIT:
            raise ConfigError(f"--draft-max is {self.draft_max}: the most that is accepted is {DRAFT_TOKENS_LIMIT}")
        if self.draft_model is not None and not self.speculate:
            raise ConfigError("--draft-model is given with --no-speculate: leave out one of them")
        if self.copies and not self.makes_copies:
            raise ConfigError(
                f"--copies needs --schedule work-stealing: under {self.schedule} a request stays where it was dealt"
            )
        if self.prefetch is not None and self.prefetch < 0:
            raise ConfigError(f"--prefetch is {self.prefetch}: it must be 0 or more")
        if self.max_deaths < 2:
            raise ConfigError(
                f"--max-deaths is {self.max_deaths}: it must be 2 or more, for one death does not tell which of the "
                "requests that ran is to blame"
            )
        above_zero = {
            "--commit-interval": self.commit_interval_s, "--metrics-interval": self.metrics_interval_s,
            "--engine-lease": self.engine_lease_s, "--request-timeout": self.request_timeout_s,
        }  # fmt: skip
        for flag, seconds in above_zero.items():
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{flag} is {seconds}: it must be above 0 seconds")
        if not self.lease_s >= LEASE_LEAST_S:
            raise ConfigError(
                f"--lease is {self.lease_s}: it must be {LEASE_LEAST_S:g} or more, for a rank without work looks only "
                "twice a second whether it should say that it is here"
            )
        if self.rank0_lease_s is not None and not self.rank0_lease_s >= RANK0_LEASE_LEAST_S:
            raise ConfigError(
                f"--rank0-lease is {self.rank0_lease_s}: it must be {RANK0_LEASE_LEAST_S:g} or more, for rank 0 says "
                "every other second that it is here"
            )
        self._check_simulation()
        self._check_engine()
        self.adapters()

    def _check_simulation(self) -> None:
        if self.engine != "simulated" and (self.service_times is not None or self.time_scale != 1.0):
            raise ConfigError("--service-times and --time-scale are for --engine simulated")
        if self.engine != "llama" and self.draft_model is not None:
            raise ConfigError(f"--draft-model is not for --engine {self.engine}, which says nothing worth guessing")
        if not 0.0 <= self.time_scale < math.inf:
            raise ConfigError(f"--time-scale is {self.time_scale}: it must be 0 or more, and finite")

    @property
    def rank0_silence_max_s(self) -> float:
        """A worker that hears nothing from rank 0 for longer leaves."""
        return max(RANK0_LEASE_MIN_S, 10 * self.lease_s) if self.rank0_lease_s is None else self.rank0_lease_s

    @property
    def welcome_max_s(self) -> float:
        """The same of a worker that rank 0 has not welcomed yet."""
        return max(WELCOME_LEAST_S, self.rank0_silence_max_s)

    @property
    def makes_copies(self) -> bool:
        return policy_named(self.schedule).steals and self.copies is not False

    @property
    def want_gpu(self) -> bool | None:
        """Whether workers need a GPU; None: where there is one. What is simulated needs none."""
        if self.device == "auto":
            return False if self.engine == "simulated" else True if self.gpus_per_rank > 1 else None
        return self.device == "gpu"

    def _check_engine(self) -> None:
        """Options of llama.cpp that need one another."""
        if isinstance(self.gpu_layers, int) and self.gpu_layers < -1:
            raise ConfigError(f"--gpu-layers is {self.gpu_layers}: it must be 0 or more, or -1 for all")
        for flag, number in (("--rope-scale", self.rope_scale), ("--rope-freq-base", self.rope_freq_base)):
            if number is not None and not 0 < number < float("inf"):
                raise ConfigError(f"{flag} is {number}: it must be a number above 0")
        if self.rope_scale is not None and self.rope_scaling in (None, "none"):
            raise ConfigError(f"--rope-scale {self.rope_scale} needs --rope-scaling linear or yarn")
        if self.flash_attention is False and self.cache_type_v != "f16":
            raise ConfigError(
                f"--cache-type-v {self.cache_type_v} needs flash attention: leave out --no-flash-attention, or "
                "quantise the keys alone (--cache-type-k)"
            )
        if self.flash_attention is False and self.split == "tensor":
            raise ConfigError("--split tensor needs flash attention: leave out --no-flash-attention")
        if self.split != "layer" and self.gpus_per_rank == 1:
            raise ConfigError(f"--split {self.split} divides a model among GPUs: give --gpus-per-rank 2 or more")

    def adapters(self) -> tuple[Adapter, ...]:
        """`loras`, taken apart. Raises ConfigError for a scale that is no number."""
        return tuple(parse_adapter(text) for text in self.loras)

    def digest(self) -> str:
        """What all ranks must agree on, as 16 hex digits."""
        plain = msgspec.to_builtins(self, str_keys=True)  # logit_bias has numbers as keys
        return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """The part that decides the answers: a run is resumed only with the same."""
        keys = (
            "ctx", "sampling", "max_tokens", "seed", "chat_template", "pooling", "engine", "cache_type_k",
            "cache_type_v", "rope_scaling", "rope_scale", "rope_freq_base",
        )  # fmt: skip
        return {key: msgspec.to_builtins(getattr(self, key)) for key in keys}


def parse_adapter(text: str) -> Adapter:
    """PATH or PATH:SCALE. A path that ends in a colon and a number is written with its scale, :1 if need be.

    Raises:
        ConfigError: there is no path, or a scale that is no finite number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or scale.endswith(".gguf"):
        path, scale = text, "1"
    try:
        value = float(scale)
    except ValueError:
        value = float("nan")
    if not path or not abs(value) < float("inf"):
        raise ConfigError(f"--lora {text}: give PATH or PATH:SCALE, as in adapter.gguf:0.5")
    return Adapter(path, value)


def checked_sampling(**values: object) -> Sampling:
    """Sampling defaults from the command line or a call, held to the same limits as a request's own.

    Raises:
        ConfigError: a value is out of its range.
    """
    import json

    own = next((name for name in values if name in Request.__struct_fields__), None)
    if own is not None:
        raise ConfigError(f"{own} has no default for all requests: give it in each request that wants it")
    try:
        # Not `request_line`, which does not say whose value it is that is not finite.
        return parse_request(json.dumps({"prompt": "x", **values}).encode(), default_id="-").sampling
    except TypeError as error:
        raise ConfigError(f"a sampling parameter cannot be written as JSON: {error}") from None
    except RequestError as error:
        name = (error.param or "").split(".")[0].replace("_", "-")
        name = "grammar-file" if name == "grammar" else name
        raise ConfigError(f"--{name}: {error}" if name else str(error)) from None


def _must_be_unicode(flag: str, text: str | None) -> None:
    """Names of files travel between processes as text, and a file's name may be any bytes."""
    if text is not None and text != text.encode("utf-8", "replace").decode():
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"{flag} is {shown}, which is not UTF-8: give the file another name, or a link that has one")
