"""Processors divided among the workers of one host.

Each worker has processors that it would like (those near its GPU) and those that it may use at all. Workers that
like the same ones get equal runs of neighbours of them, without overlap. Where there are fewer processors than
workers nobody is pinned apart: each may use all of them, with one thread, and the share says `oversubscribed`.

A quota (cgroup cpu.max) or Slurm's --cpus-per-task bounds the threads and never moves a worker.
This module knows nothing of devices or ranks beyond their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduling.messages import Host


@dataclass(frozen=True, slots=True)
class CpuShare:
    """`cpus` in rising order, empty if the worker's processors are unknown. At least one thread."""

    cpus: tuple[int, ...]
    threads: int
    oversubscribed: bool = False


def share_cpus(hosts: Mapping[int, Host], near: Mapping[int, Sequence[int]]) -> dict[int, CpuShare]:
    """A share for each rank of `hosts` (all on one host). `near[rank]` empty means: wherever it may run."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, host in hosts.items():
        groups.setdefault(tuple(near[rank]) or host.cpus, []).append(rank)
    taken: set[int] = set()
    shares: dict[int, CpuShare] = {}
    # Small sets first: a worker confined to a few processors has no choice, one with many can step aside.
    for wanted, ranks in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
        pool = _free(wanted, taken)
        if len(pool) < len(ranks):
            # Too few near the GPU: what else all of these ranks may use, in their own order of neighbours.
            common = set.intersection(*(set(hosts[rank].cpus) for rank in ranks))
            wider = _free([cpu for cpu in hosts[ranks[0]].cpus if cpu in common], taken)
            pool = wider if len(wider) >= len(ranks) else []
        for position, rank in enumerate(ranks):
            shares[rank] = _one(hosts[rank], wanted, pool, position, len(ranks), len(hosts))
            if not shares[rank].oversubscribed:
                taken.update(shares[rank].cpus)
    return {rank: shares[rank] for rank in hosts}


def _one(host: Host, wanted: Sequence[int], pool: Sequence[int], position: int, workers: int, on_host: int) -> CpuShare:
    """The share of the worker at `position` among `workers` that divide `pool`."""
    if not host.cpus:
        return CpuShare((), 1)
    if not pool:
        return CpuShare(tuple(sorted(wanted)), 1, oversubscribed=True)
    size, rest = divmod(len(pool), workers)
    start = position * size + min(position, rest)
    mine = list(pool[start : start + size + (position < rest)])
    if host.cpus_per_task is not None:
        mine = mine[: max(1, host.cpus_per_task)]
    threads = len(mine)
    if host.cpu_limit is not None:
        threads = max(1, min(threads, host.cpu_limit // on_host))
    return CpuShare(tuple(sorted(mine)), threads)


def _free(cpus: Sequence[int], taken: set[int]) -> list[int]:
    return [cpu for cpu in cpus if cpu not in taken]
