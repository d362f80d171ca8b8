"""Jobs that follow each other: each submits the next, and takes it back when nothing is left to do."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from coordinator.slurmjobs.chain import Link, begin, end, read_links
from coordinator.slurmjobs.following import Follower
from scheduling.errors import ConfigError, InfrastructureError
from tests.coordinator.runs import make_run
from tests.coordinator.slurmjobs.fakes import FakeSlurm


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
    assert read_links(run) == [first, second]
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
    assert job(run, 8, slurm)[0].next
    third, told = job(run, 9, slurm)
    assert third.next == ""
    assert "the last 2 jobs have answered nothing" in told


def test_jobs_that_answer_something_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, ended=False)
    (run / "slurm").mkdir()
    lines = [Link("7", "", "8", 0), Link("8", "7", "9", 10)]
    (run / "slurm" / "jobs.jsonl").write_text(
        "".join(json.dumps({name: getattr(link, name) for name in Link.__slots__}) + "\n" for link in lines) + '{"job'
    )
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
    told = end(run, status, "8", slurm)
    assert ("8" not in slurm.queue) == cancelled
    assert told == ("" if cancelled else "job 8 goes on with the run")
    assert end(run, status, "", slurm) == ""


def test_a_stopped_run_does_not_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, ended=False)
    state = json.loads((run / "run.json").read_text())
    state["sessions"][-1] |= {"outcome": "drained", "reason": "asked by llmpi stop"}
    (run / "run.json").write_text(json.dumps(state))
    slurm = FakeSlurm()
    assert end(run, 3, "8", slurm) == "the run was stopped: job 8 is cancelled"
    assert ["scancel", "8"] in slurm.calls


def test_a_job_that_cannot_be_cancelled_is_named(run: Path) -> None:
    slurm = FakeSlurm()
    slurm.fails["scancel"] = "no"
    assert "job 8, which would find nothing to do, could not be cancelled" in end(run, 0, "8", slurm)


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
        "20 of 30 done · no job is left",
    ]


def test_a_job_that_never_made_a_run_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"job 7 ended before there was a run: .*job-7\.log"):
        Follower(tmp_path, "7", FakeSlurm(), stream=io.StringIO()).follow()


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
