"""Who works where: devices and processors for every worker rank, decided once from all ranks' `Host`s.

Theory: ranks are grouped by the name of their host. Each worker rank of a host is matched to GPUs that it can
see: a bipartite matching, because a launcher may give each rank a mask of its own (srun --gpus-per-task), the
same mask to all (mpirun), or anything between. Loads are kept as even as the masks allow, never above
`ranks_per_gpu`. Ranks are dealt GPUs in order of local rank, GPUs are dealt in PCI order, so the same hosts
always give the same plan. Processors near a worker's GPU (all of the host's for a CPU worker) are then cut into
one run of neighbours a worker.

Rank 0 works too if asked to, if it is alone, or if its host has a GPU that no other rank is given.

This module does not know how hosts were looked at or how a placement is applied: `Host`s in, `Placement`s out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from scheduling.backends import CUDA, mask_of, of
from scheduling.cpushares import CpuShare, share_cpus
from scheduling.errors import BugError, ConfigError
from scheduling.messages import Gpu, Host, Placement

DEVICE_MASK = CUDA.variables[0]
"""The variable that hides GPUs from a CUDA build. UUIDs are written into it: an index means another device
under another mask or device order. Those of other builds are in `scheduling.backends`."""


_LISTED_BY = {
    "cuda": "nvidia-smi",
    "hip": "rocminfo",
    "sycl": "sycl-ls",
    "vulkan": "vulkaninfo --summary",
    "metal": "system_profiler SPDisplaysDataType",
}
"""What lists a backend's devices for a person."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement for each worker rank. Rank 0 has one only if `coordinator_works`. `notes` are for people."""

    placements: dict[int, Placement]
    coordinator_works: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Ask:
    """What the user asked for, with the checks that need no host."""

    gpus_per_rank: int
    ranks_per_gpu: int
    want_gpu: bool | None

    def __post_init__(self) -> None:
        for flag, value in (("--gpus-per-rank", self.gpus_per_rank), ("--ranks-per-gpu", self.ranks_per_gpu)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}: it must be 1 or more")


def plan(
    hosts: Mapping[int, Host],
    *,
    rank0_works: bool | None = None,
    gpus_per_rank: int = 1,
    ranks_per_gpu: int = 1,
    want_gpu: bool | None = None,
) -> Plan:
    """Place the workers among `hosts` (by rank, rank 0 included).

    `rank0_works` None decides by itself (see above). `want_gpu` True: a worker without a GPU is an error; None:
    GPUs where there are some; False: processors only, and GPUs hidden from builds that would use them.
    Raises ConfigError where the ranks do not fit the devices; its text names the host and the way out.
    """
    ask = _Ask(gpus_per_rank, ranks_per_gpu, want_gpu)
    if 0 not in hosts:
        raise BugError(f"placement without rank 0: ranks {sorted(hosts)}")
    if rank0_works is False and len(hosts) == 1:
        raise ConfigError("rank 0 is alone and told not to work: start at least 2 ranks, or let rank 0 work")
    works = bool(rank0_works) or len(hosts) == 1
    placements: dict[int, Placement] = {}
    notes: list[str] = []
    if len(hosts) == 1 and rank0_works is None:
        notes.append("rank 0 works too: it is the only rank")
    for name in sorted({host.hostname for host in hosts.values()}):
        ranks = _in_local_order({rank: host for rank, host in hosts.items() if host.hostname == name})
        side = _HostSide(name, _with_unknown_filled(name, ranks, notes), ask)
        workers = [rank for rank in ranks if rank != 0 or works]
        devices = side.deal(workers)
        if rank0_works is None and not works and 0 in ranks:
            extra = side.spare_for_rank0(devices)
            if extra is not None:
                devices, works = extra, True
                notes.append(f"rank 0 works too: its host {name} has a GPU that no other rank is given")
                workers = [rank for rank in ranks if rank in devices]
        notes += side.notes(workers, devices)
        placements |= side.placements(workers, devices, notes)
    return Plan(dict(sorted(placements.items())), works, tuple(notes))


