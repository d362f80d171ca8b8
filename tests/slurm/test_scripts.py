"""The batch scripts, run by bash with stand-ins for mpirun, srun and llmpi that write down what they get."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm
from tests.conftest import missing
from tests.launch import ROOT

pytestmark = pytest.mark.slow

PATIENCE_S = 300.0

MPIRUN = """#!/bin/bash
if [[ $1 == --version ]]; then echo "$MPIRUN_SAYS"; exit; fi
echo "mpirun $*" >> "$CALLS"
[[ -n $LASTS ]] || exit "${LAUNCHED:-0}"
for name in USR2 TERM; do trap "echo got $name >> '$CALLS'; exit 3" $name; done
echo up >> "$CALLS"
for ((turn = 0; turn < 6000; turn++)); do sleep 0.1; done
"""
SRUN = (
    '#!/bin/bash\necho "srun $* cpus=${SRUN_CPUS_PER_TASK:-none} wait=$SLURM_WAIT" >> "$CALLS"\nexit "${LAUNCHED:-0}"\n'
)
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> "$CALLS"\n'
LLMPI = '#!/bin/bash\necho "llmpi $*" >> "$CALLS"\nexit "${STATUS:-0}"\n'


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[bytes], Path]]:
    """Starts a script with arguments and variables; gives the process and the file of calls."""
    for name, text in {"mpirun": MPIRUN, "srun": SRUN, "llmpi": LLMPI, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()

    def start(script: str, *arguments: str, **environ: str) -> tuple[subprocess.Popen[bytes], Path]:
        given = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "MPIRUN_SAYS": "mpirun (Open MPI) 5",
        }
        process = subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments], env=given | environ, stderr=subprocess.DEVNULL
        )
        return process, calls

    return start


Job = Callable[..., tuple[subprocess.Popen[bytes], Path]]
ARGUMENTS = ("run 1", "-m", "model.gguf", "-i", "a b.jsonl")


@pytest.mark.parametrize("script", ["mpirun.sbatch", "srun.sbatch"])
@pytest.mark.parametrize("status", [0, 1, 3])
def test_exit_status_is_what_the_record_says(job: Job, script: str, status: int) -> None:
    process, calls = job(script, *ARGUMENTS, STATUS=str(status))
    assert process.wait(PATIENCE_S) == status
    assert calls.read_text().splitlines()[-1] == "llmpi status run 1"


SCRIPTS = ("mpirun.sbatch", "srun.sbatch", "study.sbatch")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refused_command_is_not_taken_for_what_another_has_left_there(job: Job, script: str) -> None:
    process, calls = job(script, *ARGUMENTS, LAUNCHED="2", STATUS="0")
    assert process.wait(PATIENCE_S) == 2
    assert len(calls.read_text().splitlines()) == 1, "a complete run in the directory is not told of"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("launched", "status", "ends"), [("1", "2", 4), ("137", "3", 3), ("9", "0", 0)])
def test_other_statuses_of_launchers_are_not_believed(
    job: Job, script: str, launched: str, status: str, ends: int
) -> None:
    """And where there is nothing to tell of, though the command was not refused, ranks did not start."""
    process, _ = job(script, *ARGUMENTS, LAUNCHED=launched, STATUS=status)
    assert process.wait(PATIENCE_S) == ends


def test_mpirun_script_starts_all_ranks_of_the_job(job: Job) -> None:
    process, calls = job("mpirun.sbatch", *ARGUMENTS)
    process.wait(PATIENCE_S)
    assert calls.read_text().splitlines()[0] == (
        "mpirun --bind-to none llmpi batch -o run 1 -m model.gguf -i a b.jsonl"
    )


def test_study_script_starts_all_ranks_and_ends_as_the_study_stands(job: Job) -> None:
    process, calls = job("study.sbatch", *ARGUMENTS, "--workers", "1,2", STATUS="3")
    assert process.wait(PATIENCE_S) == 3
    assert calls.read_text().splitlines() == [
        "mpirun --bind-to none llmpi study scaling -o run 1 -m model.gguf -i a b.jsonl --workers 1,2",
        "llmpi study show run 1",
    ]


def catches(process: subprocess.Popen[bytes], sent: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (sent - 1) & 1)


def wait_up(process: subprocess.Popen[bytes], calls: Path, sent: signal.Signals) -> None:
    """mpirun may be up before the script has come to its trap."""
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not ("up" in calls.read_text() and catches(process, sent)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        pause.wait(0.02)


@pytest.mark.parametrize(
    ("says", "sent", "got"),
    [
        ("mpirun (Open MPI) 5.0.11", signal.SIGUSR2, "USR2"),
        ("mpirun (Open MPI) 5.0.11", signal.SIGTERM, "USR2"),
        ("HYDRA build details:", signal.SIGUSR2, "TERM"),
    ],
)
def test_mpirun_script_drains_with_the_signal_that_its_mpirun_hands_on(
    job: Job, says: str, sent: signal.Signals, got: str
) -> None:
    process, calls = job("mpirun.sbatch", *ARGUMENTS, MPIRUN_SAYS=says, LASTS="1", STATUS="3")
    wait_up(process, calls, sent)
    process.send_signal(sent)
    assert process.wait(PATIENCE_S) == 3
    assert calls.read_text().splitlines()[-2:] == [f"got {got}", "llmpi status run 1"]


def test_srun_script_starts_a_step_with_the_pmi_asked_for(job: Job) -> None:
    process, calls = job("srun.sbatch", *ARGUMENTS, LLMPI_SRUN_MPI="pmi2", SLURM_CPUS_PER_TASK="4")
    process.wait(PATIENCE_S)
    assert calls.read_text().splitlines()[0] == (
        "srun --mpi=pmi2 --cpu-bind=none llmpi batch -o run 1 -m model.gguf -i a b.jsonl cpus=4 wait=60"
    )


def test_srun_script_asks_for_pmix_and_leaves_processors_alone_by_default(job: Job) -> None:
    process, calls = job("srun.sbatch", *ARGUMENTS)
    process.wait(PATIENCE_S)
    assert calls.read_text().startswith("srun --mpi=pmix ")
    assert "cpus=none" in calls.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [(), ("-m", "model.gguf")])
def test_a_forgotten_run_directory_is_refused(job: Job, script: str, arguments: tuple[str, ...]) -> None:
    process, calls = job(script, *arguments)
    assert process.wait(PATIENCE_S) == 2
    assert calls.read_text() == ""


def test_scripts_come_with_the_package() -> None:
    assert slurm.names() == ["mpirun.sbatch", "srun.sbatch", "study.sbatch"]
    assert all(slurm.text(name).startswith("#!/bin/bash\n") for name in slurm.names())
    with pytest.raises(FileNotFoundError, match=r"mpirun\.sbatch"):
        slurm.text("other.sbatch")


def test_options_of_sbatch_stand_before_the_first_command() -> None:
    """sbatch stops reading #SBATCH lines at the first line that is neither empty nor a comment."""
    for name in slurm.names():
        lines = slurm.text(name).splitlines()
        first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert options
        assert max(options) < first


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        missing("no shellcheck: the extra test installs it")
    done = subprocess.run(
        [tool, *(ROOT / "slurm" / name for name in slurm.names())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["mpirun.sbatch", "srun.sbatch"])
def test_a_task_of_a_job_array_answers_its_slice(job: Job, script: str) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    process, calls = job(script, *ARGUMENTS, **task, LLMPI_SLICES="8")
    process.wait(PATIENCE_S)
    first, last = calls.read_text().splitlines()
    assert " -o run 1 --slice 3/8 " in first
    assert last == "llmpi status run 1/slice-3"


@pytest.mark.parametrize("script", ["mpirun.sbatch", "srun.sbatch"])
@pytest.mark.parametrize(("highest", "count"), [("8", "8"), ("5", "2"), ("14", "8")], ids=["1-8", "3,5", "0-14:2"])
def test_an_array_whose_tasks_would_not_be_all_slices_is_refused(
    job: Job, script: str, highest: str, count: str
) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MAX": highest}
    process, calls = job(script, *ARGUMENTS, **task)
    assert process.wait(PATIENCE_S) == 2
    assert calls.read_text() == ""


REQUEUE = ("--on-limit", "requeue")


@pytest.mark.parametrize(
    ("sent", "status", "more", "asked"),
    [
        (signal.SIGUSR2, "3", REQUEUE, True),
        (signal.SIGUSR2, "3", ("--on-limit=requeue",), True),
        (signal.SIGUSR2, "2", REQUEUE, True),
        (signal.SIGUSR2, "0", REQUEUE, False),
        (signal.SIGUSR2, "3", (), False),
        (signal.SIGTERM, "3", REQUEUE, False),
    ],
)
def test_slurm_is_asked_to_requeue_where_llmpi_has_not_heard_that_time_is_up(
    job: Job, sent: signal.Signals, status: str, more: tuple[str, ...], asked: bool
) -> None:
    environ = {
        "LASTS": "1",
        "STATUS": status,
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    process, calls = job("mpirun.sbatch", *ARGUMENTS, *more, **environ, SLURM_ARRAY_TASK_COUNT="2")
    wait_up(process, calls, sent)
    process.send_signal(sent)
    assert process.wait(PATIENCE_S) == (4 if status == "2" else int(status))
    assert ("scontrol requeue 5_1" in calls.read_text().splitlines()) == asked


@pytest.mark.parametrize(("nodes", "refused"), [("1", False), ("2", True)])
def test_mpirun_script_refuses_gpus_per_task_on_several_nodes(job: Job, nodes: str, refused: bool) -> None:
    process, calls = job("mpirun.sbatch", *ARGUMENTS, SLURM_GPUS_PER_TASK="1", SLURM_JOB_NUM_NODES=nodes)
    assert process.wait(PATIENCE_S) == (2 if refused else 0)
    assert (calls.read_text() == "") == refused


def test_srun_script_makes_one_step_of_all_parts_of_a_heterogeneous_job(job: Job) -> None:
    process, calls = job("srun.sbatch", *ARGUMENTS, SLURM_HET_SIZE="3")
    process.wait(PATIENCE_S)
    assert calls.read_text().startswith("srun --mpi=pmix --het-group=0-2 --cpu-bind=none llmpi batch ")
