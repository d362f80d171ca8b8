"""What a run was like: the figures as data, and as tables that show every text as it is."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console

from coordinator import report, rundirs
from coordinator.report import print_report, report_data
from coordinator.rundirs import export_answers
from coordinator.sidebyside import comparison
from scheduling.errors import RunDirError
from scheduling.histogram import LogHistogram
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request
from scheduling.tables import RANK, TELEMETRY
from storage.export import export_table
from storage.metrics import write_metrics
from storage.recovery import RECORD_NAME
from storage.rundir import METRICS_NAME
from storage.runjson import RUN_NAME
from tests.scheduling.test_logprobs import packed
from tests.storage.samples import rows

ANSWERS = ("plain", r"LaTeX \[x^2\] and \[/frac]", "[bold]no markup[/bold]", "two\nlines", "x" * 1_000)

BEGUN = (
    '{"format": "llmpi-run", "version": 1, "identity": {}, "details": {}, "sessions": [], "total": null, '
    '"complete": false}'
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run [bold]"
    folder.mkdir()
    ranks = np.zeros(3, RANK)
    ranks["rank"], ranks["session"] = [1, 2, 1], [1, 1, 0]
    ranks["host"], ranks["device"] = b"node[7]", b"CPU, 1 thread of 2"
    ranks["requests"], ranks["busy_s"], ranks["wall_s"] = [60, 0, 40], [3.0, 0.0, 1.0], [4.0, 0.0, 1.0]
    itl = LogHistogram()
    itl.add_sparse([100], [50])
    attributes = {
        "wall_s": 187.0, "session": 1, "output_tokens": 1_870, "prompt_tokens": 374, "requests": 60, "reason": "",
    }  # fmt: skip
    write_metrics(
        folder / METRICS_NAME, [rows(100, failed=10)], ranks, {"itl": itl}, np.zeros(3, TELEMETRY), attributes
    )
    asked = Request(custom_id="[red]id[/red]", kind="completion", prompt="x")
    lines = [encode_failure("bad", 90, 1, 0, 0, "test", "no")]
    lines += [
        encode_result(asked, k, 1, 1, 0, [(text, "stop", 3)], 5, 3, 0.1, 0.2, 0.4, 1, "m")
        for k, text in enumerate(ANSWERS)
    ]
    (folder / RECORD_NAME).write_bytes(b"".join(lines))
    return folder


def printed(run_dir: Path, show: int = 0) -> str:
    stream = io.StringIO()
    print_report(report_data(run_dir), stream, run_dir, show=show)
    return stream.getvalue()


def test_workers_that_left_are_told_with_their_reasons(run_dir: Path) -> None:
    assert "left before the end" not in printed(run_dir)
    data = report_data(run_dir)
    data["last_session"]["workers_lost"] = "rank 1 on node[7]: CUDA error: out of memory"
    stream = io.StringIO()
    print_report(data, stream, run_dir)
    assert "left before the end: rank 1 on node[7]: CUDA error: out of memory" in stream.getvalue()


def test_figures_are_plain_data(run_dir: Path) -> None:
    data = report_data(run_dir)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["requests"], data["ok"], data["failed"]) == (100, 90, 10)
    assert data["output_tokens_per_s"] == pytest.approx(10.0)
    assert data["prompt_tokens_per_s"] == pytest.approx(2.0)
    assert data["telemetry_samples"] == 3


def test_percentiles_come_with_their_samples_and_whether_these_support_them(run_dir: Path) -> None:
    latencies = report_data(run_dir)["latencies"]
    assert latencies["e2e_s"]["p50"]["samples"] == 90
    assert latencies["e2e_s"]["p50"]["supported"]
    assert latencies["e2e_s"]["p95"]["supported"]
    assert not latencies["e2e_s"]["p99"]["supported"]
    assert latencies["e2e_s"]["p99"]["value"] < 1e3, "failed requests are in no latency"
    assert latencies["itl_s"]["p50"]["samples"] == 50
    assert "*" in printed(run_dir)


def test_busy_share_is_missing_where_nothing_was_measured(run_dir: Path) -> None:
    assert [rank["busy_share"] for rank in report_data(run_dir)["ranks"]] == [0.75, None, 1.0]


def test_tables_have_what_a_person_looks_for(run_dir: Path) -> None:
    text = printed(run_dir)
    for part in (
        "90 answered, 10 failed, 40 of them earlier; the last job took 3m07s",
        "10.0 output tokens/s",
        "40 % of the prompts' tokens were in the cache already",
        "TTFT",
        "TPOT",
        "end-to-end",
        "node[7]",
    ):
        assert part in text, text
    assert "75 %" in text
    assert "100 %" not in text, "ranks of the last session only"


def test_drafted_tokens_are_told_where_there_are_any(tmp_path: Path) -> None:
    ranks = np.zeros(2, RANK)
    for drafted, said in (([0, -1], False), ([1500, 500], True)):
        ranks["drafted_tokens"], ranks["accepted_tokens"] = drafted, [1000 * said, 0]
        write_metrics(tmp_path / METRICS_NAME, [rows(3, failed=0)], ranks, {}, np.zeros(0, TELEMETRY), {})
        text = printed(tmp_path)
        assert ("speculation: 1,000 of 2,000 drafted tokens were right (50 %)" in text) is said
        assert ("speculation" in text) is said


def test_copies_are_told_where_there_were_any(tmp_path: Path) -> None:
    for attributes, said in ({}, False), ({"copies": 0, "copies_won": 0, "wasted_tokens": 0}, False), (
        {"copies": 1200, "copies_won": 7, "wasted_tokens": 3456}, True,
    ):  # fmt: skip
        ranks = np.zeros(2, RANK)
        write_metrics(tmp_path / METRICS_NAME, [rows(3, failed=0)], ranks, {}, np.zeros(0, TELEMETRY), attributes)
        text = " ".join(printed(tmp_path).split())
        assert ("copies: 1,200 requests of slow ranks started again" in text) is said
        assert ("7 of them answered there first · 3,456 output tokens made in vain" in text) is said
        assert ("copies:" in text) is said


@pytest.mark.parametrize(("columns", "host"), [(80, False), (120, True)])
def test_a_rank_is_one_line_on_a_narrow_terminal_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, columns: int, host: bool
) -> None:
    monkeypatch.setattr(report, "console_for", lambda stream: Console(file=stream, width=columns))
    lines = printed(run_dir).splitlines()
    at = next(place for place, line in enumerate(lines) if line.lstrip().startswith("rank"))
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == ["1", "2"]
    assert "busy:" in lines[at + 3]
    assert ("host" in lines[at].split()) is host
    assert all(len(line.rstrip()) <= columns for line in lines[at : at + 3])


def test_where_hosts_are_many_only_devices_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = np.zeros(2, RANK)
    ranks["host"], ranks["device"] = [b"gpu01", b"gpu02"], b"NVIDIA H100 80GB HBM3, 16 threads of 128"
    ranks["requests"], ranks["output_tokens"] = 12_345, 1_234_567
    write_metrics(tmp_path / METRICS_NAME, [rows(3, failed=0)], ranks, {}, np.zeros(0, TELEMETRY), {})
    monkeypatch.setattr(report, "console_for", lambda stream: Console(file=stream, width=80))
    lines = printed(tmp_path).splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("rank"))
    titles = ["rank", "host", "device", "requests", "failed", "tokens", "busy", "starved", "in", "out"]
    assert lines[at].split() == titles
    assert "gpu01  NVIDIA H100" in lines[at + 1]
    assert "…" in lines[at + 1]
    assert all(len(line) <= 80 for line in lines[at : at + 3])


def test_every_text_is_shown_as_it_is(run_dir: Path) -> None:
    """Brackets are no markup, wherever they come from: answers, custom_ids, paths."""
    text = printed(run_dir, show=10)
    assert r"LaTeX \[x^2\] and \[/frac]" in text.replace("\n", " ")
    assert "[bold]no markup[/bold]" in text
    assert "[red]id[/red]" in text
    assert str(run_dir) in text
    assert "two lines" in text
    assert "1 failed (bad): no" in text, "failed requests have no answer to show, but a reason"
    assert "x" * 1_000 not in text.replace("\n", "")


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_embedding_is_shown_by_its_first_numbers(run_dir: Path, encoding: Literal["float", "base64"]) -> None:
    asked = Request(custom_id="vectors", kind="embedding", inputs=("a", "b"), encoding_format=encoding)
    vectors = np.linspace(0.25, 0.75, 2 * 384, dtype=np.float32).reshape(2, 384)
    (run_dir / RECORD_NAME).write_bytes(encode_embeddings(asked, 0, 1, 1, 0, vectors, 5, 0.1, 0.4, "m"))
    assert "[0.2500, 0.2507, 0.2513, 0.2520, …] of 384 numbers and 1 more" in printed(run_dir, show=1)


def test_continuations_are_shown_with_how_likely_each_is(run_dir: Path) -> None:
    """The first alone would look like the model's answer."""
    asked = Request(custom_id="scored", kind="completion", prompt="x", continuations=(" Rome", " Paris"), logprobs=0)
    choices = [(" Rome", "length", 0), (" Paris", "length", 0)]
    known = [packed([b" Rome"], [-7.5]), packed([b" Par", b"is"], [-0.25, -0.01])]
    line = encode_result(asked, 0, 1, 1, 0, choices, 5, 0, 0.1, 0.0, 0.4, 1, "m", 0, known)
    (run_dir / RECORD_NAME).write_bytes(line)
    assert "scored  Rome -7.50 · Paris -0.26" in printed(run_dir, show=1)


