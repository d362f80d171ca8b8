"""From a command line to a script, and to a job."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from coordinator.commands.submit import without_output
from coordinator.slurmjobs.jobrequest import read_request
from coordinator.slurmjobs.jobscript import write_script
from coordinator.slurmjobs.partitions import run_client
from coordinator.slurmjobs.submitting import LEAVING_S, SubmitOptions, own_words, submit_run
from scheduling.errors import ConfigError, InfrastructureError, RunDirError
from tests.coordinator.runs import make_run
from tests.coordinator.slurmjobs.fakes import FakeSlurm

COMMAND = ["-m", "model.gguf", "-i", "it's here.jsonl"]


def script(words: str, launcher: str = "mpirun", *, chained: bool = True, run: Path = Path("/data/run 1")) -> str:
    return write_script(launcher, read_request(shlex.split(words)), run, COMMAND, chained)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_given_options_take_the_place_of_the_templates() -> None:
    found = options(script("-n 8 --job-name 'my job' --signal=B:USR2@300 -o out-%j.log"))
    names = [option.split("=")[0].split()[0] for option in found]
    assert names.count("--signal") == names.count("--job-name") == 1
    assert found[-4:] == ["-n 8", '--job-name "my job"', "--signal=B:USR2@300", "-o out-%j.log"]
    assert not any(option.startswith("--output") for option in found)


def test_what_was_not_given_is_the_templates_or_the_runs() -> None:
    found = options(script(""))
    assert '--output="/data/run 1/slurm/job-%j.log"' in found
    assert '--job-name="llmpi-run 1"' in found
    assert "--open-mode=append" in found
    assert not any(option.startswith("--ntasks") for option in found), "one rank, if nobody says otherwise"


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.slow
def test_scripts_are_bash_that_hands_over_the_command_as_it_was(tmp_path: Path, launcher: str, chained: bool) -> None:
    text = script("-n2", launcher, chained=chained)
    (tmp_path / "job").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)
    (set_line,) = (line for line in text.splitlines() if line.startswith("set -- "))
    assert shlex.split(set_line)[2:] == ["/data/run 1", *COMMAND]
    assert ("slurm-job begin" in text) == chained


def test_submitting_keeps_the_script_and_names_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm, run = FakeSlurm(), tmp_path / "run"
    assert submit_run(["-n", "3", "-p", "cpu"], COMMAND, run, SubmitOptions(), slurm) == 0
    kept = run / "slurm" / "job.sbatch"
    assert slurm.submitted() == [["sbatch", "--parsable", str(kept)]]
    assert "#SBATCH -p cpu" in kept.read_text()
    assert re.search(r"^job 100 in partition cpu, at most 30m00s each$", capsys.readouterr().out, re.MULTILINE)


def test_a_dry_run_shows_the_script_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm = FakeSlurm()
    assert submit_run(["-p", "cpu"], COMMAND, tmp_path / "run", SubmitOptions(dry_run=True), slurm) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not (tmp_path / "run").exists()
    assert [call[0] for call in slurm.calls] == ["sinfo"]
    with pytest.raises(ConfigError, match="leave one of them out"):
        submit_run([], COMMAND, tmp_path / "run", SubmitOptions(dry_run=True, wait=True), slurm)


def test_a_second_chain_on_one_run_is_refused(tmp_path: Path) -> None:
    from coordinator.slurmjobs.chain import begin

    slurm, run = FakeSlurm(), tmp_path / "run"
    submit_run([], COMMAND, run, SubmitOptions(), slurm)
    with pytest.raises(RunDirError, match=r"job 100 of this run is in the queue already \(pending\)"):
        submit_run([], COMMAND, run, SubmitOptions(), slurm)
    begin(run, {"SLURM_JOB_ID": "100"}, slurm)
    slurm.queue["100"] = ("RUNNING", "n1")
    with pytest.raises(
        RunDirError, match=r"job 100 of this run is in the queue already \(running\): `scancel 100 101`"
    ):
        submit_run([], COMMAND, run, SubmitOptions(), slurm)


def test_a_job_that_nobody_works_in_any_more_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coordinator.slurmjobs.chain import begin

    slurm, run, paused = FakeSlurm(), tmp_path / "run", []
    submit_run([], COMMAND, run, SubmitOptions(), slurm)
    begin(run, {"SLURM_JOB_ID": "100"}, slurm)
    slurm.queue["100"] = ("RUNNING", "n1")
    make_run(run, ended=False)

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 2:
            slurm.queue["100"] = ("COMPLETING", "n1")
            del slurm.queue["101"]
        if len(paused) == 4:
            del slurm.queue["100"]

    assert submit_run([], COMMAND, run, SubmitOptions(), slurm, pause) == 0
    assert paused == [1.0] * 4
    assert "job 100 of this run is ending, and is waited for" in capsys.readouterr().err
    slurm.queue["102"] = ("RUNNING", "n1")
    with pytest.raises(RunDirError, match=r"job 102 of this run is in the queue already \(running\)"):
        submit_run([], COMMAND, run, SubmitOptions(), slurm, paused.append)
    assert len(paused) == 4 + LEAVING_S


def test_of_two_who_submit_at_once_one_is_refused(tmp_path: Path) -> None:
    run, told = tmp_path / "run", []

    class Busy(FakeSlurm):
        def _sbatch(self, words: list[str]) -> str:
            with pytest.raises(RunDirError, match=f"another `llmpi submit` is submitting a job for {run} at this"):
                submit_run([], COMMAND, run, SubmitOptions(), FakeSlurm())
            told.append(words)
            return super()._sbatch(words)

    slurm = Busy()
    assert submit_run([], COMMAND, run, SubmitOptions(), slurm) == 0
    assert len(told) == len(slurm.submitted()) == 1


def test_a_number_of_gpus_for_each_task_is_refused_where_mpirun_would_fail(tmp_path: Path) -> None:
    for words in (["-N2", "--gpus-per-task=1", "-n4"], ["-N", "2", "--gpus-per-task", "1", "-n4"]):
        with pytest.raises(ConfigError, match="give --gpus-per-node, or --launcher srun"):
            submit_run(words, COMMAND, tmp_path / "run", SubmitOptions(dry_run=True), FakeSlurm())
        assert submit_run(words, COMMAND, tmp_path, SubmitOptions(dry_run=True, launcher="srun"), FakeSlurm()) == 0
    one_node = ["--gpus-per-task=1", "-n4"]
    assert submit_run(one_node, COMMAND, tmp_path, SubmitOptions(dry_run=True), FakeSlurm()) == 0


def test_names_that_sbatch_would_read_otherwise(tmp_path: Path) -> None:
    """`%j` in a name is no pattern; an option's value in one word with it may have blanks."""
    found = options(script("'-Jmy job' -pcpu", run=Path("/data/100%j")))
    assert "--output=/data/100%%j/slurm/job-%j.log" in found
    assert found[-2:] == ['-J "my job"', "-pcpu"]
    for name in ("a\nb", "a\\b", "a\udcff"):
        with pytest.raises(ConfigError, match="sbatch takes no line break"):
            script("", run=Path("/data", name))


