"""`llmpi submit`: from options and a command to a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.durations import duration
from coordinator.slurmjobs.chain import SCRIPT, in_queue, submit
from coordinator.slurmjobs.following import Follower, interrupted
from coordinator.slurmjobs.jobrequest import long_name, read_request
from coordinator.slurmjobs.jobscript import write_script
from coordinator.slurmjobs.journal import FOLDER, note_submitted, read_journal
from coordinator.slurmjobs.partitions import Client, check_fits, read_partitions, run_client
from coordinator.values import print_json, write_text
from scheduling.errors import EXIT_OK, ConfigError, RunDirError
from storage.files import OsDisk
from storage.joblock import JobLock, holder_of, this_process
from storage.rundir import LOCK_NAME
from storage.runjson import RUN_NAME, unusable

LEAVING_S = 20
"""A job whose command has ended is given so long to leave the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """`launcher`: whose template, 'mpirun' or 'srun'. `chained`: whether each job submits the one after it."""

    launcher: str = "mpirun"
    chained: bool = True
    dry_run: bool = False
    wait: bool = False
    as_json: bool = False


def submit_run(
    words: Sequence[str],
    command: Sequence[str],
    run_dir: Path,
    options: SubmitOptions,
    client: Client = run_client,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Check, write the script, submit, and follow if that is wanted. Returns the exit code.

    `words`: options of sbatch. `command`: arguments of `llmpi batch`, checked, without the run directory.
    """
    if options.dry_run and options.wait:
        raise ConfigError("--dry-run submits nothing that --wait could wait for: leave one of them out")
    wanted = read_request(words)
    if options.launcher == "mpirun" and "--gpus-per-task" in map(long_name, words) and (wanted.nodes or 1) > 1:
        raise ConfigError(
            "--gpus-per-task on several nodes is not for mpirun, whose daemons Slurm takes for the tasks: give "
            "--gpus-per-node, or --launcher srun"
        )
    partition, advice = check_fits(wanted, read_partitions(client))
    text = write_script(options.launcher, wanted, run_dir, command, options.chained)
    for line in advice:
        print(f"note: {line}", file=sys.stderr)
    if options.dry_run:
        write_text(text)
        return EXIT_OK
    script = run_dir / FOLDER / SCRIPT
    with _alone(run_dir):
        _refuse_second(run_dir, client, pause)
        _store(script, run_dir, text)
        job = submit(script, client)
        note_submitted(run_dir, job)
    if options.as_json:
        print_json({"job": job, "run_dir": str(run_dir), "script": str(script), "partition": partition.name})
    else:
        limit = wanted.time_s or partition.usual_time_s
        lasts = "" if limit == float("inf") else f", at most {duration(limit)} each" if options.chained else ""
        print(f"job {job} in partition {partition.name}{lasts}", flush=True)
        if not options.wait:
            print(f"`llmpi status {run_dir}` says how far it is, `llmpi stop {run_dir}` ends it in order", flush=True)
    if not options.wait:
        return EXIT_OK
    follower = Follower(run_dir, job, client)
    try:
        return follower.follow()
    except KeyboardInterrupt:
        return interrupted(run_dir, follower.job)


def _refuse_second(run_dir: Path, client: Client, pause: Callable[[float], None]) -> None:
    """Two chains on one run would take turns at refusing each other.

    A job that nobody works in any more, after `llmpi stop --wait` say, takes its successor back and leaves the queue in
    some seconds: it is waited for. One that is COMPLETING has done so.
    """
    jobs = read_journal(run_dir).recent()
    for second in range(LEAVING_S + 1):
        queued = in_queue(jobs, client) if jobs else []
        if not queued:
            return
        completing = all(job.state == "COMPLETING" for job in queued)
        ending = completing or (queued[0].state == "RUNNING" and not _is_worked_in(run_dir))
        if not ending or second == LEAVING_S:
            break
        if second == 1:
            print(f"llmpi: job {queued[0].job} of this run is ending, and is waited for", file=sys.stderr, flush=True)
        pause(1.0)
    raise RunDirError(
        f"job {queued[0].job} of this run is in the queue already ({queued[0].state.lower()}): "
        f"`scancel {' '.join(job.job for job in queued)}` ends it"
    )


def _is_worked_in(run_dir: Path) -> bool:
    """Also where no job has come so far that this could be told."""
    return not (run_dir / RUN_NAME).exists() or holder_of(OsDisk(), run_dir / LOCK_NAME)[0]


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Of two who submit the same run at once, one is refused. Makes the folder."""
    try:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        lock = JobLock(OsDisk(), run_dir / FOLDER / LOCK_NAME, this_process(time.time()))
    except OSError as error:
        raise unusable(run_dir, error) from error
    except RunDirError:
        raise RunDirError(f"another `llmpi submit` is submitting a job for {run_dir} at this moment") from None
    try:
        yield
    finally:
        lock.release()


def _store(script: Path, run_dir: Path, text: str) -> None:
    try:
        new = script.with_suffix(".tmp")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o755)
        new.replace(script)
    except OSError as error:
        raise unusable(run_dir, error) from error


def own_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line after `submit`: what stands before the first `--`, without submit's own options, and after it."""
    if "--" not in argv:
        raise ConfigError("nothing to submit: `llmpi submit [options of sbatch] -- batch -m MODEL -i FILE -o RUN_DIR`")
    at = list(argv).index("--")
    before, kept = list(argv[:at]), []
    while before:
        word = before.pop(0)
        if word in ("--dry-run", "--wait", "--no-chain", "--json"):
            continue
        if word == "--launcher":
            del before[:1]
        elif not word.startswith("--launcher="):
            kept.append(word)
    return kept, list(argv[at + 1 :])
