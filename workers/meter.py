"""The engine's counters: what the steps of all contexts add up to, about once a second.

Each context records its steps; whoever records the first step after a second has passed sends the `Stats`. When
the last busy context runs out of work the rest is sent at once, so that the counters are complete soon after the
last answer. Time comes in as arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from scheduling.histogram import BUCKETS, bucket_of
from workers.protocol import Stats

INTERVAL_S = 1.0
GAPS_MAX = 1024
"""Steps whose gaps are kept before they are counted."""


class Meter:
    """Sums over all contexts since the last `Stats`."""

    def __init__(self, send: Callable[[Stats], None], now_s: float) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._since_s = now_s
        self._stepped_s: dict[int, float] = {}
        """When each context that has work last ended a step, by the thread that drives it."""
        self._busy_since_s = now_s
        self._reset()

    def _reset(self) -> None:
        self._steps = self._reading_steps = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._busy_s = self._slot_s = self._decode_s = self._sample_s = 0.0
        self._gaps = np.zeros(BUCKETS, np.int64)
        self._new_gaps: list[npt.NDArray[np.float64]] = []

    def wake(self, now_s: float) -> None:
        """A context has work again."""
        with self._lock:
            if not self._stepped_s:
                self._busy_since_s = now_s
            self._stepped_s[threading.get_ident()] = now_s

    def sleep(self, now_s: float) -> None:
        """A context has run out of work."""
        with self._lock:
            self._stepped_s.pop(threading.get_ident(), None)
            if not self._stepped_s:
                self._busy_s += now_s - self._busy_since_s
                self._flush(now_s)

    def step(
        self,
        now_s: float,
        *,
        prompt_tokens: int,
        cached_tokens: int = 0,
        output_tokens: int,
        drafted_tokens: int = 0,
        accepted_tokens: int = 0,
        slot_s: float,
        decode_s: float,
        sample_s: float,
        gaps_s: npt.NDArray[np.float64],
    ) -> None:
        """Count one step of one context. `gaps_s`: times since the previous token of each sequence (1-D)."""
        with self._lock:
            thread = threading.get_ident()
            if thread in self._stepped_s:
                self._stepped_s[thread] = now_s
            self._steps += 1
            self._reading_steps += prompt_tokens > 0
            self._prompt_tokens += prompt_tokens
            self._cached_tokens += cached_tokens
            self._output_tokens += output_tokens
            self._drafted_tokens += drafted_tokens
            self._accepted_tokens += accepted_tokens
            self._slot_s += slot_s
            self._decode_s += decode_s
            self._sample_s += sample_s
            if gaps_s.size:
                self._new_gaps.append(gaps_s)
                if len(self._new_gaps) >= GAPS_MAX:
                    self._count_gaps()
            if now_s - self._since_s >= INTERVAL_S:
                self._busy_s += now_s - self._busy_since_s
                self._busy_since_s = now_s
                self._flush(now_s)

    def _count_gaps(self) -> None:
        """All at once: a single step's would cost as much."""
        if self._new_gaps:
            self._gaps += np.bincount(bucket_of(np.concatenate(self._new_gaps)), minlength=BUCKETS)
            self._new_gaps.clear()

    def close(self, now_s: float) -> None:
        """Send what is left."""
        with self._lock:
            if self._stepped_s:
                self._busy_s += now_s - self._busy_since_s
                self._busy_since_s = now_s
            self._flush(now_s)

    def _flush(self, now_s: float) -> None:
        if self._steps:
            self._count_gaps()
            buckets = np.flatnonzero(self._gaps)
            self._send(
                Stats(
                    interval_s=now_s - self._since_s,
                    steps=self._steps,
                    reading_steps=self._reading_steps,
                    prompt_tokens=self._prompt_tokens,
                    cached_tokens=self._cached_tokens,
                    output_tokens=self._output_tokens,
                    drafted_tokens=self._drafted_tokens,
                    accepted_tokens=self._accepted_tokens,
                    busy_s=self._busy_s,
                    slot_s=self._slot_s,
                    decode_s=self._decode_s,
                    sample_s=self._sample_s,
                    itl_buckets=buckets.tolist(),
                    itl_counts=self._gaps[buckets].tolist(),
                    stalled_s=now_s - min(self._stepped_s.values(), default=now_s),
                )
            )
            self._reset()
        self._since_s = now_s
