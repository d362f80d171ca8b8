"""Jobs that follow each other until a run is complete: each submits its successor when it begins.

So the run goes on however a job ends: at its time limit, killed, or with its node. A job after which nothing is left to
do takes its successor back, and so does the first one if its command was refused: the next one's would be, too. The
chain ends by itself when `FUTILE` jobs in a row have answered nothing. What became of its jobs is in the journal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.slurmjobs.journal import FOLDER, Link, note_begun, note_ended, read_journal
from coordinator.slurmjobs.partitions import Client, run_client
from scheduling.errors import EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, ConfigError, InfrastructureError
from storage.runjson import RUN_NAME, read_run
from storage.runstatus import status as run_status

SCRIPT = "job.sbatch"
FUTILE = 2
PREVIOUS, NEXT = "LLMPI_JOB_PREVIOUS", "LLMPI_JOB_NEXT"
"""The variables by which a job's ranks know the jobs before and after theirs."""


def begin(run_dir: Path, environ: Mapping[str, str] = os.environ, client: Client = run_client) -> tuple[Link, str]:
    """What a job does first: submit the one after it. Returns the job's link and what is to be told ('': nothing).

    Raises:
        ConfigError: this is no job of Slurm.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        raise ConfigError("this is no job of Slurm (there is no SLURM_JOB_ID): it is for scripts of llmpi submit")
    journal = read_journal(run_dir)
    done = run_status(run_dir).done if (run_dir / RUN_NAME).exists() else 0
    before = [link.job for link in journal.links if link.job != job]
    previous = before[-1] if before else ""
    told, following = "", ""
    again = [link.next for link in journal.links if link.job == job and link.next and in_queue([link.next], client)]
    chain = journal.led_to(job)[:FUTILE]
    if again:
        following = again[-1]  # Slurm has put this job back into its queue
    elif len(chain) == FUTILE and all(link.done == done for link in chain):
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
    try:
        note_begun(run_dir, link)
    except OSError as error:
        told = f"{run_dir / FOLDER} cannot be written ({error.strerror}), so it is not noted which job follows which"
    return link, told


def end(
    run_dir: Path, status: int, following: str, environ: Mapping[str, str] = os.environ, client: Client = run_client
) -> str:
    """What a job does last. `status`: its exit status. Returns what is to be told.

    The successor is taken back if nothing is left to do, somebody stopped the run, or the command was refused before
    any job of the chain came to it. (Later it is not the command that is to blame.)
    """
    job = environ.get("SLURM_JOB_ID", "")
    with contextlib.suppress(OSError):  # the job is over, and its log has the status, too
        note_ended(run_dir, job, status)
    if not following:
        return ""
    over, stopped = status in (EXIT_OK, EXIT_SOME_FAILED), _was_stopped(run_dir, job)
    refused = status == EXIT_USAGE and not read_journal(run_dir).led_to(job)
    if not (over or stopped or refused):
        return f"job {following} goes on with the run"
    try:
        client(["scancel", following])
    except (ConfigError, InfrastructureError) as error:
        return f"job {following}, which would find nothing to do, could not be cancelled: {error}"
    if refused:
        return f"the command was refused: job {following}, to which the same would happen, is cancelled"
    return f"the run was stopped: job {following} is cancelled" if stopped else ""


def _was_stopped(run_dir: Path, job: str) -> bool:
    """Whether the last session is this job's, and ended because somebody asked for it by `llmpi stop`."""
    if not (run_dir / RUN_NAME).exists():
        return False
    sessions = read_run(run_dir)["sessions"]
    last = sessions[-1] if sessions else {}
    return last.get("slurm_job") == job and "llmpi stop" in str(last.get("reason", ""))


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
    """Those of `jobs` that wait or run, those that run first."""
    return sorted(_squeue(jobs, [], client), key=lambda job: (job.state != "RUNNING", job.job))


def last_state(job: str, client: Client = run_client) -> str:
    """The state of a job that may be over, as in CANCELLED; '' if Slurm has forgotten it."""
    found = _squeue([job], ["-t", "all"], client)
    return found[0].state if found else ""


def _squeue(jobs: Sequence[str], more: Sequence[str], client: Client) -> list[Queued]:
    try:
        lines = client(["squeue", "-h", *more, "-j", ",".join(jobs), "-o", "%i|%T|%R"]).splitlines()
    except InfrastructureError as error:
        if "Invalid job id" in str(error):  # how squeue says of a single job that it is long over
            return []
        raise
    return [Queued(*line.strip().split("|", 2)) for line in lines if line.strip()]
