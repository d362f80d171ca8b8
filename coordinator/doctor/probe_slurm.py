"""Slurm's view of the job that this process is in, asked of its own clients."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from coordinator.doctor.about_slurm import SlurmFacts

ANSWER_S = 10.0
Ask = Callable[[Sequence[str]], str]
"""Runs a command and gives what it prints. Raises OSError, subprocess.SubprocessError."""


def ask(command: Sequence[str]) -> str:
    done = subprocess.run(
        list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S, check=True
    )
    return done.stdout


def look_at_slurm(
    environ: Mapping[str, str], ask: Ask = ask, wall_clock: Callable[[], float] = time.time
) -> SlurmFacts | None:
    """None outside of a job."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        said = ask(["scontrol", "show", "job", "-o", job])
    except subprocess.CalledProcessError as error:
        return SlurmFacts(job=job, problem=(error.stderr or "").strip() or f"scontrol ended with {error.returncode}")
    except subprocess.TimeoutExpired:
        return SlurmFacts(job=job, problem=f"scontrol did not answer within {ANSWER_S:.0f} s")
    except OSError as error:
        return SlurmFacts(job=job, problem=f"scontrol cannot be run: {error.strerror or error}")
    told = dict(re.findall(r"(\w+)=(\S*)", said))
    partition = told.get("Partition", "")
    try:
        limit = ask(["sinfo", "-h", "-p", partition, "-o", "%l"]).split() if partition else []
    except (OSError, subprocess.SubprocessError):
        limit = []
    try:
        left_s = datetime.fromisoformat(told.get("EndTime", "")).timestamp() - wall_clock()
    except ValueError:
        left_s = None
    requeue, restarts = told.get("Requeue", ""), told.get("Restarts", "0")
    return SlurmFacts(
        job=job, state=told.get("JobState", ""), partition=partition, nodes=told.get("NodeList", ""), left_s=left_s,
        unlimited=told.get("TimeLimit") == "UNLIMITED", limit=told.get("TimeLimit", ""),
        partition_limit=limit[0] if limit else "", requeue=requeue == "1" if requeue else None,
        restarts=int(restarts) if restarts.isdigit() else 0,
    )  # fmt: skip
