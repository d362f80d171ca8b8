"""Everything that ranks say to each other: one frozen struct per message, msgpack bytes, never pickle.

Messages travel in envelopes of many (see `coordinator.transport`). A worker opens with `Hello`; rank 0 answers
`Welcome` or `Refuse`. Then rank 0 sends `Assign`, `Recall`, `Cancel`, `Exhausted`, `Rejoin`, `Collect`, `Enter`,
`Stop`; a worker sends `Ready` once its engine is loaded, `Report` for progress and ends of requests, `Recalled` for
each `Recall`, `EngineDown` when its engine died, `Crashed` when it cannot go on, `Counters` once an interval,
`Collecting` for each `Collect`. Both send `Heartbeat` when they have had nothing to say.

What rank 0 sends as `Assign` a worker handles in `on_assign`, and so for every pair.
"""

from __future__ import annotations

import msgspec

from scheduling.fitting import Fit

PROTOCOL_VERSION = 7
"""Raised with every change to a message of this module. It leads every envelope."""

ENGINE_END_S = 5.0
"""How long an engine may take to end, where nothing presses."""


# ---------------------------------------------------------------- worker -> rank 0


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as a rank sees it. Memory, all of it and what is free now: None where the driver does not say."""

    uuid: str
    name: str
    index: int
    memory_bytes: int | None = None
    free_bytes: int | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    compute_capability: str | None = None
    mask_entry: str | None = ""
    """Its name in the variable of its backend, where that is not the UUID (""). None: it cannot be told from others."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank runs and what it may use there.

    `gpus` are those the rank may use under the mask its launcher gave it. `cpus` are those its cgroup allows,
    however narrow the affinity is that the launcher bound it to. `mask` is the variable that hides devices, as
    found in its environment (name, value), or None.
    """

    hostname: str
    gpus: tuple[Gpu, ...] = ()
    backends: tuple[str, ...] = ("cuda",)
    """Of the installed llama.cpp, the CPU left out (`scheduling.backends`): `gpus` are the first one's devices."""
    gpus_known: bool = True
    """False where no library could be asked: then an empty `gpus` means 'missing', not 'none'."""
    cpus: tuple[int, ...] = ()
    """Neighbours (same core, same NUMA node) stand next to each other."""
    cpu_limit: int | None = None
    """How many of `cpus` a quota lets all ranks of this host use at once; None: all of them."""
    numa_cpus: dict[int, tuple[int, ...]] = {}
    """Those of `cpus` that belong to each NUMA node."""
    memory_bytes: int | None = None
    """What can still be had of the host's memory, or of what the cgroup grants, by all ranks of this host together."""
    cpus_per_task: int | None = None
    local_rank: int | None = None
    mask: tuple[str, str] | None = None


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    protocol: int
    versions: dict[str, str]
    """Package versions that must not differ between ranks: llmpi, llama_cpp_python, msgspec, numpy."""
    config_digest: str
    model_fingerprint: str
    host: Host
    pid: int
    problem: str = ""
    """Why this rank cannot take part although it was started, e.g. the model file is missing on its host."""


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The engine has loaded. `slots` sequences can run at once.

    `generation` counts the worker's engines. What was assigned to an earlier one is not this one's work.
    """

    slots: int
    generation: int
    load_s: float
    backend: str
    model_desc: str = ""
    ctx_tokens: int = 0
    engine_pid: int | None = None
    rejoin: int = 0
    """The number of the last `Rejoin` that this worker has heard; 0: of none."""


class Finished(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The end of one request, with its line for the record already encoded by the worker.

    `ok` False: the request failed, `line` says why. Times as in `workers.protocol.Answer`.
    """

    index: int
    attempt: int
    ok: bool
    prompt_tokens: int
    output_tokens: int
    line: bytes


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """New text of a streamed request."""

    index: int
    attempt: int
    choice: int
    text: str
    tokens: int


class Report(msgspec.Struct, tag="report", frozen=True, kw_only=True, omit_defaults=True):
    """Progress. A request that starts and finishes within one report need not be in `started`."""

    started: list[tuple[int, int]] = []
    """(index, attempt) each."""
    finished: list[Finished] = []
    deltas: list[Delta] = []
    made_tokens: int = 0
    """Output tokens made since the last report that had any, those of unfinished requests too. For progress only."""


class Recalled(msgspec.Struct, tag="recalled", frozen=True):
    """The victim's answer to `Recall`: `indexes` were not started, and it has forgotten them."""

    recall: int
    indexes: list[int]


class EngineDown(msgspec.Struct, tag="engine_down", frozen=True, kw_only=True):
    """The engine died. All the worker's requests go back: the started ones have lost an attempt.

    `restarting`: a new engine is on its way and `Ready` will follow; else the worker takes no more work.
    """

    reason: str
    started: list[tuple[int, int]] = []
    unstarted: list[tuple[int, int]] = []
    restarting: bool = True
    user_error: bool = False


