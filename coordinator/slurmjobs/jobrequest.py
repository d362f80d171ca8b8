"""What the options of sbatch ask for, as far as it can be checked before a job is submitted.

All options go to sbatch as they are. Here only those are read that say how large the job is and where it runs; an
option that is not known here is left to sbatch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.timelimit import slurm_time_s
from scheduling.errors import ConfigError

_SHORT = {
    "-N": "--nodes", "-n": "--ntasks", "-p": "--partition", "-t": "--time", "-G": "--gpus", "-J": "--job-name",
    "-o": "--output", "-d": "--dependency", "-a": "--array", "-c": "--cpus-per-task", "-W": "--wait",
    "-A": "--account", "-q": "--qos", "-C": "--constraint", "-D": "--chdir", "-w": "--nodelist", "-x": "--exclude",
    "-e": "--error", "-M": "--clusters", "-b": "--begin", "-L": "--licenses", "-m": "--distribution",
    "-S": "--core-spec", "-B": "--extra-node-info", "-F": "--nodefile", "-i": "--input",
}  # fmt: skip
_WITH_VALUE = {name for name in _SHORT.values() if name != "--wait"} | {
    "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--gres", "--mem", "--mem-per-cpu", "--mem-per-gpu",
    "--cpus-per-gpu", "--export", "--signal", "--mail-type", "--mail-user", "--reservation", "--licenses",
    "--gpu-bind", "--comment", "--deadline", "--open-mode", "--time-min", "--tmp", "--bb", "--bbf",
    "--cluster-constraint", "--container", "--cores-per-socket", "--cpu-freq", "--delay-boot", "--export-file", "--gid",
    "--gpu-freq", "--gpus-per-socket", "--gres-flags", "--hint", "--mcs-label", "--mem-bind", "--mincpus",
    "--ntasks-per-core", "--ntasks-per-gpu", "--ntasks-per-socket", "--power", "--prefer", "--priority", "--profile",
    "--sockets-per-node", "--switches", "--thread-spec", "--threads-per-core", "--uid", "--wckey",
}  # fmt: skip
_OURS = {
    "--dependency": "llmpi submit makes the jobs depend on each other itself",
    "--array": "an array works on slices of its input, each a run of its own: sbatch --array=0-7 slurm/mpirun.sbatch",
    "--wait": "write --wait, which waits for the run, where -W waits for one job",
    "--wrap": "llmpi submit writes the script itself",
    "--parsable": "llmpi submit prints the job's number, with --json for programs",
    "--clusters": "a run directory is one cluster's",
    "--test-only": "use --dry-run",
}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The options of sbatch: `words` as they were given, and what they say. None: they do not say.

    `by_gpu`: the tasks follow from the GPUs, or the other way round. `whole_nodes`: nobody else is on the job's nodes.
    """

    words: tuple[str, ...]
    partition: str | None
    nodes: int | None
    tasks: int | None
    tasks_per_node: int | None
    gpus_per_node: int | None
    gpus: int | None
    time_s: float | None
    log: str | None
    by_gpu: bool = False
    whole_nodes: bool = False

    @property
    def ranks(self) -> int | None:
        """Tasks that the job will have; where nothing says it, Slurm makes it one for each node."""
        if self.tasks is not None:
            return self.tasks
        if self.tasks_per_node is None and self.by_gpu:
            return None
        return (self.tasks_per_node or 1) * (self.nodes or 1)


def read_request(words: Sequence[str]) -> JobRequest:
    """Raises ConfigError: a word that is no option, a number that is none, or an option that is submit's own affair."""
    found: dict[str, str] = {}
    left, last = list(words), ""
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            values = f". If it belongs to {last}, write {last}={word}" if last.startswith("--") else ""
            raise ConfigError(
                f"{word!r} is no option of sbatch: write `llmpi submit [options of sbatch] -- batch -m MODEL …`{values}"
            )
        name = last = long_name(word)
        value = word.partition("=")[2] if word.startswith("--") else word[2:].removeprefix("=")
        if name in _OURS:
            raise ConfigError(f"{word if name == '--wait' else name} is not for llmpi submit: {_OURS[name]}")
        if name in _WITH_VALUE and not value and left:
            value = left.pop(0)
        found[name] = value
    return JobRequest(
        words=tuple(words), partition=found.get("--partition") or None, nodes=_count(found, "--nodes"),
        tasks=_count(found, "--ntasks"), tasks_per_node=_count(found, "--ntasks-per-node"),
        gpus_per_node=_gpus_per_node(found), gpus=_gpu_count(found.get("--gpus")), time_s=_time(found.get("--time")),
        log=found.get("--output"), by_gpu=not found.keys().isdisjoint(("--gpus-per-task", "--ntasks-per-gpu")),
        whole_nodes="--exclusive" in found,
    )  # fmt: skip


def long_name(word: str) -> str:
    """Of an option as it was written (-N2, --nodes=2) its long name (--nodes); one that is unknown as it is."""
    return word.partition("=")[0] if word.startswith("--") else _SHORT.get(word[:2], word[:2])


def _count(found: dict[str, str], name: str) -> int | None:
    """Of '2' or '2-4' (nodes) the least."""
    text = found.get(name)
    if text is None:
        return None
    number = re.match(r"\d+", text)
    if number is None or int(number[0]) == 0:
        raise ConfigError(f"{name}={text}: a number above 0 is wanted")
    return int(number[0])


def _gpu_count(text: str | None) -> int | None:
    """Of '4', 'a100:4' or 'a100:2,v100:2' all of them."""
    if not text:
        return None
    counts = [part.rpartition(":")[2] for part in text.split(",")]
    return sum(map(int, counts)) if all(count.isdigit() for count in counts) else None


def _gpus_per_node(found: dict[str, str]) -> int | None:
    if "--gpus-per-node" in found:
        return _gpu_count(found["--gpus-per-node"])
    kinds = [kind.split(":") for kind in found.get("--gres", "").split(",")]
    if gpus := [words[-1] for words in kinds if words[0] in ("gpu", "gres/gpu")]:
        return sum(int(count) if count.isdigit() else 1 for count in gpus)
    per_task = _gpu_count(found.get("--gpus-per-task"))
    tasks = _count(found, "--ntasks-per-node")
    return per_task * tasks if per_task is not None and tasks is not None else None


def _time(text: str | None) -> float | None:
    if not text:
        return None
    seconds = slurm_time_s(text)
    if seconds is None:
        raise ConfigError(f"--time={text}: give minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, as for sbatch")
    return seconds
