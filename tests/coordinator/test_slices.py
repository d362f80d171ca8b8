"""Jobs that share one input: what each reads, and what is said of all together."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from coordinator.arrivals import Arrival
from coordinator.rundirs import export_answers, show_status, stop_run
from coordinator.slicing.slices import Slice, parse_slice, slice_dirs
from coordinator.source import FileSource
from scheduling.errors import ConfigError, InputError, RunDirError
from tests.launch import run_alone
from tests.system.runs import Run, prompts, write_lines

COUNT = 3


def read_all(source: FileSource, per_read: int = 2) -> list[Arrival]:
    found: list[Arrival] = []
    while not source.ended:
        found += source.read(per_read, 1 << 20)
    return found


@pytest.fixture(params=["jsonl", "text"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Seven requests; blank lines are none."""
    texts = [f"prompt {k}" for k in range(7)]
    lines = texts if request.param == "text" else [json.dumps({"prompt": text}) for text in texts]
    lines[2:2] = [""]
    path = tmp_path / ("in.txt" if request.param == "text" else "in.jsonl")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("precheck", [True, False])
@pytest.mark.parametrize("per_read", [1, 100])
def test_slices_together_read_each_request_once_under_its_own_number(file: Path, precheck: bool, per_read: int) -> None:
    whole = read_all(FileSource(file, precheck=precheck))
    sources = [FileSource(file, precheck=precheck, part=Slice(index, COUNT)) for index in range(COUNT)]
    parts = [read_all(source, per_read) for source in sources]
    assert [source.total for source in sources] == [len(part) for part in parts] == [3, 2, 2]
    assert all(arrival.index % COUNT == index for index, part in enumerate(parts) for arrival in part)
    assert sorted((arrival for part in parts for arrival in part), key=lambda arrival: arrival.index) == whole
    if precheck:
        assert [sources[1].fetch(index) for index in range(8)] == [
            whole[index].line if index in (1, 4) else None for index in range(8)
        ]


@pytest.mark.parametrize("precheck", [True, False])
def test_a_slice_reads_neither_bad_lines_nor_ids_of_others(tmp_path: Path, precheck: bool) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": "x"}\nno request\n{"prompt": "b", "id": "y"}\n{"prompt": "c", "id": "x"}\n')
    assert [arrival.custom_id for arrival in read_all(FileSource(path, precheck=precheck, part=Slice(0, 2)))] == [*"xy"]
    if precheck:
        with pytest.raises(InputError, match="line 2"):
            FileSource(path, part=Slice(1, 2))


@pytest.mark.parametrize("precheck", [True, False])
def test_of_more_slices_than_requests_the_last_have_none(file: Path, precheck: bool) -> None:
    assert read_all(FileSource(file, precheck=precheck, part=Slice(7, 8))) == []
    (last,) = read_all(FileSource(file, precheck=precheck, part=Slice(6, 8)))
    assert last.index == 6
    file.write_text("\n \n")
    with pytest.raises(InputError, match="is empty: there is no request in it"):
        FileSource(file, precheck=precheck, part=Slice(7, 8))


@pytest.mark.parametrize("text", ["", "3", "4/4", "5/4", "-1/4", "1/4/2", "a/b", "0/0", "²/4"])
def test_what_is_no_slice_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="0/4"):
        parse_slice(text)


def test_slices_of_unlike_cuts_are_not_taken_for_one_run(tmp_path: Path) -> None:
    for part in ("0/2", "2/3"):
        folder = parse_slice(part).directory(tmp_path)
        folder.mkdir()
        state = {"format": "llmpi-run", "version": 1, "identity": {"input": {"slice": part}}, "details": {}}
        (folder / "run.json").write_text(json.dumps(state | {"total": None, "sessions": [], "complete": False}))
    with pytest.raises(RunDirError, match="slice-0 is one of 2, slice-2 one of 3"):
        slice_dirs(tmp_path)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("more", [(), ("--no-precheck",)])
def test_the_tasks_of_an_array_are_complete_though_there_are_fewer_requests(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    given, run = write_lines(tmp_path / "in.jsonl", prompts(2, max_tokens=5)), tmp_path / "run"
    simulated = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", "0.0")
    for index in range(3):
        done = run_alone("batch", *simulated, "-i", given, "-o", run, "--slice", f"{index}/3", *more)
        assert done.rc == 0, done.output
    assert more or "slice 2/3 has no request: there are fewer in all" in done.stderr
    told = run_alone("status", run)
    assert (told.rc, "2 of 2 done" in told.stdout) == (0, True), told.output
    assert run_alone("report", run).rc == 0
    assert export_answers(run, "input", tmp_path / "answers.jsonl") == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.system
def test_answers_status_and_tables_of_all_slices_are_those_of_the_whole(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(20, max_tokens=5, temperature=1))
    simulated = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", "0.0")
    words = ("batch", *simulated, "-i", given, "-q", "-o")
    assert run_alone(*words, tmp_path / "whole").rc == 0
    run = tmp_path / "run"

    def status() -> tuple[int, str]:
        told = run_alone("status", run)
        return told.rc, told.stdout.splitlines()[-1]

    assert run_alone(*words, run, "--slice", "1/3").rc == 0
    assert status() == (3, f"{run}: 7 of ? done (7 answered, 0 failed), 1 of 3 slices complete")
    for index in (0, 2):
        assert run_alone(*words, run, "--slice", f"{index}/3").rc == 0
    assert status() == (0, f"{run}: 20 of 20 done (20 answered, 0 failed), 3 of 3 slices complete")
    again = run_alone(*words, run, "--slice", "1/4")
    assert (again.rc, "slice" in again.stderr) == (2, True), again.output

    def exported(of: Path, table: str | None = None) -> bytes:
        assert export_answers(of, "input", None, table) == 0
        return capsysbinary.readouterr().out

    def texts(of: Path) -> list[tuple[str, str]]:
        lines = map(json.loads, exported(of).splitlines())
        return [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in lines]

    assert texts(run) == texts(tmp_path / "whole")
    rows = list(csv.DictReader(io.StringIO(exported(run, "csv").decode(), newline="")))
    assert [row["index"] for row in rows] == [str(k) for k in range(20)]
    report = json.loads(run_alone("report", run, "--json").stdout)
    assert (report["requests"], report["latencies"]["e2e_s"]["p50"]["samples"]) == (20, 20)
    assert "slice-2" in run_alone("report", run).stdout
    replayed = run_alone("batch", "--replay", run / "slice-2", "-o", tmp_path / "again", "-q")
    assert replayed.rc == 0, replayed.output
    assert set(Run(tmp_path / "again").by_id()) == set(Run(run / "slice-2").by_id())


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400], ids=["closed", "not to be listed", "not to be entered"])
def test_a_directory_of_somebody_else_is_refused_with_the_reason(mode: int) -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as around:  # pytest's own folders are closed to others
        Path(around).chmod(0o755)
        folder = Path(around, "theirs")
        folder.mkdir()
        (folder / "run.json").touch(0o000)
        folder.chmod(mode | mode >> 6)
        try:
            if root:
                os.seteuid(65534)
            assert slice_dirs(folder) == []
            with pytest.raises(RunDirError, match=r"cannot read .*run\.json: Permission denied"):
                show_status(folder, as_json=False)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


@pytest.mark.parametrize("look", [partial(show_status, as_json=False), partial(stop_run, wait=False)])
def test_a_directory_that_no_file_system_has_is_refused(tmp_path: Path, look: Callable[[Path], int]) -> None:
    with pytest.raises(RunDirError, match="File name too long"):
        look(tmp_path / ("r" * 300))
