"""Jobs that follow each other: each submits the next, and takes it back when nothing is left to do."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from coordinator.slurmjobs.chain import begin, end
from coordinator.slurmjobs.following import Follower
from coordinator.slurmjobs.journal import Link, note_ended, read_journal
from scheduling.errors import ConfigError, InfrastructureError
from tests.coordinator.runs import make_run
from tests.coordinator.slurmjobs.fakes import FakeSlurm

SEVEN = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has not begun."""
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    return tmp_path / "run"


def job(run: Path, number: int, slurm: FakeSlurm) -> tuple[Link, str]:
    return begin(run, {"SLURM_JOB_ID": str(number)}, slurm)


def test_each_job_submits_the_next_and_knows_the_one_before(run: Path) -> None:
    slurm = FakeSlurm()
    first, _ = job(run, 7, slurm)
    second, told = job(run, 100, slurm)
    assert (first, second, told) == (Link("7", "", "100", 0), Link("100", "7", "101", 0), "")
    assert read_journal(run).links == (first, second)
    script = str(run / "slurm" / "job.sbatch")
    assert slurm.submitted() == [
        ["sbatch", "--parsable", "--dependency=afterany:7", script],
        ["sbatch", "--parsable", "--dependency=afterany:100", script],
    ]


def test_a_job_that_was_put_back_keeps_its_successor(run: Path) -> None:
    slurm = FakeSlurm()
    job(run, 7, slurm)
    again, _ = job(run, 7, slurm)
    assert again == Link("7", "", "100", 0)
    assert len(slurm.submitted()) == 1
    slurm.queue.clear()
    assert job(run, 7, slurm)[0].next == "101"


def test_jobs_that_answer_nothing_do_not_go_on_for_ever(run: Path) -> None:
    slurm = FakeSlurm()
    job(run, 7, slurm)
    assert job(run, 100, slurm)[0].next == "101"
    third, told = job(run, 101, slurm)
    assert third.next == ""
    assert "the last 2 jobs have answered nothing" in told


def test_what_was_submitted_anew_is_another_chain(run: Path) -> None:
    """Whoever has mended what was wrong gets jobs that follow each other again."""
    slurm = FakeSlurm()
    for number in (7, 100, 101):
        job(run, number, slurm)
    again, told = job(run, 200, slurm)
    assert (again, told) == (Link("200", "101", "102", 0), "")


def test_a_journal_that_goes_in_a_circle_is_read_to_its_end(run: Path) -> None:
    lines = [Link("7", "", "8", 0), Link("8", "7", "7", 0)]
    (run / "slurm" / "jobs.jsonl").write_text("".join(json.dumps(asdict(link)) + "\n" for link in lines))
    assert [link.job for link in read_journal(run).led_to("7")] == ["8", "7"]


def test_a_folder_that_cannot_be_written_is_said_and_the_job_goes_on(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    link, told = job(tmp_path / "gone", 7, slurm)
    assert link.next == "100"
    assert told.startswith(f"{tmp_path}/gone/slurm cannot be written (No such file or directory)")
    assert end(tmp_path / "gone", 3, "100", {"SLURM_JOB_ID": "7"}, slurm) == "job 100 goes on with the run"


def test_jobs_that_answer_something_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, ended=False)
    (run / "slurm").mkdir()
    lines = [Link("7", "", "8", 0), Link("8", "7", "9", 10)]
    (run / "slurm" / "jobs.jsonl").write_text("".join(json.dumps(asdict(link)) + "\n" for link in lines) + '{"job')
    link, told = job(run, 9, FakeSlurm())
    assert (link, told) == (Link("9", "8", "100", 20), "")


def test_where_jobs_cannot_submit_the_run_goes_on_alone(run: Path) -> None:
    slurm = FakeSlurm()
    slurm.fails["sbatch"] = "Access/permission denied"
    link, told = job(run, 7, slurm)
    assert link.next == ""
    assert told == "no job follows this one, for it cannot be submitted here: sbatch: Access/permission denied"


def test_outside_of_slurm_there_is_no_chain(run: Path) -> None:
    with pytest.raises(ConfigError, match="no job of Slurm"):
        begin(run, {}, FakeSlurm())


