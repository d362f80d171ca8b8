"""`llmpi batch` as a person runs it: every request exactly once, whatever the launcher, the input and the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import Finished, Launcher, run_alone, start_alone
from tests.system.runs import PATIENCE_S, Line, Run, check_ranks_add_up, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMALL = ("--max-tokens", 6, "--ctx", 256, "--slots", 4)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["work-stealing", "round-robin"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_request_is_answered_exactly_once(
    mpirun: Launcher, real_model: Path, tmp_path: Path, ranks: int, schedule: str
) -> None:
    lines = prompts(16)
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = mpirun(ranks, "batch", "-m", real_model, "-i", given, "-o", run.path, "--schedule", schedule, *SMALL)
    assert done.rc == 0, done.output
    assert "\x1b" not in done.stdout + done.stderr
    run.check_whole(line["custom_id"] for line in lines)
    check_ranks_add_up(run)
    assert len(run.metrics()["ranks"]) == ranks - 1
    assert {line["llmpi"]["rank"] for line in run.record()} <= set(range(1, ranks))
    assert f"{ranks} ranks" in run.metrics()["attrs"]["collectives"]


@pytest.mark.mpi
def test_a_single_rank_works_itself(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(5))
    run = Run(tmp_path / "run")
    done = mpirun(1, "batch", "-m", tiny_model, "-i", given, "-o", run.path, *SMALL)
    assert done.rc == 0, done.output
    run.check_whole(f"r{k}" for k in range(5))
    check_ranks_add_up(run)


@pytest.mark.mpi
def test_one_request_for_many_ranks(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(1))
    run = Run(tmp_path / "run")
    done = mpirun(4, "batch", "-m", tiny_model, "-i", given, "-o", run.path, *SMALL)
    assert done.rc == 0, done.output
    run.check_whole(["r0"])
    check_ranks_add_up(run)
    assert len(run.metrics()["ranks"]) == 3, "a rank whose engine came too late is in the table, with zeros"


@pytest.mark.mpi
def test_rank_0_works_too_when_asked(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(40))
    run = Run(tmp_path / "run")
    done = mpirun(2, "batch", "-m", tiny_model, "-i", given, "-o", run.path, "--coordinator-works", *SMALL)
    assert done.rc == 0, done.output
    run.check_whole(f"r{k}" for k in range(40))
    check_ranks_add_up(run)
    assert sorted(run.metrics()["ranks"]["rank"]) == [0, 1]


@pytest.mark.mpi
def test_llmpi_starts_its_own_mpirun(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(9))
    run = Run(tmp_path / "run")
    command = ("batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ranks", 3, *SMALL)
    done = run_alone(*command, python=mpirun.python, env=mpirun.env)
    assert done.rc == 0, done.output
    run.check_whole(f"r{k}" for k in range(9))
    check_ranks_add_up(run)
    assert run.about()["sessions"][0]["ranks"] == 3


SHAPES: list[Line] = [
    {
        "custom_id": "chat", "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "Schöne Grüße, 你好"}], "max_tokens": 4},
    },
    {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 4}},
    {"prompt": "no custom_id", "max_tokens": 4},
    {"custom_id": "short", "prompt": "x" * 256, "max_tokens": 4},
    {"custom_id": "huge", "prompt": "the quick brown fox jumps over the lazy dog, and " * 2048, "max_tokens": 4},
    {"custom_id": "three", "prompt": "three answers", "n": 3, "max_tokens": 5, "temperature": 1.0},
    {"custom_id": "after", "prompt": "goes on", "max_tokens": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Finished]:
    """A finished run of SHAPES without a launcher, and how it ended."""
    folder = tmp_path_factory.mktemp("shapes")
    given = write_lines(folder / "in.jsonl", SHAPES)
    run = Run(folder / "run")
    options = ("--ctx", 2048, "--slots", 4, "--json")
    return run, run_alone("batch", "-m", tiny_model, "-i", given, "-o", run.path, *options)


def test_requests_of_every_shape_and_length_in_one_file(shapes: tuple[Run, Finished]) -> None:
    run, done = shapes
    assert len(str(SHAPES[4]["prompt"])) > 100_000
    assert done.rc == 1, done.output
    found = run.by_id()
    assert len(found) == len(SHAPES)
    run.check_whole(found, failed=1)
    check_ranks_add_up(run)
    assert found["huge"]["response"] is None
    assert "2048" in found["huge"]["error"]["message"]
    choices = found["three"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["text"] for choice in choices}) > 1
    assert found["three"]["llmpi"]["output_tokens"] == found["three"]["response"]["body"]["usage"]["completion_tokens"]
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert found["text"]["response"]["body"]["choices"][0]["finish_reason"] == "length"


def test_export_is_in_the_order_of_the_input(shapes: tuple[Run, Finished], tmp_path: Path) -> None:
    run, _ = shapes
    printed = run_alone("export", run.path, "--order", "input")
    assert printed.rc == 0, printed.output
    entries = [json.loads(line) for line in printed.stdout.splitlines()]
    given = [line.get("custom_id") for line in SHAPES]
    assert [entry["llmpi"]["index"] for entry in entries] == list(range(len(SHAPES)))
    assert [entry["custom_id"] for entry, name in zip(entries, given, strict=True) if name] == list(filter(None, given))
    written = run_alone("export", run.path, "-o", tmp_path / "out.jsonl")
    assert written.rc == 0, written.output
    assert (tmp_path / "out.jsonl").read_text() == printed.stdout
    completion = run_alone("export", run.path, "--order", "completion")
    assert sorted(completion.stdout.splitlines()) == sorted(printed.stdout.splitlines())


def test_status_and_report_say_the_same_as_the_run(shapes: tuple[Run, Finished]) -> None:
    run, done = shapes
    status = run_alone("status", run.path, "--json")
    assert status.rc == 1, status.output
    told = json.loads(status.stdout)
    assert (told["done"], told["ok"], told["failed"], told["total"]) == (7, 6, 1, 7)
    assert told["complete"]
    assert not told["running"]
    report = run_alone("report", run.path, "--json")
    assert report.rc == 0, report.output
    assert json.loads(report.stdout) == json.loads(done.stdout)
    assert json.loads(report.stdout)["failed"] == 1
    tables = run_alone("report", run.path)
    assert tables.rc == 0, tables.output
    for part in ("6 answered, 1 failed", "TTFT", "TPOT", "P99", str(run.path)):
        assert part in tables.stdout


def test_a_100_kb_prompt_is_answered_where_the_context_holds_it(tiny_model: Path, tmp_path: Path) -> None:
    # One word of many letters, so that 100 KB are few enough tokens for the model's context of 8,192.
    word = " International" * 7_150
    lines = [{"custom_id": "huge", "prompt": word}, {"custom_id": "short", "prompt": "x" * 256}]
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = run_alone(
        "batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 8192, "--slots", 2, "--max-tokens", 3
    )
    assert done.rc == 0, done.output
    run.check_whole(["huge", "short"])
    assert run.by_id()["huge"]["llmpi"]["prompt_tokens"] > 7_000


def test_a_text_file_is_a_prompt_a_line(tiny_model: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.txt"
    given.write_text("first line\nzweite Zeile, mit Ü\n第三行\n", encoding="utf-8")
    run = Run(tmp_path / "run")
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", run.path, *SMALL)
    assert done.rc == 0, done.output
    assert len(run.by_id()) == 3
    run.check_whole(run.by_id())


LOSE_A_ROW = """
import sys
import coordinator.session as session
from coordinator.mpi_collectives import SoloCollectives
class Lossy(SoloCollectives):
    def gather_rows(self, rows, take):
        super().gather_rows(rows[1:] if "e2e_s" in rows.dtype.names else rows, take)
