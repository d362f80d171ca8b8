"""Whole jobs that have to stop, on a clock that the test moves: when they are gone, and what the run directory says.

Rank 0 and its worker are the real ones; the engine only lets time pass: a request takes as many seconds as tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from coordinator import closing, lead, setup
from coordinator.batchoptions import BatchOptions
from coordinator.closing import GOODBYE_S
from coordinator.config import JobConfig
from coordinator.launch import detect
from coordinator.lead import Lead
from coordinator.setup import prepare
from coordinator.signals import BY_HAND, StopSignals
from coordinator.surroundings import Surroundings
from coordinator.timekeeper import StopOptions, Timekeeper
from scheduling.errors import StoppedError
from storage.rundir import METRICS_NAME, STOP_NAME
from storage.runjson import read_run
from storage.runstatus import status
from storage.staging import Staged
from tests.coordinator.test_crashes import InTurn, Writer
from workers.protocol import Answer, Choice, EngineLoaded, Frame, FromEngine, Returned
from workers.protocol import Job as Work

BORN = 1000.0


class TimedEngine:
    """`workers.port.Engine` that ends a request after a second for each token."""

    def __init__(self, clock: Callable[[], float], slots: int) -> None:
        self._clock = clock
        self._slots = slots
        self._said: list[FromEngine] = [
            EngineLoaded(
                load_s=0.0, vocab_tokens=0, train_ctx_tokens=0, slots=slots, model_desc="timed", model_bytes=0,
                backend="timed", chat_template=False,
            )
        ]  # fmt: skip
        self._queued: dict[int, Work] = {}
        self._ends: dict[int, tuple[float, int]] = {}
        self.alive = True
        self.pid = None

    def submit(self, jobs: list[Work]) -> None:
        self._queued.update((job.key, job) for job in jobs)

    def recall(self, recall_id: int, keys: list[int]) -> None:
        self._said.append(Returned(recall_id, [key for key in keys if self._queued.pop(key, None) is not None]))

    def cancel(self, keys: list[int]) -> None:
        raise AssertionError("nobody cancels")

    def poll(self) -> list[FromEngine]:
        now, said = self._clock(), self._said
        self._said = []
        ended = [key for key, (end, _) in self._ends.items() if end <= now]
        answers = []
        for key in ended:
            tokens = self._ends.pop(key)[1]
            answers.append(Answer(key, [Choice("x", "length", tokens)], 4, tokens, 0.0, 0.5, float(tokens)))
        started = []
        while self._queued and len(self._ends) < self._slots:
            key = next(iter(self._queued))
            tokens = self._queued.pop(key).request.sampling.max_tokens or 1
            self._ends[key] = (now + tokens, tokens)
            started.append(key)
        return [*said, Frame(started=started, finished=answers)] if answers or started else said

    def fileno(self) -> int | None:
        return None

    def exit_reason(self) -> str:
        return ""

    def close(self, timeout_s: float) -> None:
        self.alive = False


class Job:
    """The same `llmpi batch` again and again. `at` says what happens when, in seconds from the start."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
        self.run_dir = folder / "run"
        self.input = folder / "in.jsonl"
        self.ids = [f"r{k}" for k in range(len(tokens))]
        lines = [{"custom_id": name, "prompt": "x", "max_tokens": n} for name, n in zip(self.ids, tokens, strict=True)]
        self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.now = BORN
        self.signals = StopSignals()
        config = JobConfig(model="none", engine="null", slots=2, prefetch=2, device="cpu", lease_s=1e9)
        patch.setattr(setup, "engine_factory", lambda *_: lambda placement: TimedEngine(self.clock, 2))
        self.setup = prepare(config)

    def clock(self) -> float:
        return self.now

    def signal(self, name: str) -> Callable[[], None]:
        def send() -> None:
            self.signals.count, self.signals.name = 1, name

        return send

    def ask(self) -> None:
        (self.run_dir / STOP_NAME).touch()

    def __call__(
        self, at: dict[float, Callable[[], None]] | None = None, environ: dict[str, str] | None = None, **stopping: Any
    ) -> tuple[int, float]:
        """Exit status, and how long it took."""
        self.signals = StopSignals()
        begin, todo = self.now, sorted((at or {}).items())

        def sleep(descriptors: Sequence[int | None], delay_s: float) -> None:
            self.now += max(delay_s, 0.02)
            while todo and self.now >= begin + todo[0][0]:
                todo.pop(0)[1]()

        options = BatchOptions(input=self.input, output=self.run_dir, quiet=True, stopping=StopOptions(**stopping))
        around = Surroundings(clock=self.clock, wall_clock=self.clock, sleep=sleep, recorder=Writer, executor=InTurn)
        keeper = Timekeeper(options.stopping, self.signals, self.clock, self.clock, environ=environ or {})
        code = Lead(self.setup, options, detect({}), None, Staged(), self.signals, around, keeper).run()
        return code, self.now - begin

    def lines(self) -> list[dict[str, Any]]:
        record = self.run_dir / "results.jsonl"
        return [json.loads(line) for line in record.read_bytes().splitlines()] if record.exists() else []

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = read_run(self.run_dir)["sessions"][-1]
        return found

    def check_finished_exactly_once(self) -> None:
        assert self()[0] == 0
        assert Counter(line["custom_id"] for line in self.lines()) == Counter(self.ids)
        assert status(self.run_dir).complete


