"""Numbers that bound what the control plane does: one frozen set for a run, chosen by whoever starts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How deep backlogs are, how patient rank 0 is, and how much may lie about.

    prefetch: unstarted requests a worker holds beyond its slots, at least; None is a quarter of its slots.
    prefetch_horizon_s: a worker that finishes r requests a second holds at least r times this many more.
    prefetch_max: most requests that a worker holds beyond its slots, however fast it is.
    recall_margin_s: stealing leaves a victim what it will start within this time at its measured rate.
    recall_patience_s: after this time an unanswered recall no longer counts as help that is on its way.
    deaths: engine deaths while running a request after which the request is failed; the last one is one that it ran
    alone in, if there are two or more.
    lease_s: a worker silent for longer is lost. None: never.
    waiting: most requests that wait at rank 0 (round-robin behind a slow worker). unacknowledged: most answers
    handed to the record and not yet durable; above it nothing is read.
    copies: requests that run on slow workers near the end may be started a second time (`scheduling.copies`).
    copy_gain_s, copy_gain_share: if that is expected to end them sooner by this time at least, and by this share of
    what they would still take. copy_interval_s: how often that is looked at, at most.
    """

    prefetch: int | None = None
    prefetch_horizon_s: float = 0.1
    prefetch_max: int = 4096
    recall_margin_s: float = 0.005
    recall_patience_s: float = 1.0
    deaths: int = 3
    lease_s: float | None = 60.0
    waiting: int = 65_536
    unacknowledged: int = 65_536
    copies: bool = True
    copy_gain_s: float = 0.5
    copy_gain_share: float = 0.2
    copy_interval_s: float = 0.25

    @property
    def suspect_deaths(self) -> int:
        """Engine deaths after which a request is run alone: the next one shows whether it is to blame."""
        return max(1, self.deaths - 1)
