"""What a Slurm has to offer, by `sinfo`, and whether a job fits it."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.durations import duration
from coordinator.slurmjobs.jobrequest import JobRequest
from coordinator.timelimit import slurm_time_s
from scheduling.errors import ConfigError, InfrastructureError
from scheduling.wording import counted

ANSWER_S = 60.0
_MISTYPED = re.compile(r"(?:unrecognized|invalid) option|is ambiguous|Invalid .*(?:specification|value)|not a valid")
"""What sbatch says of options that it cannot read. Its status is that of a Slurm that fails."""
_FORMAT = "%P|%a|%l|%L|%D|%c|%G|%t"

Client = Callable[[Sequence[str]], str]
"""Runs a command of Slurm and gives what it prints."""


@dataclass(frozen=True, slots=True)
class Partition:
    """`time_s`: the longest that a job may take (inf: no limit). `usual_time_s`: of one that does not say.
    `gpus_per_node`: of the node that has most."""

    name: str
    default: bool
    up: bool
    time_s: float
    usual_time_s: float
    nodes: int
    cpus_per_node: int
    gpus_per_node: int
    idle: int


def run_client(command: Sequence[str]) -> str:
    """The output of a command of Slurm.

    Raises:
        ConfigError: there is no such command here, or it cannot read an option. InfrastructureError: it failed,
            or does not answer.
    """
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise ConfigError(f"there is no {command[0]} here: llmpi submit is for the login node of a Slurm") from None
    except subprocess.TimeoutExpired:
        raise InfrastructureError(f"{command[0]} did not answer within {ANSWER_S:g} s") from None
    if done.returncode:
        lines = [line.removeprefix(f"{command[0]}: ") for line in done.stderr.strip().splitlines()]
        said = [line for line in lines if not line.startswith("Try ")] or [f"it ended with status {done.returncode}"]
        mistyped = command[0] == "sbatch" and _MISTYPED.search(said[-1])
        raise (ConfigError if mistyped else InfrastructureError)(f"{command[0]}: {said[-1]}")
    return done.stdout


def read_partitions(client: Client = run_client) -> list[Partition]:
    """All partitions that sinfo shows, the default one first."""
    found: dict[str, Partition] = {}
    try:
        lines = client(["sinfo", "-h", "-o", _FORMAT]).splitlines()
    except InfrastructureError as error:
        raise InfrastructureError(
            f"no Slurm answers here, so nothing can be checked or submitted ({error}): llmpi submit is for a login node"
        ) from None
    for line in lines:
        name, state, limit, usual, nodes, cpus, gres, node_state = line.strip().split("|")
        plain = name.rstrip("*")
        time_s = _limit(limit)
        idle = int(nodes) if node_state.rstrip("*~#$@+") == "idle" else 0
        cpu_count, gpus = int(cpus.rstrip("+")), _gpus(gres)
        if (old := found.get(plain)) is None:
            usual_s = min(time_s, _limit(usual))
            new = Partition(
                plain, name.endswith("*"), state == "up", time_s, usual_s, int(nodes), cpu_count, gpus, idle
            )
        else:
            new = Partition(
                plain, old.default, old.up, old.time_s, old.usual_time_s, old.nodes + int(nodes),
                max(old.cpus_per_node, cpu_count), max(old.gpus_per_node, gpus), old.idle + idle,
            )  # fmt: skip
        found[plain] = new
    return sorted(found.values(), key=lambda partition: not partition.default)


def _limit(text: str) -> float:
    """Seconds, inf where there is no limit, or it is not told."""
    return math.inf if text in ("infinite", "n/a", "NONE") else slurm_time_s(text) or math.inf


def _gpus(gres: str) -> int:
    """Of 'gpu:a100:4(S:0-1),shard:8' the GPUs."""
    count = 0
    for kind in re.sub(r"\(.*?\)", "", gres).split(","):
        words = kind.split(":")
        if words[0] == "gpu":
            count += int(words[-1]) if words[-1].isdigit() else 1
    return count


def check_fits(wanted: JobRequest, partitions: Sequence[Partition]) -> tuple[Partition, list[str]]:
    """The partition that a job will run in, and what a person should know of it.

    Raises:
        ConfigError: it would never start.
    """
    partition = _named(wanted, partitions)
    if not partition.up:
        raise ConfigError(f"partition {partition.name} takes no jobs now (sinfo says it is not up)")
    nodes = wanted.nodes or 1
    if nodes > partition.nodes:
        raise ConfigError(f"{nodes} nodes are wanted, but partition {partition.name} has {partition.nodes}")
    per_node = wanted.gpus_per_node or (math.ceil(wanted.gpus / nodes) if wanted.gpus else 0)
    if per_node > partition.gpus_per_node:
        raise ConfigError(
            f"{per_node} GPUs a node are wanted, but nodes of partition {partition.name} have "
            f"{partition.gpus_per_node or 'none'}"
        )
    if wanted.time_s is not None and wanted.time_s > partition.time_s:
        raise ConfigError(
            f"--time is {duration(wanted.time_s)}, but partition {partition.name} allows {duration(partition.time_s)}: "
            "leave it out. As many jobs follow each other as the run takes"
        )
    return partition, _advice(wanted, partition, per_node * nodes)


def _named(wanted: JobRequest, partitions: Sequence[Partition]) -> Partition:
    if not partitions:
        raise ConfigError("sinfo shows no partition: this Slurm has none that you may use")
    names = [partition.name for partition in partitions]
    if wanted.partition is None:
        if not partitions[0].default:
            raise ConfigError(f"this Slurm has no default partition: give -p {' or -p '.join(names)}")
        return partitions[0]
    first = wanted.partition.split(",")[0]  # Slurm takes any of a list, most often the first
    if first not in names:
        raise ConfigError(f"there is no partition {first}: this Slurm has {', '.join(names)}")
    return partitions[names.index(first)]


def _advice(wanted: JobRequest, partition: Partition, gpus: int) -> list[str]:
    """What is not wrong, but seldom meant."""
    ranks = wanted.ranks
    told = []
    if gpus == 0 and partition.gpus_per_node:
        told.append(
            f"no GPU is asked for, and nodes of {partition.name} have {partition.gpus_per_node}: e.g. --gpus-per-node="
            f"{partition.gpus_per_node} --ntasks-per-node={partition.gpus_per_node}"
        )
    elif gpus and ranks is not None and ranks < gpus:
        told.append(f"{gpus} GPUs are asked for and {ranks} ranks: {gpus - ranks} GPUs would idle")
    elif gpus and ranks is not None and ranks > gpus + 1:
        told.append(
            f"{ranks} ranks and {counted(gpus, 'GPU')}: without --ranks-per-gpu the job refuses that, and one rank for "
            "each GPU is what is fastest, mostly"
        )
    if gpus and (wanted.nodes or 1) > 1 and wanted.tasks and wanted.tasks_per_node is None and not wanted.whole_nodes:
        told.append(
            f"Slurm fills the first node with as many of {ranks} ranks as it has processors for, whatever GPUs it has: "
            "give --ntasks-per-node, or --exclusive for whole nodes"
        )
    return told