Tokens = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    def make(*tokens: int) -> Job:
        return Job(tmp_path, monkeypatch, tokens)

    return make


@pytest.mark.parametrize("way", ["SIGUSR2", "SIGTERM", "SIGINT", "stop"])
def test_what_cannot_end_within_the_bound_is_cut_off_and_done_by_the_next_start(job: Tokens, way: str) -> None:
    run = job(30, 100, 5, 5, 5)
    code, took_s = run({20.0: run.ask if way == "stop" else run.signal(way)}, drain_timeout_s=20.0)
    assert code == 3
    assert 20.0 + 20.0 - GOODBYE_S <= took_s <= 20.0 + 20.0 - GOODBYE_S + 1.0, "the rest is for the end"
    assert [line["custom_id"] for line in run.lines()] == ["r0"], "it ended within the bound; nothing more was started"
    facts = run.facts
    assert (facts["outcome"], facts["unfinished"], facts["requests"]) == ("drained", 1, 1)
    assert facts["drain_s"] == pytest.approx(20.0 - GOODBYE_S, abs=0.7)
    assert facts["collectives"] == "1 ranks"
    assert (run.run_dir / METRICS_NAME).exists()
    run.check_finished_exactly_once()


def test_a_drain_ends_as_soon_as_nothing_runs(job: Tokens) -> None:
    run = job(5, 6, 50, 50)
    code, took_s = run({3.0: run.ask}, drain_timeout_s=20.0)
    assert (code, run.facts["unfinished"]) == (3, 0)
    assert took_s < 7.0
    assert len(run.lines()) == 2


