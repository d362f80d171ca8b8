"""What a rank and its engine process say to each other: typed frames over two pipes.

Each frame is a 4-byte little-endian length and a msgpack body, one of the tagged structs below. The rank sends
`EngineStart` once, then `Submit`, `Recall`, `Cancel` as it likes; end of file on the pipe ends the engine. The
engine answers `EngineLoaded` or `EngineFailed` once, then sends at most two `Frame`s per decode step of a context (what
starts with it before, what ends with it after), `Returned` for each `Recall`, and `Stats` about once a second. Keys are
the requests' indexes.

The same structs are spoken by the null and the simulated engine, so that a worker cannot tell them apart.
All times are seconds measured on the engine's own monotonic clock.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from scheduling.constraints import Constraint
from scheduling.logprobs import TokenLogprobs
from scheduling.requests import Request
from scheduling.servicetime import ServiceTimes
from workers.frames import frame
from workers.loading import CacheType, RopeScaling, Split

# ---------------------------------------------------------------- rank -> engine


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter, applied to every request."""

    path: str
    scale: float = 1.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine needs to know before it loads. Stored in run.json as it was used."""

    model: str
    """Path of the GGUF file."""
    slots: int
    """Sequences decoded at once, over all contexts together."""
    contexts: int = 1
    """Contexts over the one loaded model, each stepped by its own thread with slots/contexts sequences."""
    ctx_tokens: int = 2048
    """Tokens a slot holds: prompt plus output. Each slot has cells of its own."""
    long_slots: int = 0
    """Slots for requests that need more, in a context that is opened when the first one comes. 0: there are none."""
    long_ctx_tokens: int = 0
    input_tokens: int = 0
    """Tokens that an input to embed may have, where that is more than a slot holds."""
    batch_tokens: int = 2048
    ubatch_tokens: int = 512
    threads: int = 1
    """Threads for llama.cpp's CPU work, all contexts together."""
    threads_batch: int | None = None
    sampling_threads: int = 1
    """Threads of each context that choose tokens from logits. More get in each other's way where several do."""
    sample_on: Literal["auto", "device", "host"] = "auto"
    """Where the largest logits are found (`workers.backend_sampling`). auto: on a GPU that computes them."""
    gpu_layers: int = -1
    """Layers on the GPU; -1 is all of them."""
    flash_attention: bool | None = None
    """None lets llama.cpp decide."""
    prefix_reuse: bool = True
    """What a prompt has in common with one that is in the cache is not computed again (`workers.prefixes`)."""
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    """Other than f16 needs flash attention."""
    loras: tuple[Adapter, ...] = ()
    rope_scaling: RopeScaling | None = None
    """None is what the model says."""
    rope_scale: float | None = None
    """How many times the context that the model was trained with."""
    rope_freq_base: float | None = None
    split: Split = "layer"
    """How a model is divided among several GPUs."""
    tensor_split: tuple[float, ...] = ()
    """Each GPU's share of it; empty: llama.cpp decides, by free memory."""
    steady_batches: bool | None = None
    """Shape batches as a GPU likes them (`workers.passes`). None: where there is one."""
    speculate: Literal["auto", "always", "never"] = "auto"
    """Draft tokens and check several at once where few sequences run (`workers.speculation`): where it is faster, or
    whenever there is a draft."""
    draft_model: str | None = None
    """Path of the GGUF file of a model that drafts; None looks drafts up in the sequence itself."""
    draft_max: int = 15
    """Most tokens drafted at once for a sequence."""
    use_mmap: bool = True
    cpus: tuple[int, ...] = ()
    """Processors the engine may use; empty leaves the affinity alone."""
    device_mask: dict[str, str] = {}
    """Environment set before any GPU library is loaded, e.g. {"CUDA_VISIBLE_DEVICES": "GPU-…"}."""
    use_devices: bool = True
    """False: the processor alone computes, whatever devices the build sees (not every backend has a mask)."""
    max_tokens_default: int = 512
    constraint: Constraint | None = None
    """What answers are held to where a request does not say: compiled at the start, which fails if that cannot be."""
    chat_template: str | None = None
    """A template that replaces the model's own."""
    service_times: ServiceTimes | None = None
    """Nothing is computed: the engine is simulated, and takes as long as these say."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How one vector is made of an input's: None is as the model says, else their mean."""
    lanes_at_start: tuple[str, ...] = ("generate",)
    """Kinds of contexts (`workers.task.Lane`) that are made with the model; others when they are needed."""


