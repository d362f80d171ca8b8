"""How long a job may take: `--time-limit`, and what Slurm knows of its own.

Slurm's limit is asked for once, in a thread, so that a slow controller delays nothing.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Mapping
from datetime import datetime

from scheduling.errors import ConfigError

SQUEUE_TIMEOUT_S = 60.0
SCONTROL_TIMEOUT_S = 10.0

_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_WITH_UNITS = re.compile(r"(?:\d+(?:\.\d+)?(?:s|min|m|h|d))+")
_ONE_UNIT = re.compile(r"(\d+(?:\.\d+)?)(s|min|m|h|d)")
_SLURM = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_HOW = (
    "give it as Slurm takes it (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS), with units (90s, 2h, 1h30m), or"
)


def parse_time_limit(text: str) -> float | None:
    """Seconds; None for "none".

    Raises:
        ConfigError: it is no length of time above 0.
    """
    plain = text.strip().lower()
    if plain == "none":
        return None
    seconds = _seconds(plain)
    if seconds is None or seconds <= 0:
        raise ConfigError(f"--time-limit {text}: {_HOW} 'none'")
    return seconds


def _seconds(text: str) -> float | None:
    if _WITH_UNITS.fullmatch(text):
        return sum(float(number) * _UNITS_S[unit] for number, unit in _ONE_UNIT.findall(text))
    return slurm_time_s(text)


def slurm_time_s(text: str) -> float | None:
    """A length of time as Slurm writes it; None if it is none."""
    found = _SLURM.fullmatch(text.strip())
    if found is None:
        return None
    parts = [int(part) for part in found.group("first", "second", "third") if part is not None]
    if found["days"] is not None:
        # D-HH, D-HH:MM, D-HH:MM:SS: the first is hours.
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return float(((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds)
    # MM, MM:SS, HH:MM:SS
    hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return float((hours * 60 + minutes) * 60 + seconds)


def parse_end_time(text: str) -> float | None:
    """When a job ends by `squeue -o %e`, in seconds since the epoch; None where it has no end."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        return None


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """The name by which Slurm's tools know this job alone; None outside of Slurm.

    The number of one task of a job array is that of the array, too, by which all of its tasks would be requeued.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID") or None


class SlurmEnd:
    """When Slurm will end this job. `end_unix_s` is None while that is not known, or if there is no end.

    `job`: its name (`slurm_job`); None outside of Slurm, where nobody is asked.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.job = slurm_job(environ)
        self.end_unix_s: float | None = None
        self._asking: threading.Thread | None = None
        if self.job is None:
            return
        told = environ.get("SLURM_JOB_END_TIME", "")
        if told.isascii() and told.isdigit():
            self.end_unix_s = float(told)
            return
        self._asking = threading.Thread(target=self._ask, args=(self.job,), daemon=True)
        self._asking.start()

    def _ask(self, job: str) -> None:
        try:
            done = subprocess.run(
                ["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return  # Not known then: Slurm's own signal is what remains.
        lines = done.stdout.split()
        if done.returncode == 0 and lines:
            self.end_unix_s = parse_end_time(lines[0])


def requeue(job: str) -> str | None:
    """Ask Slurm to put this job back into its queue, which ends it. Returns why it does not; None: it does."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except OSError as error:
        return f"scontrol cannot be run: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return f"scontrol did not answer within {SCONTROL_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    said = (done.stderr + done.stdout).strip().splitlines()
    return said[-1] if said else f"scontrol ended with status {done.returncode}"