@pytest.mark.parametrize(("status", "cancelled"), [(0, True), (1, True), (3, False), (4, False), (137, False)])
def test_the_next_job_is_taken_back_when_nothing_is_left(run: Path, status: int, cancelled: bool) -> None:
    slurm = FakeSlurm()
    slurm.queue["8"] = ("PENDING", "(Dependency)")
    told = end(run, status, "8", SEVEN, slurm)
    assert ("8" not in slurm.queue) == cancelled
    assert told == ("" if cancelled else "job 8 goes on with the run")
    assert end(run, status, "", SEVEN, slurm) == ""
    assert read_journal(run).statuses == {"7": status}


def test_a_command_that_is_refused_is_not_submitted_again(run: Path) -> None:
    """But where jobs before have taken it, it is something else that is wrong, and may have passed."""
    slurm = FakeSlurm()
    job(run, 7, slurm)
    told = end(run, 2, "100", SEVEN, slurm)
    assert told == "the command was refused: job 100, to which the same would happen, is cancelled"
    assert "100" not in slurm.queue
    job(run, 100, slurm)
    assert end(run, 2, "101", {"SLURM_JOB_ID": "100"}, slurm) == "job 101 goes on with the run"


def test_a_stopped_run_does_not_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, ended=False)
    state = json.loads((run / "run.json").read_text())
    state["sessions"][-1] |= {"outcome": "drained", "reason": "asked by llmpi stop", "slurm_job": "7"}
    (run / "run.json").write_text(json.dumps(state))
    (run / "slurm").mkdir()
    slurm = FakeSlurm()
    assert end(run, 3, "8", {"SLURM_JOB_ID": "9"}, slurm) == "job 8 goes on with the run", "it was an earlier job"
    assert end(run, 3, "8", SEVEN, slurm) == "the run was stopped: job 8 is cancelled"
    assert ["scancel", "8"] in slurm.calls


def test_a_job_that_cannot_be_cancelled_is_named(run: Path) -> None:
    slurm = FakeSlurm()
    slurm.fails["scancel"] = "no"
    assert "job 8, which would find nothing to do, could not be cancelled" in end(run, 0, "8", SEVEN, slurm)


class Story:
    """A clock whose every sleep brings the next thing that happens."""

    def __init__(self, *events: object) -> None:
        self.now = 0.0
        self.events = list(events)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            self.events.pop(0)()  # type: ignore[operator]


def test_following_goes_from_job_to_job_and_ends_as_the_record_says(tmp_path: Path) -> None:
    slurm, run, said = FakeSlurm(), tmp_path / "run", io.StringIO()
    slurm.queue["7"] = ("PENDING", "(Resources)")

    def starts() -> None:
        slurm.queue["7"] = ("RUNNING", "n1")
        make_run(run, 20, ended=False)
        (run / "slurm").mkdir()
        job(run, 7, slurm)

    def ends() -> None:
        del slurm.queue["7"]
        slurm.queue["100"] = ("RUNNING", "n2")

    story = Story(starts, ends, slurm.queue.clear)
    code = Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=said).follow()
    assert code == 3
    assert said.getvalue().splitlines() == [
        "job 7 pending (Resources)",
        "job 7 running on n1 · 20 of 30 done",
        "job 100 running on n2 · 20 of 30 done",
        "20 of 30 done · no job is left: the log of job 7 says why",
    ]


def test_a_reason_that_slurm_does_not_know_is_not_told_nor_a_successor_that_waits(tmp_path: Path) -> None:
    slurm, run, said = FakeSlurm(), make_run(tmp_path / "run", 20, ended=False), io.StringIO()
    (run / "slurm").mkdir()
    slurm.queue["7"] = ("PENDING", "(None)")

    def starts() -> None:
        slurm.queue["7"] = ("RUNNING", "n1")

    def has_successor() -> None:
        job(run, 7, slurm)

    story = Story(starts, has_successor, slurm.queue.clear)
    follower = Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=said)
    follower.follow()
    assert said.getvalue().splitlines()[:-1] == [
        "job 7 pending · 20 of 30 done",
        "job 7 running on n1 · 20 of 30 done",
    ]
    assert follower.job == "7"


