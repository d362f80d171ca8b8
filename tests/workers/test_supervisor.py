"""The supervisor over a small script that misbehaves in every way an engine can."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT
from tests.workers.engine_fakes import job
from workers.port import Engine
from workers.protocol import EngineConfig, EngineFailed, EngineLoaded, Frame, FromEngine, Returned
from workers.supervisor import STDERR_LOG_BYTES, EngineProcess, engine_environment, last_words, waiting_environment

SCRIPT = Path(__file__).with_name("fake_engine.py")
PATIENCE_S = 300.0
"""Bounds waiting for what never comes; a machine under load takes its time for everything else."""

Start = Callable[..., EngineProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def started(behaviour: str, log_path: Path | None = None) -> EngineProcess:
            engine = EngineProcess(
                EngineConfig(model="none", slots=1, device_mask={"SOME_MASK": "GPU-7"}),
                log_path=log_path,
                command=[sys.executable, str(SCRIPT), behaviour],
                environ={**os.environ, "OMPI_COMM_WORLD_RANK": "1"},
            )
            stack.callback(engine.close, 0.0)
            return engine

        yield started


def listen(engine: Engine, until: Callable[[list[FromEngine]], bool] | None = None) -> list[FromEngine]:
    """All that the engine says until `until` holds, or until its end."""
    said: list[FromEngine] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while engine.alive and not (until is not None and until(said)):
        assert time.monotonic() < deadline_s, f"nothing came of it: {said}"
        fd = engine.fileno()
        select.select([] if fd is None else [fd], [], [], 0.02)
        said += engine.poll()
    return said


def loaded(said: list[FromEngine]) -> bool:
    return any(isinstance(message, EngineLoaded) for message in said)


def until(holds: Callable[[], bool], story: Callable[[], str]) -> None:
    pause = threading.Event()
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, story()
        pause.wait(0.02)


def wait_for_reason(engine: EngineProcess, reason: str) -> None:
    """`exit_reason` becomes `reason`: stderr is drained by a thread, which may be behind when the engine has ended."""
    until(lambda: engine.exit_reason() == reason, engine.exit_reason)


@pytest.mark.slow
def test_what_is_sent_is_answered(start: Start) -> None:
    engine: Engine = start("serve")
    engine.submit([job(3), job(4)])
    engine.recall(9, [4])
    said = listen(engine, lambda said: len(said) >= 3)
    assert said[1:] == [Frame(started=[3, 4]), Returned(9, [4])]
    assert engine.alive
    assert engine.exit_reason() == ""
    engine.close(PATIENCE_S)
    assert listen(engine) == []
    assert not engine.alive
    assert engine.exit_reason() == "exit code 0"


@pytest.mark.slow
def test_a_submission_larger_than_the_pipe_waits_without_blocking(start: Start) -> None:
    engine = start("serve")
    engine.submit([job(key, (1,) * 20_000) for key in range(300)])
    said = listen(engine, lambda said: len(said) >= 2)
    assert said[1] == Frame(started=list(range(300)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("abort", "killed by SIGABRT; its last words: assertion failed"), ("exit", "exit code 3")],
)
def test_a_crash_is_told_with_its_reason(start: Start, behaviour: str, reason: str) -> None:
    engine = start(behaviour)
    assert loaded(listen(engine))
    assert engine.fileno() is None
    wait_for_reason(engine, reason)
    engine.submit([job(1)])
    engine.cancel([1])
    assert engine.poll() == []


@pytest.mark.slow
def test_a_partial_frame_at_death_is_dropped(start: Start) -> None:
    engine = start("die in a frame")
    assert listen(engine)[1:] == [Frame(started=[5])]
    assert engine.exit_reason() == "killed by SIGKILL"


@pytest.mark.slow
def test_an_engine_that_talks_nonsense_is_killed(start: Start) -> None:
    engine = start("garbage")
    assert loaded(listen(engine))
    engine.close(PATIENCE_S)
    assert "no frame of ours" in engine.exit_reason()


@pytest.mark.slow
def test_an_engine_that_closes_its_pipe_is_killed(start: Start) -> None:
    engine = start("mute")
    assert loaded(listen(engine))
    assert engine.exit_reason() == "killed by SIGKILL"


@pytest.mark.slow
def test_close_ends_an_engine_that_ignores_the_end_of_its_pipe(start: Start) -> None:
    engine = start("deaf")
    listen(engine, loaded)
    engine.close(0.1)
    engine.close(0.1)
    wait_for_reason(engine, "killed by SIGKILL")


@pytest.mark.slow
def test_what_an_engine_says_while_it_is_closed_is_not_lost(start: Start) -> None:
    engine = start("last words")
    listen(engine, loaded)
    engine.close(PATIENCE_S)
    said = listen(engine) + engine.poll()
    assert len(said) == 3000
    assert engine.exit_reason() == "exit code 0"


@pytest.mark.slow
def test_a_flood_on_stderr_is_drained_and_bounded(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    engine = start("flood", log)
    listen(engine, loaded)  # it says so after 100 MB of noise
    engine.close(PATIENCE_S)
    wait_for_reason(engine, f"exit code 0; its last words: the very last line (more in {log})")
    assert log.stat().st_size == STDERR_LOG_BYTES


@pytest.mark.slow
def test_an_engine_that_nobody_listens_to_waits_and_nothing_it_says_is_lost(start: Start) -> None:
    engine = start("chatter")  # more than its pipe holds
    process = psutil.Process(engine.pid)
    stands = [0.0]

    def stands_still() -> bool:
        before, stands[0] = stands[0], sum(process.cpu_times()[:2])
        return process.status() == psutil.STATUS_SLEEPING and before == stands[0] > 0

    until(stands_still, lambda: "it does not wait for us")
    assert len(listen(engine)) == 1 + 3000
    assert engine.exit_reason() == "exit code 0"


@pytest.mark.slow
def test_a_log_that_cannot_be_written_stops_nothing(start: Start, tmp_path: Path) -> None:
    engine = start("flood", tmp_path / "missing" / "engine.log")
    listen(engine, loaded)
    engine.close(PATIENCE_S)
    wait_for_reason(engine, "exit code 0; its last words: the very last line")


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        ("warning: one\n\n  GGML_ASSERT(x) failed  \n", "GGML_ASSERT(x) failed"),
        ("cells.cpp:7: full\nFatal Python error: Aborted\n\nThread 0x1\n  File x\n", "cells.cpp:7: full"),
        ("Fatal Python error: Segmentation fault\n\nThread 0x1\n", "Fatal Python error: Segmentation fault"),
        ("x" * 5_000, "x" * 300),
        (
            "CUDA error: out of memory\n  current device: 0, in function alloc\n  cuMemCreate()\n"
            "ggml-cuda.cu:103: CUDA error\nFatal Python error: Aborted\n",
            "CUDA error: out of memory",
        ),
    ],
)
def test_last_words_are_the_line_that_says_most(stderr: str, words: str) -> None:
    assert last_words(stderr) == words


@pytest.mark.slow
def test_the_engine_sees_its_mask_and_no_launcher(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    engine = start("environment", log)
    listen(engine)
    assert engine.exit_reason().startswith("exit code 0")
    until(lambda: log.exists() and "PATH" in log.read_text(), engine.exit_reason)
    names = log.read_text().split()
    assert "SOME_MASK" in names
    assert "GGML_NO_BACKTRACE" in names
    assert "OMPI_COMM_WORLD_RANK" not in names


def test_the_environment_loses_launchers_and_keeps_the_rest() -> None:
    given = {
        "PATH": "/bin",
        "HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_RANK": "1",
        "PMI_RANK": "1",
        "PRTE_LAUNCHED": "1",
        "MPI_LOCALRANKID": "0",
        "MPICH_X": "1",
        "HYDRA_X": "1",
        "SLURM_PROCID": "1",
        "PYTHONPATH": os.pathsep.join(["/other", str(ROOT)]),
    }
    made = engine_environment(given, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert made == {
        "PATH": "/bin",
        "HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "GPU-1",
        "GGML_NO_BACKTRACE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), "/other"]),
    }


@pytest.mark.parametrize(
    ("given", "threads", "gpu_layers", "expected"),
    [
        ({}, 1, 0, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_NUM_THREADS": "3"}, 8, 0, {"GOMP_SPINCOUNT": "1000"}),
        ({}, 9, 0, {}),
        ({}, 2, 5, {}),
        ({}, 2, -1, {}),
        ({"GOMP_SPINCOUNT": "7"}, 2, 0, {}),
        ({"OMP_WAIT_POLICY": "active"}, 2, 0, {}),
    ],
)
def test_few_threads_on_processors_do_not_look_for_each_other_for_long_unless_told(
    given: dict[str, str], threads: int, gpu_layers: int, expected: dict[str, str]
) -> None:
    engine = EngineConfig(model="any", slots=1, threads=threads, gpu_layers=gpu_layers)
    assert waiting_environment(given, engine) == expected


@pytest.mark.slow
def test_the_engine_is_ours_wherever_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise SystemExit('not the workers you look for')")
    (tmp_path / "msgspec.py").write_text("raise SystemExit('nor this')")
    monkeypatch.chdir(tmp_path)
    engine = EngineProcess(EngineConfig(model="missing.gguf", slots=1))
    (failed,) = listen(engine)
    engine.close(PATIENCE_S)
    assert isinstance(failed, EngineFailed)
    assert failed.reason == "there is no model file missing.gguf"


PARENT = """
import select, signal, sys
from workers.protocol import EngineConfig
from workers.supervisor import EngineProcess
engine = EngineProcess(EngineConfig(model=sys.argv[1], slots=2, ctx_tokens=256))
said = []
while not said:
    select.select([engine.fileno()], [], [])
    said = engine.poll()
print(engine.pid, type(said[0]).__name__, flush=True)
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
def test_the_engine_dies_with_its_parent(tiny_model: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_model)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with parent:
        assert parent.stdout is not None
        pid, said = parent.stdout.readline().split()
        assert said == b"EngineLoaded"
        watch = os.pidfd_open(int(pid))
        parent.send_signal(signal.SIGKILL)
        assert select.select([watch], [], [], PATIENCE_S)[0], "the engine outlived its parent"
        os.close(watch)
