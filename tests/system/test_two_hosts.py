"""The main job on two hosts (network namespaces), started by each MPI's example hostfile, its model staged to both:
which rank ran where; then one host is lost, and the same command goes on."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.hosts import Hosts, cannot, hosts
from tests.launch import ROOT, Argument, Finished, Launcher, base_env, run_alone
from tests.system.runs import PATIENCE_S, Run, lives, prompts, until, wait_gone, write_lines

pytestmark = [
    pytest.mark.system, pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot() or "-"),
]  # fmt: skip

REQUESTS = 30
IDS = [f"r{k}" for k in range(REQUESTS)]
RANKS = 5
EXAMPLES = {"openmpi": "openmpi-cpu.txt", "mpich": "mpich.txt"}
ON_THE_FIRST = {"openmpi": 3, "mpich": 4}
"""Slots of the first host of the example, and so ranks on it. The others are on the second."""
DAEMONS = {"openmpi": "prted", "mpich": "hydra_pmi_proxy"}


def example(made: Hosts, name: str) -> Path:
    """The example hostfile, with these hosts' addresses for its first names; its slots are kept."""
    text = (ROOT / "hostfiles" / name).read_text()
    names = re.findall(r"^(\w+)(?= slots=|:\d)", text, re.MULTILINE)
    assert len(names) >= len(made.addresses)
    for there, here in zip(names, made.addresses, strict=False):
        text = re.sub(rf"^{there}(?= |:)", here, text, flags=re.MULTILINE)
    copy = made.scratch / name
    copy.write_text(text)
    return copy


@contextmanager
def on_two_hosts(mpirun: Launcher, model: Path, folder: Path) -> Iterator[tuple[Hosts, Path]]:
    """Two hosts of which the second does not see the folder of the model; and the model."""
    source = folder / "far" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(model.read_bytes())
    with hosts(2, folder, hidden={1: source.parent}) as made:
        yield made, source


def command(mpirun: Launcher, made: Hosts, source: Path, run: Run, *more: Argument) -> list[str]:
    hostfile = example(made, EXAMPLES[mpirun.kind])
    options: tuple[Argument, ...] = (
        ("--hostfile", hostfile, *made.openmpi_reach(), "-x", "PYTHONPATH")
        if mpirun.kind == "openmpi"
        else ("-f", hostfile, *made.mpich_reach())
    )
    words: Sequence[Argument] = (
        mpirun.mpirun, *options, "-n", RANKS, mpirun.python, "-m", "llmpi", "batch", "-m", source,
        "-i", run.path.parent / "in.jsonl", "-o", run.path, "--ctx", "128", "--slots", "1",
        "--stage", "always", "--stage-dir", made.scratch / "local", *more,
    )  # fmt: skip
    return made.command([str(word) for word in words])


def environ(mpirun: Launcher, folder: Path) -> dict[str, str]:
    return {**base_env(), **mpirun.env, "TMPDIR": str(folder)}


def finish(words: list[str], env: dict[str, str]) -> Finished:
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def places(run: Run) -> dict[int, str]:
    """The host of each rank that worked in the last session."""
    return {worker["rank"]: worker["host"] for worker in run.about()["sessions"][-1]["workers"]}


def daemon_of(mpirun: Launcher, everyone: list[psutil.Process]) -> psutil.Process:
    """MPI's daemon on the second host, the one in another network than mpirun: ranks are its children."""
    here = network_of(everyone[0])
    daemons = [one for one in everyone if one.name() == DAEMONS[mpirun.kind] and network_of(one) != here]
    [daemon] = [one for one in daemons if any("llmpi" in child.cmdline() for child in one.children())]
    return daemon


def network_of(process: psutil.Process) -> int:
    return os.stat(f"/proc/{process.pid}/ns/net").st_ino


@pytest.mark.parametrize("lost", ["daemon", "link"])
def test_a_host_is_lost_and_the_same_command_goes_on(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, lost: str
) -> None:
    run = Run(tmp_path / "run")
    write_lines(tmp_path / "in.jsonl", prompts(REQUESTS, max_tokens=100, ignore_eos=True))
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    with on_two_hosts(mpirun, tiny_model, tmp_path) as (made, source):
        words = command(mpirun, made, source, run, "--lease", "3", "--rank0-lease", "5")
        env = environ(mpirun, tmp_path)
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        everyone: list[psutil.Process] = []
        try:
            until(lambda: run.lines_so_far() >= 3 or process.poll() is not None, "answers")
            assert process.poll() is None, (tmp_path / "said").read_text()
            first, second = made.names
            assert places(run) == {
                rank: first if rank < ON_THE_FIRST[mpirun.kind] else second for rank in range(1, RANKS)
            }
            copy = made.local(second) / f"llmpi-{os.getuid()}" / "blobs" / f"sha256-{digest}"
            assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            if lost == "daemon":
                daemon_of(mpirun, everyone).kill()
            else:
                subprocess.run(["ip", "-n", second, "link", "set", "eth0", "down"], check=True)
            process.wait(PATIENCE_S)  # with whatever status
            wait_gone(everyone)
        finally:
            for left in filter(lives, everyone):
                left.kill()
            process.kill()
            process.wait(PATIENCE_S)
        answered = set(run.by_id())
        if lost == "daemon":
            # Open MPI's ranks go with it, and what is left is not called complete; MPICH's go on without.
            assert run_alone("status", run.path).rc == {"openmpi": 3, "mpich": 0}[mpirun.kind]
        subprocess.run(["ip", "-n", second, "link", "set", "eth0", "up"], check=True)
        done = finish(words, env)
        assert done.rc == 0, done.output
    run.check_whole(IDS)
    assert answered <= set(run.by_id())
    assert run_alone("status", run.path).rc == 0