def test_a_line_that_is_being_written_is_no_answer_yet(
    run_dir: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    record = run_dir / RECORD_NAME
    whole = record.read_bytes()
    record.write_bytes(whole + whole[:50])
    assert "1 failed (bad): no" in printed(run_dir, show=10)
    (run_dir / RUN_NAME).write_text(BEGUN)
    assert export_answers(run_dir, "completion", None) == 0
    assert capsysbinary.readouterr().out == whole
    record.unlink()
    assert export_answers(run_dir, "completion", None) == 0
    assert capsysbinary.readouterr().out == b""


def test_two_exports_to_one_file_at_once_leave_that_of_the_last(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / RUN_NAME).write_text(BEGUN)
    into = tmp_path / "answers.csv"
    ran: list[bool] = []

    def with_another(*args: Any, **options: Any) -> int:
        count = export_table(*args, **options)
        if not ran:  # another process, from beginning to end
            ran.append(True)
            monkeypatch.setattr(os, "getpid", lambda: 1)
            export_answers(run_dir, "completion", into, "csv")
            into.unlink()
        return count

    monkeypatch.setattr(rundirs, "export_table", with_another)
    assert export_answers(run_dir, "completion", into, "csv") == 0
    assert len(into.read_text().splitlines()) > len(ANSWERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", run_dir.name]


def test_as_many_answers_as_asked_for(run_dir: Path) -> None:
    assert printed(run_dir, show=2).count("[red]id[/red]") == 2
    assert printed(run_dir, show=0).count("[red]id[/red]") == 0


def test_rates_of_a_run_whose_jobs_were_all_killed_are_those_of_the_record(tmp_path: Path) -> None:
    first, second = rows(60, failed=0), rows(40, failed=0)
    first["session"], first["end_s"] = 0, np.linspace(1.0, 6.0, 60)
    second["session"], second["end_s"] = 1, np.linspace(1.0, 4.0, 40)
    second["end_s"][0] = np.nan
    nothing = np.zeros(0, TELEMETRY)
    write_metrics(tmp_path / METRICS_NAME, [first, second], np.zeros(0, RANK), {}, nothing, {})
    data = report_data(tmp_path)
    assert (data["over_s"], data["over"]) == (10.0, "until the last recorded request ended")
    assert data["requests_per_s"] == 10.0
    assert data["output_tokens_per_s"] == pytest.approx(
        (first["output_tokens"].sum() + second["output_tokens"].sum()) / 10
    )
    stream = io.StringIO()
    print_report(data, stream, tmp_path)
    assert "in 10s until the last recorded request ended (no job on it has ended in order)" in stream.getvalue()
    assert "?" not in stream.getvalue()
    ended = {**data, "over": "wall time of the last job"}
    assert comparison([("a", ended), ("b", data)])[1][2][0] == (
        "wall time of the last job, or until the last recorded request ended"
    )


@pytest.mark.parametrize(
    ("ended", "counted", "uncounted"),
    [
        (None, {0: 60, 1: 25}, 15),  # the second job was killed after an interval
        (None, {0: 60}, 40),  # ... before its first one
        (None, {}, 100),
        (0, {0: 60}, 40),  # the first one was drained, the second killed
        (1, {1: 40}, 0),  # the first one was killed; the figures are the last one's, and whole
        (None, {0: 60, 1: 41}, 0),  # a copy of a straggler counts twice
    ],
)
def test_what_the_counters_of_a_killed_job_lack_is_said(
    tmp_path: Path, ended: int | None, counted: dict[int, int], uncounted: int
) -> None:
    recorded = [rows(60), rows(40)]
    recorded[1]["session"] = 1
    ranks = np.zeros(len(counted), RANK)
    ranks["rank"], ranks["session"], ranks["requests"] = 1, list(counted), list(counted.values())
    attributes = {} if ended is None else {"session": ended, "wall_s": 3.0, "requests": [60, 40][ended]}
    write_metrics(tmp_path / METRICS_NAME, recorded, ranks, {}, np.zeros(0, TELEMETRY), attributes)
    data = report_data(tmp_path)
    assert data["uncounted"] == uncounted
    stream = io.StringIO()
    print_report(data, stream, tmp_path)
    assert ("job  rank" in stream.getvalue()) == (ended is None and len(counted) > 1)
    said = f"counters: {uncounted} of 100 recorded requests are in no rank's"
    assert (said in stream.getvalue()) == (uncounted > 0)
    assert ("counters:" in stream.getvalue()) == (uncounted > 0)


def test_nothing_answered_is_told_without_figures(tmp_path: Path) -> None:
    write_metrics(tmp_path / METRICS_NAME, [rows(3, failed=3)], np.zeros(0, RANK), {}, np.zeros(0, TELEMETRY), {})
    data = report_data(tmp_path)
    assert data["latencies"]["e2e_s"]["p50"]["value"] is None
    assert data["requests_per_s"] is None
    stream = io.StringIO()
    print_report(data, stream, tmp_path)
    assert "0 answered, 3 failed" in stream.getvalue()
    assert "nan" not in stream.getvalue().lower()
    assert not math.isnan(data["failed"])


def test_without_metrics_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=METRICS_NAME):
        report_data(tmp_path)
