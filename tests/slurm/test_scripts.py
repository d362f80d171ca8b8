"""The batch scripts, run by bash with stand-ins for mpirun, srun and llmpi that write down what they get."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm
from tests.launch import ROOT

pytestmark = pytest.mark.slow

PATIENCE_S = 300.0

MPIRUN = """#!/bin/bash
if [[ $1 == --version ]]; then echo "$MPIRUN_SAYS"; exit; fi
echo "mpirun $*" >> "$CALLS"
[[ -n $LASTS ]] || exit 0
for name in USR2 TERM; do trap "echo got $name >> '$CALLS'; exit 3" $name; done
echo up >> "$CALLS"
for ((turn = 0; turn < 6000; turn++)); do sleep 0.1; done
"""
SRUN = '#!/bin/bash\necho "srun $* cpus=${SRUN_CPUS_PER_TASK:-none}" >> "$CALLS"\n'
LLMPI = '#!/bin/bash\necho "llmpi $*" >> "$CALLS"\nexit "${STATUS:-0}"\n'


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[bytes], Path]]:
    """Starts a script with arguments and variables; gives the process and the file of calls."""
    for name, text in {"mpirun": MPIRUN, "srun": SRUN, "llmpi": LLMPI}.items():
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
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    # mpirun may be up before the script has come to its trap.
    while not ("up" in calls.read_text() and catches(process, sent)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        pause.wait(0.02)
    process.send_signal(sent)
    assert process.wait(PATIENCE_S) == 3
    assert calls.read_text().splitlines()[-2:] == [f"got {got}", "llmpi status run 1"]


def test_srun_script_starts_a_step_with_the_pmi_asked_for(job: Job) -> None:
    process, calls = job("srun.sbatch", *ARGUMENTS, LLMPI_SRUN_MPI="pmi2", SLURM_CPUS_PER_TASK="4")
    process.wait(PATIENCE_S)
    assert calls.read_text().splitlines()[0] == (
        "srun --mpi=pmi2 --cpu-bind=none llmpi batch -o run 1 -m model.gguf -i a b.jsonl cpus=4"
    )


def test_srun_script_asks_for_pmix_and_leaves_processors_alone_by_default(job: Job) -> None:
    process, calls = job("srun.sbatch", *ARGUMENTS)
    process.wait(PATIENCE_S)
    assert calls.read_text().startswith("srun --mpi=pmix ")
    assert "cpus=none" in calls.read_text()


@pytest.mark.parametrize("script", ["mpirun.sbatch", "srun.sbatch", "study.sbatch"])
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
