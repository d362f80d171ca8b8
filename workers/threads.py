"""Threads that share the work of one step over its rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

PARALLEL_ELEMENTS_MIN = 1 << 20
"""Logits below which a second thread costs more than it brings."""


class Threads:
    """A pool, and how many of its threads, the caller's included, share the work of one step."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool = pool
        self._count = count if pool is not None else 1

    def spread(self, part: Callable[[int, int], None], count: int) -> None:
        """Call `part(first, last)` for pieces of [0, count)."""
        threads = min(self._count, count)
        if self._pool is None or threads < 2:
            if count:
                part(0, count)
            return
        edges = [count * place // threads for place in range(threads + 1)]
        waiting = [self._pool.submit(part, first, last) for first, last in pairwise(edges[1:])]
        part(0, edges[1])
        for future in waiting:
            future.result()


ALONE = Threads()