def test_a_script_that_is_submitted_by_hand_finds_what_it_was_given() -> None:
    """It may be submitted from another folder, and paths of the command may be relative."""
    assert f"\ncd -- {Path.cwd()} || exit 4\n" in script("")
    assert "cd --" not in script("-D /data")


@pytest.mark.parametrize(
    ("words", "said"), [("-p cpu", ", at most 30m00s each"), ("-p cpu -t 90", ", at most 1h30m each")]
)
def test_a_job_without_a_limit_of_its_own_has_the_partitions_usual_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    submit_run(words.split(), COMMAND, tmp_path / "run", SubmitOptions(), FakeSlurm())
    assert capsys.readouterr().out.startswith(f"job 100 in partition cpu{said}\n")


def test_what_sbatch_says_last_may_be_how_to_get_help(tmp_path: Path) -> None:
    tool = tmp_path / "sbatch"
    tool.write_text('#!/bin/sh\necho "sbatch: unrecognized option \'--x\'\nTry \\"sbatch --help\\"" >&2; exit 1\n')
    tool.chmod(0o755)
    with pytest.raises(InfrastructureError, match=r"sbatch: unrecognized option '--x'$"):
        run_client([str(tool)])


def test_without_slurm_or_with_one_that_refuses_it_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm()
    slurm.fails["sbatch"] = "error: Batch job submission failed: Invalid account"
    with pytest.raises(InfrastructureError, match="sbatch: error: Batch job submission failed: Invalid account"):
        submit_run([], COMMAND, tmp_path / "run", SubmitOptions(), slurm)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sinfo here: llmpi submit is for the login node of a Slurm"):
        submit_run([], COMMAND, tmp_path / "run", SubmitOptions())


def test_command_lines_are_split_at_the_first_dashes() -> None:
    words = [
        "--dry-run",
        "-N",
        "2",
        "--launcher",
        "srun",
        "--launcher=srun",
        "--wait",
        "--",
        "batch",
        "-m",
        "x",
        "--",
        "y",
    ]
    assert own_words(words) == (["-N", "2"], ["batch", "-m", "x", "--", "y"])
    with pytest.raises(ConfigError, match="nothing to submit"):
        own_words(["-N", "2", "batch"])


def test_the_run_directory_is_taken_out_of_a_command() -> None:
    words = ["-o", "a", "-m", "x", "--output", "b", "--output=c", "-od", "--other", "-oe"]
    assert without_output(words) == ["-m", "x", "--other"]
