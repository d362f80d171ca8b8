"""Looking at one folder, one process, one Slurm, and what becomes of what does not answer."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.doctor import probe_files
from coordinator.doctor.facts import Place
from coordinator.doctor.gather import Options, Probe, gather, limits, look_at_model, other_gpus
from coordinator.doctor.probe_files import existing, look_at
from coordinator.doctor.probe_mpi import look_at_traffic
from coordinator.doctor.probe_slurm import look_at_slurm
from workers.llama_build import LlamaBuild

SHOWN = (
    "JobId=7 JobName=a JobState=RUNNING Restarts=1 Requeue=1 TimeLimit=01:00:00 EndTime=2030-01-01T01:00:00 "
    "Partition=gpu NodeList=n[1-2]"
)


def test_a_folder_that_is_not_there_yet_is_looked_at_above_it(tmp_path: Path) -> None:
    found = look_at("run directory", tmp_path / "runs" / "first")
    assert found.problem == ""
    assert found.path == str(tmp_path / "runs" / "first")
    assert existing(tmp_path / "runs" / "first") == tmp_path
    assert found.type
    assert found.free_bytes
    assert found.write_bytes_per_s > 0
    assert found.read_bytes_per_s > 0
    assert found.fsync_s is not None
    assert found.faults == ()
    assert list(tmp_path.iterdir()) == []


def test_two_places_that_are_one_folder_do_not_meet(tmp_path: Path) -> None:
    probes = [Probe(lambda: look_at("run directory", tmp_path, speed=False)) for _ in range(8)]
    assert [probe.result(Place(use="", path=""), 30.0)[0].faults for probe in probes] == [()] * 8


def test_without_speeds_little_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_files, "_written", lambda fd: pytest.fail("a sample was written"))
    assert look_at("run directory", tmp_path, speed=False).write_bytes_per_s == 0


def test_what_does_not_work_there_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    found = look_at("run directory", tmp_path, speed=False)
    assert found.faults[0] == "lockf fails: No locks available"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(probe_files, "_written", full)
    assert "No space left" in look_at("run directory", tmp_path).problem
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_hangs_or_fails_says_so() -> None:
    never = threading.Event()
    assert Probe(never.wait).result(False, 0.05) == (False, "no answer within 0 s")
    assert Probe(lambda: 1 // 0).result(5, 10.0) == (5, "ZeroDivisionError: integer division or modulo by zero")
    assert Probe(lambda: 7).result(5, 10.0) == (7, "")
    never.set()


def test_a_rank_tells_what_is_asked_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.doctor.gather.ask_build", lambda environ, timeout_s: LlamaBuild(version="1"))
    environ = {
        "HOME": str(tmp_path), "UCX_TLS": "rc", "HF_TOKEN": "secret", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }  # fmt: skip
    options = Options(run_dir=tmp_path, stage_dir=str(tmp_path), quick=True)
    second = gather(1, options, environ)
    assert second.node is None
    assert second.environ == {"UCX_TLS": "rc"}
    assert second.versions["python"] == second.python
    first = gather(0, options, environ | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert first.node is not None
    assert first.node.llama == LlamaBuild(version="1")
    assert [place.use for place in first.node.places] == ["run directory", "model store", "staging place"]
    assert first.unanswered == {}


def test_a_model_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    assert "no" in look_at_model(str(tmp_path / "a.gguf"), {"HOME": str(tmp_path)}).problem


def test_makers_of_gpus_are_the_kernels(tmp_path: Path) -> None:
    for number, vendor in ((128, "0x1002"), (129, "0x10de"), (130, "0x1002")):
        (tmp_path / f"class/drm/renderD{number}/device").mkdir(parents=True)
        (tmp_path / f"class/drm/renderD{number}/device/vendor").write_text(f"{vendor}\n")
    assert other_gpus(tmp_path) == ("AMD",)


def test_a_home_that_is_not_there_cannot_be_written(tmp_path: Path) -> None:
    assert not limits({"HOME": str(tmp_path / "none")}).home_writable
    assert limits({"HOME": str(tmp_path)}).home_writable
    assert limits({}, tmp_path / "none").shm_bytes is None


def test_transports_are_what_a_process_holds_open(tmp_path: Path) -> None:
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "3").symlink_to("/dev/infiniband/uverbs0")
    (tmp_path / "maps").write_text(
        "7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/libucp.so.0.0.0\n7f02-7f03 rw-s 0 00:1 2  /dev/shm/sm_segment.n1\n"
    )
    (tmp_path / "class/infiniband/mlx5_0").mkdir(parents=True)
    found = look_at_traffic(tmp_path, tmp_path)
    assert found.devices == {"RDMA": ("/dev/infiniband/uverbs0",)}
    assert (found.libraries, found.shared, found.cards) == (("libucp",), ("/dev/shm/sm_segment.n1",), ("mlx5_0",))
    assert look_at_traffic(tmp_path / "none").libraries is None


def test_slurm_is_asked_for_the_job_and_its_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    asked: list[Sequence[str]] = []

    def ask(command: Sequence[str]) -> str:
        asked.append(command)
        return SHOWN if command[0] == "scontrol" else "2-00:00:00\n"

    found = look_at_slurm({"SLURM_JOB_ID": "7"}, ask, lambda: 0.0)
    assert found is not None
    assert (found.state, found.partition, found.nodes) == ("RUNNING", "gpu", "n[1-2]")
    assert (found.limit, found.partition_limit, found.requeue, found.restarts) == ("01:00:00", "2-00:00:00", True, 1)
    assert found.left_s is not None
    assert found.left_s > 1e9
    assert asked == [["scontrol", "show", "job", "-o", "7"], ["sinfo", "-h", "-p", "gpu", "-o", "%l"]]
    assert look_at_slurm({}, ask) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "cannot be run"),
        (subprocess.TimeoutExpired("scontrol", 10), "did not answer within 10 s"),
        (subprocess.CalledProcessError(1, "scontrol", stderr="Invalid job id"), "Invalid job id"),
    ],
)
def test_a_slurm_that_cannot_be_asked_says_why(error: Exception, said: str) -> None:
    def ask(command: Sequence[str]) -> str:
        raise error

    found = look_at_slurm({"SLURM_JOB_ID": "7"}, ask)
    assert found is not None
    assert said in found.problem
