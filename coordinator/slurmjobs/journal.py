"""`RUN_DIR/slurm/jobs.jsonl`: what became of the jobs of a run, a line each time.

    {"submitted": "17"}                                          by llmpi submit
    {"job": "17", "previous": "", "next": "18", "done": 0}       the job begins, again after Slurm has put it back
    {"job": "17", "status": 3}                                   it ends: its exit status

A line is added whole. One that was cut off by a crash is left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.runjson import JOBS_NAME, SLURM_NAME

FOLDER = SLURM_NAME


@dataclass(frozen=True, slots=True)
class Link:
    """A job that has begun. `done`: requests that were recorded then. `next`: '' if none was submitted."""

    job: str
    previous: str
    next: str
    done: int


@dataclass(frozen=True, slots=True)
class Journal:
    """`links`: first one first. `submitted`: by `llmpi submit`, '' if none was. `statuses`: of jobs that have ended."""

    links: tuple[Link, ...]
    submitted: str
    statuses: dict[str, int]

    def led_to(self, job: str) -> list[Link]:
        """The jobs of the chain that `job` is in, the one just before it first; none if somebody submitted it."""
        found: list[Link] = []
        while link := next((link for link in reversed(self.links) if link.next == job), None):
            if link.job in {one.job for one in found}:
                break
            found.append(link)
            job = link.job
        return found

    def recent(self) -> list[str]:
        """Jobs that may wait or run."""
        last = self.links[-2:]
        named = [self.submitted, *(link.job for link in last), *(link.next for link in last)]
        return sorted({job for job in named if job})


def read_journal(run_dir: Path) -> Journal:
    """All that is told of the jobs of a run."""
    file = run_dir / FOLDER / JOBS_NAME
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    links, submitted, statuses = [], "", {}
    for line in text.split("\n")[:-1]:
        try:
            told: dict[str, Any] = json.loads(line)
            if "submitted" in told:
                submitted = str(told["submitted"])
            elif "status" in told:
                statuses[str(told["job"])] = int(told["status"])
            else:
                links.append(Link(**told))
        except (ValueError, TypeError, KeyError):
            continue
    return Journal(tuple(links), submitted, statuses)


def note_submitted(run_dir: Path, job: str) -> None:
    _add(run_dir, {"submitted": job})


def note_begun(run_dir: Path, link: Link) -> None:
    _add(run_dir, asdict(link))


def note_ended(run_dir: Path, job: str, status: int) -> None:
    _add(run_dir, {"job": job, "status": status})


def _add(run_dir: Path, told: dict[str, Any]) -> None:
    with (run_dir / FOLDER / JOBS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")
        file.flush()
        os.fsync(file.fileno())