class Crashed(msgspec.Struct, tag="crashed", frozen=True, kw_only=True):
    """An exception of our own in the worker. It takes no more work but stays to be stopped in order."""

    reason: str
    traceback: str = ""


class Counters(msgspec.Struct, tag="counters", frozen=True, kw_only=True):
    """What is in no record, once an interval, so that a job that is killed has it up to then.

    `row`: bytes of one `scheduling.tables.RANK`; `itl_buckets` and `itl_counts` of a histogram: both are sums since the
    session's start. `telemetry`: bytes of rows of `TELEMETRY`, those since the last time; the worker forgets them.
    """

    row: bytes
    itl_buckets: list[int] = []
    itl_counts: list[int] = []
    telemetry: bytes = b""


class Collecting(msgspec.Struct, tag="collecting", frozen=True):
    """The answer to `Collect`: the engine has ended, and this worker waits to enter the collectives of this epoch."""

    epoch: int


class Heartbeat(msgspec.Struct, tag="heartbeat", frozen=True):
    """Nothing to report, still here."""


FromWorker = Hello | Ready | Report | Recalled | EngineDown | Crashed | Counters | Collecting | Heartbeat


# ---------------------------------------------------------------- rank 0 -> worker


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker may use: decided by rank 0 from all `Host`s.

    `device_mask` is environment for the engine process; `threads` for its CPU work; `cpus` its affinity.
    """

    device_mask: dict[str, str] = {}
    gpu_uuids: tuple[str, ...] = ()
    backend: str = "cuda"
    """Whose devices they are."""
    cpus: tuple[int, ...] = ()
    threads: int = 1
    note: str = ""
    """One clause for people, e.g. 'GPU-3f… (index 2)' or 'CPU, 2 threads of 8'."""
    lanes: tuple[str, ...] = ("generate",)
    """What its engine should be ready for when it has loaded (`workers.task.Lane`); for other work it is later."""
    fit: Fit | None = None
    """What the engine is to be. None where nothing has a size: engines without a model."""


class Welcome(msgspec.Struct, tag="welcome", frozen=True, kw_only=True):
    placement: Placement
    run_seed: int
    session: int
    """How many times this run directory has been started before."""
    silence_max_s: float | None = None
    """A worker that hears nothing from rank 0 for longer ends its engine and leaves; None: it waits, because rank 0
    sends no heartbeats while a program of the user's does something else."""


class Refuse(msgspec.Struct, tag="refuse", frozen=True):
    """This rank does not belong to the job. It leaves after reading this; rank 0 tells the user."""

    reason: str


class WorkItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One request for a worker: its line as it was read, so that rank 0 need not encode it again."""

    index: int
    attempt: int
    line: bytes
    stolen_from: int | None = None
    """The rank that it was taken from; None: from none."""


class Assign(msgspec.Struct, tag="assign", frozen=True):
    """Work for the worker's engine of this generation; if it has died meanwhile the worker drops it."""

    generation: int
    items: list[WorkItem]


class Recall(msgspec.Struct, tag="recall", frozen=True):
    """Give back those of `indexes` that have not started. Answered by `Recalled`, also if there are none."""

    recall: int
    indexes: list[int]


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Stop these and answer for them as failed."""

    indexes: list[int]


class Exhausted(msgspec.Struct, tag="exhausted", frozen=True):
    """No unstarted work is left that a free slot could take (`empty` True), or there is some again (False).

    A worker counts free slots as starved only while there is.
    """

    empty: bool


class Rejoin(msgspec.Struct, tag="rejoin", frozen=True):
    """This worker was silent for its lease and its work went elsewhere. It drops all of it and says `Ready` with this
    number."""

    number: int


class Collect(msgspec.Struct, tag="collect", frozen=True):
    """End the engine, which may take `engine_s` before it is killed, and answer `Collecting`: so that nobody enters the
    collectives of this epoch before all can."""

    epoch: int
    engine_s: float = ENGINE_END_S


class Enter(msgspec.Struct, tag="enter", frozen=True):
    """Enter the collectives of this epoch. `reduced`: some ranks are gone; the first step is to leave them out."""

    epoch: int
    reduced: bool = False


class Busy(msgspec.Struct, tag="busy", frozen=True):
    """`silence_max_s` as in `Welcome`, from here on: rank 0 makes metrics of the whole record before it is heard again,
    whether this worker took part in the collectives or not."""

    silence_max_s: float


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Leave. Nothing will be asked of this worker any more. The engine may take `engine_s` to end."""

    reason: str
    engine_s: float = ENGINE_END_S


FromCoordinator = (
    Welcome | Refuse | Assign | Recall | Cancel | Exhausted | Rejoin | Collect | Enter | Busy | Stop | Heartbeat
)
