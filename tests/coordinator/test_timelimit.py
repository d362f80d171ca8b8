"""Lengths of time as people write them, and what Slurm says of its job's end."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from coordinator.closing import Size
from coordinator.signals import StopSignals
from coordinator.timekeeper import SLURM_MARGIN_S, StopOptions, Timekeeper, age_s
from coordinator.timelimit import SQUEUE_TIMEOUT_S, SlurmEnd, parse_end_time, parse_time_limit, requeue
from scheduling.errors import ConfigError
from tests.coordinator.fakes import FakeClock
from tests.system.runs import until


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("5:30", 330), ("2:00:00", 7200), ("1-0", 86_400), ("1-12", 129_600), ("1-12:30", 131_400),
        ("1-12:30:15", 131_415), ("90s", 90), ("2h", 7200), ("1.5h", 5400), ("1h30m", 5400), ("10min", 600),
        ("1d", 86_400), (" 2H ", 7200), ("none", None), ("NONE", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them_and_with_units(text: str, seconds: float | None) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "0", "0s", "1:2:3:4", "2 h", "1-", "h", "nan", "inf", "1e3", "5:-1"]
)
def test_what_is_no_length_of_time_is_refused_with_the_ways_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--time-limit .*HH:MM:SS.*90s.*'none'"):
        parse_time_limit(text)


def test_the_end_of_a_job_without_one_is_none() -> None:
    assert parse_end_time("2026-11-29T10:00:00") == datetime(2026, 11, 29, 10).timestamp(), "local time, as Slurm's"
    for text in ("NONE", "N/A", "Unknown", ""):
        assert parse_end_time(text) is None


def fake_squeue(folder: Path, patch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "squeue"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_outside_of_slurm_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(tmp_path, monkeypatch, f"touch {tmp_path}/asked")
    assert SlurmEnd({}).job is None
    assert not (tmp_path / "asked").exists()


def test_a_slurm_that_exports_the_end_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(tmp_path, monkeypatch, f"touch {tmp_path}/asked")
    found = SlurmEnd({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1234567890"})
    assert found.end_unix_s == 1234567890.0
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("array", "job"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}, "5_0")]
)
def test_squeue_is_asked_for_this_job_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: dict[str, str], job: str
) -> None:
    fake_squeue(
        tmp_path, monkeypatch,
        f'echo "$@" > {tmp_path}/asked; while ! test -e {tmp_path}/go; do sleep 0.02; done; echo 2026-11-29T10:00:00',
    )  # fmt: skip
    began = time.monotonic()
    found = SlurmEnd({"SLURM_JOB_ID": "7"} | array)
    assert time.monotonic() - began < SQUEUE_TIMEOUT_S / 2
    assert found.end_unix_s is None
    (tmp_path / "go").touch()
    until(lambda: found.end_unix_s is not None, "what squeue says")
    assert found.end_unix_s == parse_end_time("2026-11-29T10:00:00")
    assert (tmp_path / "asked").read_text() == f"-h -j {job} -o %e\n"


@pytest.mark.parametrize("script", ["exit 1", "echo NONE", "echo; exit 0", "echo nonsense"])
def test_a_squeue_that_knows_nothing_sets_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_squeue(tmp_path, monkeypatch, script)
    found = SlurmEnd({"SLURM_JOB_ID": "7"})
    assert found._asking is not None
    found._asking.join(60.0)
    assert found.end_unix_s is None


def test_that_there_is_no_scontrol_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol cannot be run" in str(requeue("7"))


# ---------------------------------------------------------------- which limit counts


def limit_of(environ: dict[str, str], **options: object) -> tuple[float, str] | None:
    """At 1,000 s on the job's clock it is 50,000 s after the epoch, and the job began 10 s ago."""
    clock, wall = FakeClock(1000.0), FakeClock(50_000.0)
    keeper = Timekeeper(StopOptions(**options), object(), clock, wall, environ=environ, age_s=10.0)  # type: ignore[arg-type]
    return keeper.limit()


IN_SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "50100"}


def test_the_earlier_of_both_limits_counts_and_none_switches_slurms_off() -> None:
    slurms = 1100.0 - SLURM_MARGIN_S
    assert limit_of({}) is None
    assert limit_of({}, time_limit_s=60.0) == (1050.0, "the time limit of 1m00s")
    at, why = limit_of(IN_SLURM) or (0.0, "")
    assert at == slurms
    assert "Slurm ends job 7" in why
    assert limit_of(IN_SLURM, time_limit_s=1e6) == (slurms, why)
    assert limit_of(IN_SLURM, time_limit_s=60.0) == (1050.0, "the time limit of 1m00s")
    assert limit_of(IN_SLURM, slurm_limit=False) is None


@pytest.mark.parametrize(
    ("now_s", "granted_s"),
    [(0.0, 70.0), (50.0, 49.0), (97.0, 2.0), (99.5, 2.0)],
    ids=["as long as otherwise", "a second before the end", "all that ranks need", "what they need, though late"],
)
def test_goodbyes_leave_the_launcher_a_second_of_the_time(now_s: float, granted_s: float) -> None:
    clock = FakeClock(0.0)
    keeper = Timekeeper(StopOptions(time_limit_s=100.0), object(), clock, clock, environ={})  # type: ignore[arg-type]
    clock.pass_(now_s)
    assert keeper.goodbye_s(70.0) == granted_s
    assert Timekeeper(StopOptions(), object(), clock, clock, environ={}).goodbye_s(70.0) == 70.0  # type: ignore[arg-type]


def test_how_long_a_job_has_run_does_not_hang_on_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    before = age_s()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400.0)
    assert 0.0 < before <= age_s() < before + 3_600.0


def test_requeueing_outside_of_slurm_is_refused() -> None:
    StopOptions(on_limit="requeue").check(IN_SLURM)
    with pytest.raises(ConfigError, match="--on-limit requeue is for jobs of Slurm"):
        StopOptions(on_limit="requeue").check({})


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_drain_without_a_bound_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--drain-timeout"):
        StopOptions(drain_timeout_s=seconds)


def test_whoever_looks_at_the_time_does_what_is_to_be_done_meanwhile() -> None:
    done: list[None] = []
    keeper = Timekeeper(StopOptions(), StopSignals(), FakeClock(), environ={})
    keeper.meanwhile = lambda: done.append(None)
    keeper.check("nothing was done")
    keeper.stops(lambda: False, Size(0, 0))
    assert len(done) == 2