def test_the_pace_is_that_of_jobs_that_run_however_slow(tmp_path: Path) -> None:
    """Not of those that wait, or a run of an hour after a night in the queue would take days."""
    slurm, run, said = FakeSlurm(), make_run(tmp_path / "run", 20, ended=False), io.StringIO()
    slurm.queue["7"] = ("PENDING", "(Priority)")

    def goes_on(answers: int, pause_s: float) -> None:
        slurm.queue["7"] = ("RUNNING", "n1")
        shutil.rmtree(run)
        make_run(run, answers, ended=False)
        story.now += pause_s

    story = Story(lambda: goes_on(20, 36_000.0), lambda: goes_on(25, 98.0), slurm.queue.clear)
    Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=said).follow()
    assert said.getvalue().splitlines()[1:-1] == [
        "job 7 running on n1 · 20 of 30 done",
        "job 7 running on n1 · 25 of 35 done · 3.0 requests/min · ETA 3m20s",
    ]


def test_on_a_terminal_one_line_is_drawn_over_itself(tmp_path: Path) -> None:
    """A job of days would scroll away all that was there before."""
    master, slave = pty.openpty()
    run, slurm = make_run(tmp_path / "run", 20, ended=False), FakeSlurm()
    slurm.queue["7"] = ("RUNNING", "n1")
    story = Story(*[lambda: None] * 200, slurm.queue.clear)
    with os.fdopen(slave, "w") as stream:
        Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=stream).follow()
        stream.flush()
        os.set_blocking(master, False)
        said = os.read(master, 1 << 20).decode()
    os.close(master)
    assert said.count("\n") <= 3, said
    assert "job 7 running on n1 · 20 of 30 done" in said


def test_a_job_that_ended_before_there_was_a_run_says_where_to_look(run: Path) -> None:
    slurm = FakeSlurm()
    slurm.fails["sbatch"] = "no"
    job(run, 7, slurm)
    with pytest.raises(InfrastructureError, match="job 7 ended before there was a run: the log of job 7 says why"):
        Follower(run, "7", slurm, stream=io.StringIO()).follow()
    (run / "slurm" / "job-7.log").touch()
    with pytest.raises(InfrastructureError, match=r"job 7 ended before there was a run: .*job-7\.log says why"):
        Follower(run, "7", slurm, stream=io.StringIO()).follow()


def test_a_job_that_was_cancelled_while_it_waited_has_no_log_to_look_into(run: Path) -> None:
    slurm = FakeSlurm()
    with pytest.raises(InfrastructureError, match=r"job 7 is over and has not begun$"):
        Follower(run, "7", slurm, stream=io.StringIO()).follow()
    slurm.over["7"] = "CANCELLED"
    with pytest.raises(InfrastructureError, match=r"job 7 is over and has not begun \(it was cancelled\)"):
        Follower(run, "7", slurm, stream=io.StringIO()).follow()


def test_a_refused_command_is_not_taken_for_the_complete_run_that_is_there(tmp_path: Path) -> None:
    slurm, run = FakeSlurm(), make_run(tmp_path / "run", 5)
    (run / "slurm").mkdir()
    job(run, 7, slurm)
    note_ended(run, "7", 2)
    slurm.queue.clear()
    with pytest.raises(ConfigError, match="the command was refused in job 7: the log of job 7 says why"):
        Follower(run, "7", slurm, stream=io.StringIO()).follow()


def test_a_controller_that_restarts_is_waited_for(tmp_path: Path) -> None:
    slurm, said = FakeSlurm(), io.StringIO()
    run = make_run(tmp_path / "run", 5)
    slurm.queue["7"] = ("RUNNING", "n1")
    slurm.fails["squeue"] = "Unable to contact slurm controller"
    story = Story(slurm.fails.clear, slurm.queue.clear)
    assert Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=said).follow() == 0
    slurm.fails["squeue"] = "Unable to contact slurm controller"
    with pytest.raises(InfrastructureError, match="Unable to contact"):
        Follower(run, "7", slurm, clock=lambda: story.now, sleep=story.sleep, stream=said).follow()