def plan_alone(
    host: Host, *, gpus_per_rank: int = 1, ranks_per_gpu: int = 1, want_gpu: bool | None = None
) -> list[Placement]:
    """Workers for one process without MPI: one for each visible GPU (or group of `gpus_per_rank`), else one on
    the CPU. Raises ConfigError as `plan` does."""
    ask = _Ask(gpus_per_rank, ranks_per_gpu, want_gpu)
    count = max(1, len(host.gpus) // gpus_per_rank * ranks_per_gpu) if want_gpu is not False else 1
    side = _HostSide(host.hostname, dict.fromkeys(range(count), host), ask)
    devices = side.deal(range(count))
    return list(side.placements(range(count), devices, []).values())


def unparted(name: str, gpus: Sequence[Gpu], taken: Collection[str]) -> list[str]:
    """Notes on those of host `name`'s devices that stand for all and whose UUIDs are among `taken`."""
    nameless = [gpu.name for gpu in gpus if gpu.mask_entry is None and gpu.uuid in taken]
    return [f"{name}: {what}: not parted among workers" for what in nameless]


def _in_local_order(hosts: Mapping[int, Host]) -> dict[int, Host]:
    """The ranks of one host by local rank; those whose launcher gave none come last, by rank."""

    def key(rank: int) -> tuple[bool, int, int]:
        local = hosts[rank].local_rank
        return local is None, local or 0, rank

    return {rank: hosts[rank] for rank in sorted(hosts, key=key)}


def _with_unknown_filled(name: str, hosts: dict[int, Host], notes: list[str]) -> dict[int, Host]:
    """Lend a rank that could not ask for its GPUs the answer of a neighbour under the same mask, if any."""
    answers = {
        (host.backends, host.mask): host.gpus for host in reversed(hosts.values()) if host.gpus_known and host.gpus
    }
    filled = dict(hosts)
    for rank, host in hosts.items():
        if host.gpus_known or host.gpus:
            continue
        if (same := (host.backends, host.mask)) in answers:
            filled[rank] = msgspec.structs.replace(host, gpus=answers[same])
            notes.append(f"rank {rank} on {name} could not ask for its GPUs: those of its neighbours are assumed")
        elif answers:
            notes.append(f"rank {rank} on {name} could not ask for its GPUs, and its device mask is its own")
        elif host.mask is not None and host.mask[1].strip() not in ("", "-1"):
            notes.append(f"rank {rank} on {name} has {host.mask[0]} set, but its GPUs could not be asked for")
    return filled


class _HostSide:
    """The ranks of one host, in dealing order, and its GPUs, in PCI order."""

    def __init__(self, name: str, hosts: Mapping[int, Host], ask: _Ask) -> None:
        self.name = name
        self.hosts = hosts
        self.ask = ask
        union = {gpu.uuid: gpu for host in hosts.values() for gpu in host.gpus}
        self.gpus = sorted(union.values(), key=lambda gpu: (gpu.pci_bus_id or "~", gpu.index, gpu.uuid))
        sliced = any(gpu.uuid.startswith("MIG-") for gpu in self.gpus)
        if ask.gpus_per_rank > 1 and sliced and ask.want_gpu is not False:
            raise ConfigError(
                f"--gpus-per-rank {ask.gpus_per_rank} on {name}: its GPUs are MIG devices, and a process can use "
                "only one of those"
            )

    def sees(self, rank: int) -> list[str]:
        mine = {gpu.uuid for gpu in self.hosts[rank].gpus}
        return [gpu.uuid for gpu in self.gpus if gpu.uuid in mine]

    def deal(self, workers: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """UUIDs for each of `workers`; an empty tuple means the CPU. Raises ConfigError if they do not fit."""
        on_gpu = [rank for rank in workers if self.ask.want_gpu is not False and self.sees(rank)]
        blind = [rank for rank in workers if rank not in on_gpu]
        if self.ask.want_gpu and blind:
            unknown = any(not self.hosts[rank].gpus_known for rank in blind)
            backend = of(self.hosts[blind[0]].backends)
            why = "NVML cannot be asked there" if unknown else "it sees none"
            check = " and ".join([_LISTED_BY[backend.name], *backend.variables[:1]])
            raise ConfigError(
                f"a GPU was asked for and is not there: rank {blind[0]} on {self.name} has none ({why}). "
                f"Check {check} there, or run on the CPU with --device cpu"
            )
        dealt = self._match(on_gpu)
        if dealt is None:
            raise ConfigError(self._misfit(on_gpu))
        return {rank: dealt.get(rank, ()) for rank in workers}

    def _match(self, ranks: Sequence[int]) -> dict[int, tuple[str, ...]] | None:
        """The evenest matching: the smallest load per GPU, up to `ranks_per_gpu`, that serves all of `ranks`."""
        visible = {rank: self.sees(rank) for rank in ranks}
        for capacity in range(1, self.ask.ranks_per_gpu + 1):
            found = match(visible, each=self.ask.gpus_per_rank, capacity=capacity)
            if found is not None:
                return found
        return None

    def spare_for_rank0(self, dealt: Mapping[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]] | None:
        """`dealt` with rank 0 on GPUs that nobody else has, others moved if their masks ask for it; else None."""
        if self.ask.want_gpu is False or not self.sees(0):
            return None
        each = self.ask.gpus_per_rank
        on_gpu = [rank for rank, uuids in dealt.items() if uuids]
        again = match({rank: self.sees(rank) for rank in [*on_gpu, 0]}, each=each, capacity=1)
        if again is not None:
            return {**dealt, **again}
        taken = {uuid for uuids in dealt.values() for uuid in uuids}
        spare = [uuid for uuid in self.sees(0) if uuid not in taken]
        return {**dealt, 0: tuple(spare[:each])} if len(spare) >= each else None

    def _misfit(self, ranks: Sequence[int]) -> str:
        each, per_gpu = self.ask.gpus_per_rank, self.ask.ranks_per_gpu
        seen = {uuid for rank in ranks for uuid in self.sees(rank)}
        fits = len(seen) // each * per_gpu
        where = f"{self.name}: {_count(len(ranks), 'worker rank')} of {_count(each, 'GPU')} each, "
        if nameless := [gpu for gpu in self.gpus if gpu.mask_entry is None]:
            return (
                f"{where}but there is no mask that could part {nameless[0].name}. Start one worker there, share with "
                f"--ranks-per-gpu {len(ranks)}, or run on the CPU with --device cpu"
            )
        if len(ranks) <= fits:
            masks = "; ".join(f"rank {rank} sees {', '.join(map(_short, self.sees(rank)))}" for rank in ranks[:4])
            return (
                f"{where}but the launcher's device masks do not leave each enough of the {len(seen)} ({masks}). "
                "Give the ranks different GPUs (srun --gpus-per-task) or no mask, or allow sharing with "
                "--ranks-per-gpu"
            )
        ways = [f"start at most {_count(fits, 'worker')} there" if fits else ""]
        if len(seen) >= each:
            ways.append(f"share GPUs with --ranks-per-gpu {-(-len(ranks) // (len(seen) // each))}")
        else:
            ways.append(f"take --gpus-per-rank {len(seen)} or less")
        ways.append("run on the CPU with --device cpu")
        sharing = f" shared by up to {per_gpu} ranks" if per_gpu > 1 else ""
        return f"{where}but there {_is(len(seen))} {_count(len(seen), 'GPU')}{sharing}. " + _sentence(ways)

    def notes(self, workers: Sequence[int], dealt: Mapping[int, tuple[str, ...]]) -> list[str]:
        lines: list[str] = []
        if not workers:
            return lines
        taken = {uuid for uuids in dealt.values() for uuid in uuids}
        on_cpu = [rank for rank in workers if not dealt[rank]]
        idle = len(self.gpus) - len(taken)
        lines += unparted(self.name, self.gpus, taken)
        if self.ask.want_gpu is not False and taken and idle:
            lines.append(f"{self.name}: {idle} of {_count(len(self.gpus), 'GPU')} are given to no rank")
        if on_cpu and self.gpus and self.ask.want_gpu is not False:
            lines.append(f"{self.name}: {_count(len(on_cpu), 'worker')} on the CPU, for they see none of its GPUs")
        return lines

    def placements(
        self, workers: Sequence[int], dealt: Mapping[int, tuple[str, ...]], notes: list[str]
    ) -> dict[int, Placement]:
        near = {rank: self._near(rank, dealt[rank]) for rank in workers}
        shares = share_cpus({rank: self.hosts[rank] for rank in workers}, near)
        if any(share.oversubscribed for share in shares.values()):
            processors = len({cpu for rank in workers for cpu in self.hosts[rank].cpus})
            notes.append(
                f"{self.name}: {_count(len(workers), 'worker')} on {_count(processors, 'processor')}: "
                "oversubscribed, one thread each"
            )
        elif workers and not any(dealt.values()):
            threads = sorted({shares[rank].threads for rank in workers})
            each = str(threads[0]) if len(threads) == 1 else f"{threads[0]} to {threads[-1]}"
            notes.append(
                f"{self.name}: {_count(len(workers), 'worker')} on the CPU, {each} "
                f"thread{'' if threads == [1] else 's'}{' each' if len(workers) > 1 else ''}"
            )
        return {rank: self._placement(rank, dealt[rank], shares[rank]) for rank in workers}

    def _near(self, rank: int, uuids: Collection[str]) -> tuple[int, ...]:
        """Processors of the NUMA nodes of `uuids` that the rank may use; empty where that says nothing."""
        host = self.hosts[rank]
        nodes = {gpu.numa_node for gpu in self.gpus if gpu.uuid in uuids}
        near = {cpu for node in nodes if node is not None for cpu in host.numa_cpus.get(node, ())}
        return tuple(cpu for cpu in host.cpus if cpu in near) if None not in nodes else ()

    def _placement(self, rank: int, uuids: tuple[str, ...], share: CpuShare) -> Placement:
        host = self.hosts[rank]
        known = {gpu.uuid: gpu for gpu in self.gpus}
        if uuids:
            mask = mask_of(host.backends, [known[uuid] for uuid in uuids])
            what = ", ".join(_said(known[uuid]) for uuid in uuids)
            note = f"{what}, {_count(share.threads, 'thread')}"
        else:
            hide = self.ask.want_gpu is False or bool(self.gpus)
            mask = mask_of(host.backends, []) if hide else {}
            note = f"CPU, {_count(share.threads, 'thread')} of {len(host.cpus) or 'an unknown number'}"
        return Placement(
            device_mask=mask,
            gpu_uuids=uuids,
            backend=of(host.backends).name,
            cpus=share.cpus,
            threads=share.threads,
            note=note,
        )


def match(visible: Mapping[int, Sequence[str]], *, each: int, capacity: int) -> dict[int, tuple[str, ...]] | None:
    """`each` different devices for every rank out of those `visible` to it, no device to more than `capacity`.

    Ranks are served in the mapping's order, devices least loaded first and then in the order given; an earlier
    rank is moved only if a later one cannot be served otherwise (augmenting paths). None if it is impossible.
    """
    owned: dict[int, list[str]] = {rank: [] for rank in visible}
    holders: dict[str, list[int]] = {uuid: [] for uuids in visible.values() for uuid in uuids}

    def take(rank: int, tried: set[str]) -> bool:
        wanted = [uuid for uuid in visible[rank] if uuid not in owned[rank] and uuid not in tried]
        wanted.sort(key=lambda uuid: len(holders[uuid]))
        for uuid in wanted:
            if uuid in tried:
                continue
            tried.add(uuid)
            if len(holders[uuid]) >= capacity:
                mover = next((other for other in holders[uuid] if take(other, tried)), None)
                if mover is None:
                    continue
                holders[uuid].remove(mover)
                owned[mover].remove(uuid)
            holders[uuid].append(rank)
            owned[rank].append(uuid)
            return True
        return False

    for rank in visible:
        if not all(take(rank, set()) for _ in range(each)):
            return None
    return {rank: tuple(uuid for uuid in visible[rank] if uuid in owned[rank]) for rank in visible}


def _said(gpu: Gpu) -> str:
    # What stands for all has the reason in brackets, which is a note of the host's.
    return gpu.name.partition(" (")[0] if gpu.mask_entry is None else f"{_short(gpu.uuid)} (index {gpu.index})"


def _short(uuid: str) -> str:
    return uuid if len(uuid) <= 12 else f"{uuid[:12]}…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _sentence(ways: Sequence[str]) -> str:
    """'Start 4 there, share …, or run …'"""
    said = [way for way in ways if way]
    text = ", ".join(said[:-1]) + (", or " if len(said) > 1 else "") + said[-1]
    return text[0].upper() + text[1:]