def test_what_the_end_needs_is_loaded_while_requests_run(job: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job(5, 6)
    loaded: list[int] = []
    monkeypatch.setattr(lead, "load_ahead", lambda: loaded.append(len(run.lines())))
    assert run()[0] == 0
    assert loaded == [0]


def test_a_signal_while_the_record_is_read_ends_the_job_there(job: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job(5, 6)

    def read(disk: Any, path: Path, meanwhile: Callable[[], None]) -> None:
        run.signal("SIGTERM")()
        meanwhile()

    with monkeypatch.context() as patch:
        patch.setattr(lead, "recover", read)
        with pytest.raises(StoppedError, match="while the record was read, nothing was started"):
            run()
    run.check_finished_exactly_once()


def test_before_a_time_limit_short_requests_start_where_long_ones_do_not(job: Tokens) -> None:
    run = job(*[10] * 8, *[40] * 6, *[4] * 4)
    code, took_s = run(time_limit_s=70.0)
    assert code == 3
    assert took_s <= 70.0
    done = {line["custom_id"] for line in run.lines()}
    assert done >= {f"r{k}" for k in (*range(8), *range(14, 18))}
    facts = run.facts
    assert facts["set_aside"] > 0
    assert facts["unfinished"] == 0, "what was started has ended"
    assert "the time limit of 1m10s" in facts["reason"]
    run.check_finished_exactly_once()


def test_a_run_that_is_done_before_the_limit_notices_nothing(job: Tokens) -> None:
    run = job(5, 5, 5)
    assert run(time_limit_s=1000.0)[0] == 0
    assert status(run.run_dir).complete


def test_at_the_limit_what_runs_is_cut_off(job: Tokens) -> None:
    run = job(500, 500)
    code, took_s = run(time_limit_s=60.0)
    assert code == 3
    assert 60.0 - GOODBYE_S <= took_s <= 60.0 - GOODBYE_S + 1.0
    assert run.facts["unfinished"] == 2


def test_a_limit_that_is_over_starts_nothing(job: Tokens) -> None:
    run = job(5)
    run()
    other = BatchOptions(input=run.input, output=run.run_dir.with_name("other"), quiet=True)
    keeper = Timekeeper(StopOptions(time_limit_s=10.0), run.signals, run.clock, run.clock, environ={}, age_s=10.0)
    lead = Lead(run.setup, other, detect({}), None, Staged(), run.signals, keeper=keeper)
    with pytest.raises(StoppedError, match=r"time limit of 10s.*nothing was started"):
        lead.run()


def test_metrics_that_do_not_fit_into_the_bound_are_left_to_report(
    job: Tokens, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(closing, "METRICS_ROW_S", 1.0)
    run = job(*[1] * 40, 100)
    code, took_s = run({30.0: run.ask}, drain_timeout_s=20.0)
    assert code == 3
    assert took_s <= 50.0
    assert not (run.run_dir / METRICS_NAME).exists()
    assert f"llmpi report {run.run_dir}" in capsys.readouterr().err
    assert run.facts["collectives"].startswith("none")
    assert len(run.lines()) == 40, "the record has all"
    run.check_finished_exactly_once()
    assert (run.run_dir / METRICS_NAME).exists(), "a run that is done is made whole, whatever the time"


# ---------------------------------------------------------------- Slurm


def fake_scontrol(folder: Path, patch: pytest.MonkeyPatch, *, status: int = 0) -> Path:
    """A scontrol that notes what it is asked. Returns the file with its notes."""
    notes, tool = folder / "notes", folder / "scontrol"
    run_json = folder / "run" / "run.json"
    lock = folder / "run" / "lock"
    tool.write_text(
        f"#!/bin/sh\ntest -s {lock} && echo locked >> {notes}\ngrep -q drained {run_json} || echo early >> {notes}\n"
        f'echo "$@" >> {notes}\necho "Requested operation is disabled" >&2\nexit {status}\n'
    )
    tool.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return notes


IN_SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_END_TIME": f"{BORN + 100:.0f}"}
FAR_FROM_ITS_END = {"SLURM_JOB_ID": "77", "SLURM_JOB_END_TIME": f"{BORN + 86_400:.0f}"}


@pytest.mark.parametrize(
    ("way", "environ", "requeued"),
    [
        (None, IN_SLURM, True),
        ("SIGUSR2", IN_SLURM, True),
        ("SIGTERM", IN_SLURM, True),
        ("SIGTERM", FAR_FROM_ITS_END, False),
        ("SIGINT", IN_SLURM, False),
        (BY_HAND, IN_SLURM, True),
        (BY_HAND, FAR_FROM_ITS_END, False),
        ("stop", IN_SLURM, False),
    ],
)
def test_slurm_is_asked_to_requeue_where_time_was_up_and_not_where_somebody_stopped_the_run(
    job: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str | None, environ: dict[str, str],
    requeued: bool,
) -> None:  # fmt: skip
    notes = fake_scontrol(tmp_path, monkeypatch)
    run = job(10, 200, 200)
    at = {} if way is None else {50.0: run.ask if way == "stop" else run.signal(way)}
    code, took_s = run(at, environ, on_limit="requeue")
    assert code == 3
    assert took_s <= 85.0
    assert notes.exists() == requeued
    if requeued:
        assert notes.read_text() == "requeue 77\n"


def test_one_task_of_a_job_array_is_requeued_and_not_the_whole_array(
    job: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array's last task has the array's number."""
    notes = fake_scontrol(tmp_path, monkeypatch)
    task = IN_SLURM | {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert job(10, 200, 200)({}, task, on_limit="requeue")[0] == 3
    assert notes.read_text() == "requeue 77_3\n"


def test_a_signal_after_llmpi_stop_changes_nothing(
    job: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = fake_scontrol(tmp_path, monkeypatch)
    run = job(10, 200, 200)
    code, took_s = run({50.0: run.ask, 52.0: run.signal("SIGUSR2")}, IN_SLURM, on_limit="requeue")
    assert code == 3
    assert took_s <= 70.0
    assert not notes.exists()


def test_a_complete_run_is_not_requeued(job: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = fake_scontrol(tmp_path, monkeypatch)
    assert job(10, 10)({}, IN_SLURM, on_limit="requeue")[0] == 0
    assert not notes.exists()


def test_that_slurm_does_not_requeue_is_said(
    job: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_scontrol(tmp_path, monkeypatch, status=1)
    assert job(200)({}, IN_SLURM, on_limit="requeue")[0] == 3
    assert "Slurm does not requeue job 77: Requested operation is disabled" in capsys.readouterr().err
