"""What others are told of a job while it runs, and by which calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduling import events as ev
from scheduling import messages as m


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a job is. Rates are over the time since the first request was handed out.

    `output_tokens` are those of requests that have ended, `made_tokens` those of running ones too, about a second late.
    """

    elapsed_s: float
    total: int | None
    earlier: int
    done: int
    failed: int
    running: int
    queued: int
    output_tokens: int
    prompt_tokens: int
    made_tokens: int
    draining: bool
    workers_ready: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who else wants to know. `on_result` is given each durable line; `on_tick` a snapshot four times a second.

    `stops` is asked as often whether somebody wants the job to end, and until when.
    """

    on_result: Callable[[bytes], None] | None = None
    on_delta: Callable[[m.Delta], None] | None = None
    on_counters: Callable[[int, m.Counters], None] | None = None
    on_tick: Callable[[Snapshot], None] | None = None
    on_note: Callable[[str], None] | None = None
    stops: Callable[[], Sequence[ev.DrainRequested | ev.TimeLimited]] | None = None