class EngineStart(msgspec.Struct, tag="start", frozen=True):
    config: EngineConfig


class Job(msgspec.Struct, array_like=True, frozen=True):
    """One request for the engine. `seed` is final: derived already where the request had none."""

    key: int
    seed: int
    stream: bool
    request: Request


class Submit(msgspec.Struct, tag="submit", frozen=True):
    jobs: list[Job]


class Recall(msgspec.Struct, tag="recall", frozen=True):
    """Give back those of `keys` that have not been started. Answered by `Returned` with the same `recall`."""

    recall: int
    keys: list[int]


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Stop these, started or not. Each still ends with an `Answer` (finish_reason "cancelled")."""

    keys: list[int]


ToEngine = EngineStart | Submit | Recall | Cancel


# ---------------------------------------------------------------- engine -> rank


class EngineLoaded(msgspec.Struct, tag="loaded", frozen=True, kw_only=True):
    load_s: float
    vocab_tokens: int
    train_ctx_tokens: int
    slots: int
    model_desc: str
    model_bytes: int
    backend: str
    """What computes, as llama.cpp names it: "CPU", "CUDA0", …"""
    chat_template: bool


class EngineFailed(msgspec.Struct, tag="failed", frozen=True, kw_only=True):
    """The engine cannot start or cannot go on. It exits after this frame. `user_error`: the user can mend it."""

    reason: str
    user_error: bool = False


class Choice(msgspec.Struct, array_like=True, frozen=True):
    text: str
    finish_reason: str
    """stop, length, error or cancelled."""
    output_tokens: int
    logprobs: TokenLogprobs | None = None
    """Of the output; of prompt and output with echo; of the continuation that this choice is. None: not asked for."""


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The end of one request. `error` is set instead of choices if it could not be run.

    queue_s: received to first scheduled. ttft_s: received to first output token (0.0 if there was none).
    e2e_s: received to finished. So ttft_s and e2e_s include queue_s. cached_tokens: those of prompt_tokens that no
    choice had to compute, because they were in the cache.
    """

    key: int
    choices: list[Choice]
    prompt_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float
    e2e_s: float
    error: str | None = None
    cached_tokens: int = 0
    vectors: bytes = b""
    """(inputs, dimensions) of a request for embeddings, whose choices have no text: see `scheduling.vectors`."""


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """New text of a streamed request: whole characters only. `tokens` counts the tokens it stands for."""

    key: int
    choice: int
    text: str
    tokens: int


class Frame(msgspec.Struct, tag="frame", frozen=True, kw_only=True):
    """What one step of one context brought. `started`, `finished` and `pieces` are often empty lists."""

    started: list[int] = []
    finished: list[Answer] = []
    pieces: list[Piece] = []
    running: int = 0
    """Slots in use over all contexts after the step."""


class Returned(msgspec.Struct, tag="returned", frozen=True):
    """The answer to a `Recall`: the keys that had not been started and now never will be, here."""

    recall: int
    keys: list[int]


class Stats(msgspec.Struct, tag="stats", frozen=True, kw_only=True):
    """Counters since the last `Stats`, about once a second and once at the end.

    prompt_tokens: those that were computed, for each choice of a request. cached_tokens: those that were in the cache.
    busy_s: time in which at least one slot was in use. slot_s: integral of used slots over time.
    drafted_tokens, accepted_tokens: by speculation; tokens that were checked, and those of them that were put out.
    stalled_s: since the last step of the context that has work and has made none for longest.
    itl_buckets / itl_counts: a sparse `scheduling.histogram` of gaps between tokens of a sequence, in seconds.
    """

    interval_s: float
    steps: int
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int
    busy_s: float
    slot_s: float
    decode_s: float
    """Time inside llama_decode and waiting for its results, drafting included, summed over contexts."""
    sample_s: float
    reading_steps: int = 0
    """Steps in which pieces of prompts were read."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    itl_buckets: list[int] = []
    itl_counts: list[int] = []
    stalled_s: float = 0.0


FromEngine = EngineLoaded | EngineFailed | Frame | Returned | Stats

_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame, length prefix included."""
    return frame(_encoder.encode(message))


def decode_to_engine(body: bytes) -> ToEngine:
    message: ToEngine = _to_engine.decode(body)
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(body)
    return message
