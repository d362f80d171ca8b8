"""What the system tests share: inputs to write, and what a run directory must look like afterwards.

`Run` reads a run directory the way a person would, with json and h5py, not through the product's own readers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import psutil

from tests.launch import PATIENCE_S as PATIENCE_S
from tests.launch import ROOT, Finished, Job, Launcher
from tests.storage.hdf5_rules import check_any_reader_takes

Line = dict[str, Any]


def prompts(count: int, **body: Any) -> list[Line]:
    """`count` plain requests of different lengths, greedy unless `body` says otherwise."""
    words = ("river", "engine", "copper", "seven", "lamp", "yesterday")
    return [
        {"custom_id": f"r{k}", "prompt": " ".join(words[: 1 + k % len(words)]) + f" {k}", "temperature": 0} | body
        for k in range(count)
    ]


def write_lines(path: Path, lines: Iterable[Line]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    def record(self) -> list[Line]:
        """Its whole lines: a kill can leave the beginning of another behind them, which counts for nothing."""
        file = self.path / "results.jsonl"
        return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []

    def by_id(self) -> dict[str, Line]:
        """Lines of the record by custom_id; each must be there once only."""
        lines = self.record()
        counts = Counter(line["custom_id"] for line in lines)
        assert set(counts.values()) <= {1}, {name: count for name, count in counts.items() if count > 1}
        return {line["custom_id"]: line for line in lines}

    def about(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        return told

    def lines_so_far(self) -> int:
        file = self.path / "results.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def metrics(self) -> dict[str, Any]:
        check_any_reader_takes(self.path / "metrics.h5")
        with h5py.File(self.path / "metrics.h5", "r", locking=False) as file:
            return {name: file[name][:] for name in ("requests", "ranks", "telemetry")} | {"attrs": dict(file.attrs)}

    def check_whole(self, ids: Iterable[str], failed: int = 0) -> None:
        """Every request exactly once in the record; metrics and run.json say the same as the record."""
        found = self.by_id()
        assert set(found) == set(ids)
        assert sum(line["error"] is not None for line in found.values()) == failed
        assert self.about()["complete"] is True
        metrics = self.metrics()
        rows, _ranks = metrics["requests"], metrics["ranks"]
        assert sorted(rows["index"]) == sorted(line["llmpi"]["index"] for line in found.values())
        assert int((rows["ok"] == 0).sum()) == failed
        for name in ("prompt_tokens", "output_tokens"):
            assert int(rows[name].sum()) == sum(line["llmpi"][name] for line in found.values())


def check_ranks_add_up(run: Run) -> None:
    """/ranks says what /requests says. Only for runs of one session whose input had no bad line.

    On a loaded machine a request may have been copied to another rank and answered twice: the second answer is dropped,
    and is in the books of the rank that gave it.
    """
    metrics, dropped = run.metrics(), run.about()["sessions"][-1]["late_answers_dropped"]
    rows, ranks = metrics["requests"], metrics["ranks"]
    assert int(ranks["requests"].sum()) == len(rows) + dropped
    assert int(ranks["failed"].sum()) == int((rows["ok"] == 0).sum())
    for name in ("prompt_tokens", "output_tokens"):
        told, recorded = int(ranks[name].sum()), int(rows[name].sum())
        assert told >= recorded if dropped else told == recorded


def our_lines(done: Finished) -> list[str]:
    """What llmpi itself says as errors; the launcher's banner is not ours."""
    return [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("llmpi: ")]


def check_one_clear_line(done: Finished, rc: int, *words: str) -> str:
    """It ended with `rc` and one line of ours that has all `words`, and no traceback."""
    assert done.rc == rc, done.output
    assert "Traceback" not in done.stderr + done.stdout, done.output
    lines = our_lines(done)
    assert len(lines) == 1, done.output
    for word in words:
        assert word in lines[0], done.output
    return lines[0]


def until(holds: Callable[[], Any], what: str) -> Any:
    """Poll another process's doings until `holds` gives something true, which is returned."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s"
        pause.wait(0.05)
    return found


def wait_for_answers(job: Job, run: Run) -> None:
    """The job has recorded an answer, and still runs."""

    def some() -> bool:
        assert job.process.poll() is None, job.stdout + job.stderr
        return run.lines_so_far() > 0

    until(some, "answers in the record")


def drain_signal(mpirun: Launcher, mpich: signal.Signals = signal.SIGTERM) -> signal.Signals:
    """What this launcher hands on to its ranks without killing them. MPICH's does so with SIGTERM and SIGINT."""
    return signal.SIGUSR2 if mpirun.kind == "openmpi" else mpich


def lives(process: psutil.Process) -> bool:
    """Whether the process runs. One that has ended does not, though its status may still wait to be collected."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: Iterable[psutil.Process]) -> None:
    """All of them end by themselves. Name them while the job runs: later, who belonged to it cannot be told."""
    left = list(processes)

    def all_gone() -> bool:
        left[:] = filter(lives, left)
        return not left

    until(all_gone, f"the end of {left}")


HOLD = """
import sys
if any("workers.engine_main" in word for word in sys.orig_argv):
    import os, time
    from workers.outbox import Outbox
    from workers.protocol import Frame
    send, answered, running = Outbox.send, set(), set()
    def held_send(self, message):
        send(self, message)
        if isinstance(message, Frame):
            running.update(message.started)
            answered.update(answer.key for answer in message.finished)
            running.difference_update(answered)
            while answered and running and not os.path.exists(FOLDER + "/open"):
                open(f"{FOLDER}/held.{os.getpid()}", "w").close()
                time.sleep(0.01)
    Outbox.send = held_send
"""


@dataclass(frozen=True)
class Gate:
    """Until it is opened, each engine stands still where it has told of an answer and of requests that still run.

    What a test does to a job meets work then, however fast the engines are and however late the test is.
    """

    folder: Path

    @classmethod
    def closed(cls, folder: Path) -> Gate:
        """`folder` is made, and is the gate's own."""
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"FOLDER = {str(folder)!r}\n{HOLD}")
        return cls(folder)

    @property
    def env(self) -> dict[str, str]:
        """For the job's environment: Python imports `sitecustomize` when it starts."""
        return {"PYTHONPATH": os.pathsep.join((str(self.folder), str(ROOT)))}

    def open(self) -> None:
        (self.folder / "open").touch()

    def held(self) -> list[psutil.Process]:
        """The engines that stand still and live."""
        found = []
        for file in self.folder.glob("held.*"):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(file.name.split(".")[1])))
        return list(filter(lives, found))


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def engines_of(job: Job) -> list[psutil.Process]:
    return [process for process in job.processes() if "workers.engine_main" in command_of(process)]


def children_of(processes: Iterable[psutil.Process]) -> set[int]:
    found: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.update(child.pid for child in process.children(recursive=True))
    return found


def ranks_of(job: Job) -> list[psutil.Process]:
    """The job's processes that are ranks: Python, but neither engines, what those start, nor the launcher."""
    engines = engines_of(job)
    others = {job.process.pid, *(engine.pid for engine in engines), *children_of(engines)}
    found = []
    for process in job.processes():
        words = command_of(process).split()
        if process.pid not in others and words and "python" in Path(words[0]).name:
            found.append(process)
    return found
