"""Jobs that follow each other until a run is complete: each submits its successor when it begins.

So the run goes on however a job ends: at its time limit, killed, or with its node. A job after which nothing is left to
do takes its successor back, and the chain ends by itself when `FUTILE` jobs in a row have answered nothing.
`RUN_DIR/slurm/jobs.jsonl` has a line for each job that has begun.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coordinator.slurmjobs.partitions import Client, run_client
from scheduling.errors import EXIT_OK, EXIT_SOME_FAILED, ConfigError, InfrastructureError
from storage.rundir import SLURM_NAME
from storage.runjson import RUN_NAME, read_run
from storage.runstatus import status as run_status

FOLDER = SLURM_NAME
SCRIPT = "job.sbatch"
JOBS = "jobs.jsonl"
FUTILE = 2
PREVIOUS, NEXT = "LLMPI_JOB_PREVIOUS", "LLMPI_JOB_NEXT"
"""The variables by which a job's ranks know the jobs before and after theirs."""


@dataclass(frozen=True, slots=True)
class Link:
    """A job of a chain. `done`: requests that were recorded when it began. `next`: '' if none was submitted."""

    job: str
    previous: str
    next: str
    done: int


def read_links(run_dir: Path) -> list[Link]:
    """The jobs that have begun, first one first. A line that was cut off by a crash is left out."""
    file = run_dir / FOLDER / JOBS
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(Link(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def begin(run_dir: Path, environ: Mapping[str, str] = os.environ, client: Client = run_client) -> tuple[Link, str]:
    """What a job does first: submit the one after it. Returns the job's link and what is to be told ('': nothing).

    Raises:
        ConfigError: this is no job of Slurm.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        raise ConfigError("this is no job of Slurm (there is no SLURM_JOB_ID): it is for scripts of llmpi submit")
    links = read_links(run_dir)
    done = run_status(run_dir).done if (run_dir / RUN_NAME).exists() else 0
    before = [link for link in links if link.job != job]
    previous = before[-1].job if before else ""
    told, following = "", ""
    again = [link.next for link in links if link.job == job and link.next and in_queue([link.next], client)]
    if again:
        following = again[-1]  # Slurm has put this job back into its queue
    elif len(before) >= FUTILE and all(link.done == done for link in before[-FUTILE:]):
        told = (
            f"the last {FUTILE} jobs have answered nothing, so none follows this one. Their logs say why; then "
            f"`sbatch {run_dir / FOLDER / SCRIPT}` goes on"
        )
    else:
        script = run_dir / FOLDER / SCRIPT
        try:
            following = submit(script, client, after=job)
        except (ConfigError, InfrastructureError) as error:
            told = f"no job follows this one, for it cannot be submitted here: {error}"
    link = Link(job, previous, following, done)
    with (run_dir / FOLDER / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(link)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return link, told


def end(run_dir: Path, status: int, following: str, client: Client = run_client) -> str:
    """What a job does last. `status` is what `llmpi status` said. Returns what is to be told.

    The successor is taken back if nothing is left to do, or somebody stopped the run.
    """
    if not following:
        return ""
    stopped = _was_stopped(run_dir)
    if status not in (EXIT_OK, EXIT_SOME_FAILED) and not stopped:
        return f"job {following} goes on with the run"
    try:
        client(["scancel", following])
    except (ConfigError, InfrastructureError) as error:
        return f"job {following}, which would find nothing to do, could not be cancelled: {error}"
    return f"the run was stopped: job {following} is cancelled" if stopped else ""


def _was_stopped(run_dir: Path) -> bool:
    """Whether the last session ended because somebody asked for it by `llmpi stop`."""
    if not (run_dir / RUN_NAME).exists():
        return False
    sessions = read_run(run_dir)["sessions"]
    return bool(sessions) and "llmpi stop" in str(sessions[-1].get("reason", ""))


def submit(script: Path, client: Client = run_client, *, after: str | None = None) -> str:
    """Submit a script, to begin when the job `after` has ended, however. Returns the job's number."""
    waits = [] if after is None else [f"--dependency=afterany:{after}"]
    return client(["sbatch", "--parsable", *waits, str(script)]).strip().split(";")[0]


@dataclass(frozen=True, slots=True)
class Queued:
    """A job that Slurm has not done with. `why`: why it waits, or where it runs."""

    job: str
    state: str
    why: str


def in_queue(jobs: Sequence[str], client: Client = run_client) -> list[Queued]:
    """Those of `jobs` that wait or run."""
    try:
        lines = client(["squeue", "-h", "-j", ",".join(jobs), "-o", "%i|%T|%R"]).splitlines()
    except InfrastructureError as error:
        if "Invalid job id" in str(error):  # how squeue says of a single job that it is long over
            return []
        raise
    return [Queued(*line.strip().split("|", 2)) for line in lines if line.strip()]
