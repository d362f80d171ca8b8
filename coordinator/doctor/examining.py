"""`llmpi doctor`: the order of it all. Rank 0 asks, judges and prints; the others answer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from coordinator.doctor.about_files import about_files, about_model
from coordinator.doctor.about_gpus import about_devices, about_gpus, about_llama, about_pinning
from coordinator.doctor.about_mpi import MpiFacts, about_mpi
from coordinator.doctor.about_network import LinkFacts, Together, about_clocks, about_network, about_versions
from coordinator.doctor.about_processors import about_environment, about_limits, about_processors
from coordinator.doctor.about_slurm import SlurmFacts, about_slurm
from coordinator.doctor.exchange import TOGETHER_S, Rank0, answer
from coordinator.doctor.facts import Facts, Node
from coordinator.doctor.findings import Finding, Report, merged, warning
from coordinator.doctor.gather import Options, gather
from coordinator.doctor.probe_mpi import look_at_library, look_at_traffic, look_at_world
from coordinator.doctor.probe_slurm import look_at_slurm
from coordinator.doctor.watching import watched
from coordinator.launch import Launch, check_singleton, detect
from coordinator.leaving import at_last
from coordinator.mpi import World
from coordinator.mpi_collectives import Collectives
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, ConfigError, RankLostError

START_S = 120.0
LEAVE_S = 5.0
"""How long ranks may take to leave; those that did not answer are not waited for any longer."""


class Examined:
    """All that was found, on rank 0."""

    def __init__(self, mpi: MpiFacts, facts: dict[int, Facts]) -> None:
        self.mpi = mpi
        self.facts = facts
        self.silent: list[int] = []
        self.links: list[LinkFacts] = []
        self.together: Together | None = None
        self.slurm: SlurmFacts | None = None


def run_doctor(options: Options, *, timeout_s: float, as_json: bool) -> int:
    """Look, and print on rank 0. Returns the exit code."""
    launch = detect(os.environ)
    if launch.launcher == "none":
        examined = Examined(look_at_library(), {0: gather(0, options)})
    else:
        with watched(max(START_S, timeout_s), speaks=launch.speaks):
            world = World()
        at_last(world.leave)
        singleton = _singleton(launch, world)
        if singleton and not launch.speaks:
            return EXIT_OK
        if world.rank > 0:
            return _serve(world, options)
        examined = _lead(world, launch, singleton, options, timeout_s)
        if examined.silent:
            world.goodbye_s = lambda: LEAVE_S
    examined.slurm = look_at_slurm(os.environ)
    found = judge(examined, timeout_s, alone=examined.mpi.size == 1)
    _print(found, as_json)
    return found.exit_code()


def _singleton(launch: Launch, world: World) -> str:
    try:
        check_singleton(launch, world.size, os.environ, world.library())
    except ConfigError as error:
        return str(error)
    return ""


def _serve(world: World, options: Options) -> int:
    try:
        answer(world.endpoint(), gather(world.rank, options), lambda: _collectives(world))
    except RankLostError as error:
        print(f"llmpi: rank {world.rank}: {error}", file=sys.stderr)
        world.abort(EXIT_INFRASTRUCTURE)
    return EXIT_OK


def _collectives(world: World) -> Collectives:
    return Collectives(world, patience_s=TOGETHER_S, idle=lambda: time.sleep(0))


def _lead(world: World, launch: Launch, singleton: str, options: Options, timeout_s: float) -> Examined:
    rank0 = Rank0(world.endpoint())
    facts = {0: gather(0, options)}
    others = range(1, world.size)
    facts |= rank0.hear(others, timeout_s)
    facts = dict(sorted(facts.items()))
    examined = Examined(look_at_world(world, launch.launcher, singleton), facts)
    examined.silent = [rank for rank in others if rank not in facts]
    examined.links = rank0.measure_links(_one_of_each_host(facts), quick=options.quick)
    examined.silent += [link.rank for link in examined.links if link.problem and link.rank not in examined.silent]
    answering = [rank for rank in others if rank not in examined.silent]
    if world.size > 1 and not examined.silent:
        examined.together = rank0.together(answering, _collectives(world), quick=options.quick)
    examined.mpi = _with_traffic(examined.mpi)
    rank0.dismiss(answering)
    return examined


def _with_traffic(mpi: MpiFacts) -> MpiFacts:
    from msgspec.structs import replace

    return replace(mpi, traffic=look_at_traffic())


def _one_of_each_host(facts: Mapping[int, Facts]) -> list[tuple[int, str, bool]]:
    """(rank, host, whether it is rank 0's), its lowest one that is not rank 0."""
    found: dict[str, int] = {}
    for rank, one in facts.items():
        if rank > 0:
            found.setdefault(one.host.hostname, rank)
    own = facts[0].host.hostname
    return [(rank, host, host == own) for host, rank in found.items()]


# ---------------------------------------------------------------- verdicts


def judge(examined: Examined, timeout_s: float, *, alone: bool) -> Report:
    """Findings by subject, of plain facts."""
    facts = examined.facts
    hosts = {rank: one.host.hostname for rank, one in facts.items()}
    nodes = _nodes(facts)
    reasons = {one.host.hostname: one.gpu_reason for one in reversed(facts.values())}
    environ = facts[0].environ
    subjects: dict[str, list[Finding]] = {
        "MPI": about_mpi(examined.mpi, hosts, examined.silent, environ, timeout_s),
        "network": about_network(examined.links, examined.together),
        "clocks": about_clocks(examined.links),
        "versions": about_versions({rank: one.versions for rank, one in facts.items()}, hosts),
        "GPUs": about_gpus(nodes, reasons),
        "llama.cpp": [*about_llama(nodes), *about_devices(facts)],
        "placement": [] if examined.mpi.singleton else about_pinning(facts, alone=alone),
        "processors": about_processors(facts),
        "files": about_files(nodes),
        "model": about_model({rank: one.model for rank, one in facts.items() if one.model is not None}, hosts),
        "limits": about_limits(nodes, examined.mpi.size),
        "environment": about_environment(facts, nodes, examined.mpi.launcher),
        "Slurm": about_slurm(examined.slurm),
        "not looked at": _unanswered(facts),
    }
    return Report({name: tuple(found) for name, found in subjects.items() if found})


def _nodes(facts: Mapping[int, Facts]) -> dict[str, Node]:
    """By host: what its first rank that looked has found."""
    nodes: dict[str, Node] = {}
    for one in facts.values():
        if one.node is not None:
            nodes.setdefault(one.host.hostname, one.node)
    return nodes


def _unanswered(facts: Mapping[int, Facts]) -> list[Finding]:
    return merged(
        warning(what, f"could not be found out: {why}", "look at that host: a driver or a file system hangs there",
                one.host.hostname)
        for one in facts.values() for what, why in one.unanswered.items()
    )  # fmt: skip


def _print(found: Report, as_json: bool) -> None:
    if as_json:
        from coordinator.values import print_json

        print_json(found.data())
        return
    from coordinator.doctor.show import print_report

    print_report(found, sys.stdout)