session.SoloCollectives = Lossy
from coordinator.cli import main
main()
"""


def test_sums_that_differ_are_told_and_cost_the_run_nothing(tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(5))
    run = Run(tmp_path / "run")
    arguments = ("batch", "-m", str(tiny_model), "-i", str(given), "-o", str(run.path), *map(str, SMALL))
    with start_alone(*arguments, program=["-c", LOSE_A_ROW]) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 4, done.output
    assert "requests: 5 reduced, 4 gathered" in done.stderr
    assert "Traceback" not in done.stderr
    run.check_whole(f"r{k}" for k in range(5))
    metrics = run.metrics()
    assert len(metrics["requests"]) == 5, "made from the record"
    assert "5 reduced, 4 gathered" in metrics["attrs"]["sums_differ"]
    assert run_alone("status", run.path).rc == 0


@pytest.mark.mpi
def test_a_real_model_obeys_stop_strings_and_ends_by_itself(mpirun: Launcher, real_model: Path, tmp_path: Path) -> None:
    hi = {"messages": [{"role": "user", "content": "Say hi."}]}
    question = {"messages": [{"role": "user", "content": "Count from one to ten in digits, with commas."}]}
    lines = [
        {"custom_id": "stopped", "prompt": "1, 2, 3, 4, 5, 6,", "stop": ["9"], "max_tokens": 40, "temperature": 0},
        {"custom_id": "ends", **hi, "max_tokens": 200, "temperature": 0},
        {"custom_id": "cut", **question, "max_tokens": 3, "temperature": 0},
    ]
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", real_model, "-i", given, "-o", run.path, "--slots", 2, "--ctx", 512)
    assert done.rc == 0, done.output
    run.check_whole(["stopped", "ends", "cut"])
    found = {name: line["response"]["body"]["choices"][0] for name, line in run.by_id().items()}
    assert found["stopped"]["finish_reason"] == "stop"
    assert "7" in found["stopped"]["text"]
    assert "9" not in found["stopped"]["text"]
    assert found["ends"]["finish_reason"] == "stop"
    assert found["cut"]["finish_reason"] == "length"


@pytest.mark.mpi
def test_answers_do_not_depend_on_ranks_or_schedule(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    """A request without a seed gets one from (run seed, index)."""
    lines = [{"custom_id": f"s{k}", "prompt": f"My name is{' very' * k}", "max_tokens": 6} for k in range(6)]
    given = write_lines(tmp_path / "in.jsonl", lines)
    options = ("-m", tiny_model, "-i", given, "--temperature", "0.9", "--seed", 5, "--slots", 1, "--ctx", 128)
    one, three = Run(tmp_path / "one"), Run(tmp_path / "three")
    assert run_alone("batch", *options, "-o", one.path).rc == 0
    assert mpirun(3, "batch", *options, "-o", three.path, "--schedule", "round-robin").rc == 0
    texts = [
        {name: line["response"]["body"]["choices"][0]["text"] for name, line in run.by_id().items()}
        for run in (one, three)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1
